"""A backbone under DDP, and classes that are spread over the ranks; goes on from its last checkpoint.

torchrun --nproc-per-node 2 docs/examples/ddp.py [folder for checkpoints]
"""

import os
import sys
from pathlib import Path

import torch
from torch import distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from fused_margins import parameter_groups
from fused_margins.distributed import ShardedMarginSoftmaxLoss, clip_grad_norm_, load_checkpoint, save_checkpoint

CLASSES, STEPS, BATCH = 50, 40, 32


def batch(step: int, rank: int, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Points around the center of their class: each rank has its own."""
    centers = torch.randn(CLASSES, 16, generator=torch.Generator().manual_seed(0))
    draws = torch.Generator().manual_seed(1 + step * dist.get_world_size() + rank)
    labels = torch.randint(CLASSES, (BATCH,), generator=draws)
    return (centers[labels] + 0.3 * torch.randn(BATCH, 16, generator=draws)).to(device), labels.to(device)


def main(folder: str | None) -> float:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 32)).to(device)
    # The loss stays outside of DDP, which divides the gradients of the backbone by the ranks: the factor undoes it.
    loss = ShardedMarginSoftmaxLoss(
        CLASSES, 32, margin_type="angular", margin=0.2, scale=16.0, embedding_gradient_scale=ranks
    )
    model = DistributedDataParallel(backbone)
    optimizer = torch.optim.SGD(parameter_groups(model, loss, lr=0.1), momentum=0.9)
    saved = nn.ModuleDict({"model": backbone, "loss": loss})
    first = 0
    if folder and Path(folder, "last").exists():
        first = load_checkpoint(Path(folder, "last"), saved, optimizer, step=0)["step"]
    for step in range(first, STEPS):
        x, labels = batch(step, rank, device)
        value = loss(model(x), labels)
        optimizer.zero_grad()
        value.backward()
        clip_grad_norm_([*model.parameters(), *loss.parameters()], 5.0)
        optimizer.step()
        if folder and (step + 1) % 20 == 0:
            save_checkpoint(Path(folder, "last"), saved, optimizer, step=step + 1)
    if rank == 0:
        print(f"steps {first} to {STEPS}, loss {value.item():.3f}")
    dist.destroy_process_group()
    return value.item()


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else None)
