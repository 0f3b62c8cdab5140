"""A backbone under FSDP2, and classes that are spread over the ranks, of which a step uses a sample.

torchrun --nproc-per-node 2 docs/examples/fsdp2.py
"""

import os

import torch
from torch import distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

from fused_margins.distributed import ShardedMarginSoftmaxLoss, clip_grad_norm_

CLASSES, STEPS, BATCH = 200, 40, 32


def batch(step: int, rank: int, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Points around the center of their class: each rank has its own."""
    centers = torch.randn(CLASSES, 16, generator=torch.Generator().manual_seed(0))
    draws = torch.Generator().manual_seed(1 + step * dist.get_world_size() + rank)
    labels = torch.randint(CLASSES, (BATCH,), generator=draws)
    return (centers[labels] + 0.3 * torch.randn(BATCH, 16, generator=draws)).to(device), labels.to(device)


class Model(nn.Module):
    """The backbone and the loss in one module; a call gives the loss."""

    def __init__(self, ranks: int) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 32))
        self.loss = ShardedMarginSoftmaxLoss(
            CLASSES, 32, margin=0.1, scale=16.0, sample_rate=0.3, embedding_gradient_scale=ranks
        )

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return self.loss(self.backbone(x), labels)


def main() -> float:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    torch.manual_seed(0)
    model = Model(dist.get_world_size()).to(device)
    # The weight of the loss is spread over the ranks already.
    fully_shard(model, ignored_params=set(model.loss.parameters()))
    of_backbone = torch.optim.AdamW(model.backbone.parameters(), lr=0.01)
    of_loss = torch.optim.AdamW(model.loss.parameters(), lr=0.05)
    model.loss.attach(of_loss)  # it steps the sampled classes alone
    for step in range(STEPS):
        value = model(*batch(step, dist.get_rank(), device))
        value.backward()
        clip_grad_norm_(model.parameters(), 5.0)
        for optimizer in (of_backbone, of_loss):
            optimizer.step()
            optimizer.zero_grad()
    if dist.get_rank() == 0:
        print(f"loss {value.item():.3f}")
    dist.destroy_process_group()
    return value.item()


if __name__ == "__main__":
    main()
