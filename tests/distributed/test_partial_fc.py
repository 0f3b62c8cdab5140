"""insightface's PartialFC_V2 on several ranks against one process, and its files in a loss on other ranks."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from fused_margins.compat.insightface import ArcFace, CombinedMarginLoss, CosFace, PartialFC_V2
from fused_margins.distributed import ShardedMarginSoftmaxLoss, load_partial_fc

from . import ranks
from .test_recipes import whole

CLASSES, WIDTH, COUNTS = 7, 4, (2, 3, 1)


class Mine(CosFace):
    """A callable that is none of the three: it gets the cosines."""


HEADS = [ArcFace(8.0, 0.5), CosFace(8.0, 0.3), CombinedMarginLoss(8.0, 1.0, 0.0, 0.3, 0.2), Mine(8.0, 0.3)]


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    draws = torch.Generator().manual_seed(4)
    x, weight = (torch.randn(n, WIDTH, dtype=torch.float64, generator=draws) for n in (sum(COUNTS), CLASSES))
    return x, weight, torch.randint(CLASSES, (sum(COUNTS), 1), generator=draws)


def step(head: Any, x: Tensor, part: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
    module = PartialFC_V2(head, WIDTH, CLASSES).double()
    module.load_state_dict({"weight": part})
    x = x.clone().requires_grad_()
    loss = module(x, labels)
    loss.backward()
    return loss.detach(), x.grad, module.weight.grad


def on_ranks(rank: int, folder: str) -> list[Any]:
    x, weight, labels = inputs()
    part, x, labels = (t[rank] for t in (weight.split([3, 2, 2]), x.split(COUNTS), labels.split(COUNTS)))
    found: list[Any] = [step(head, x, part, labels) for head in HEADS]
    sampled = PartialFC_V2(CosFace(), WIDTH, CLASSES, sample_rate=0.7).double()
    sampled(x, labels).backward()
    found.append((sampled.weight_index, sampled.class_start))
    try:
        PartialFC_V2(CosFace(), WIDTH, CLASSES).double()(
            x[:, : WIDTH - (rank == 1)], labels[: len(labels) - (rank == 2)]
        )
    except Exception as error:
        found.append(str(error))
    torch.save({"epoch": 1, "state_dict_softmax_fc": {"weight": part}}, f"{folder}/checkpoint_gpu_{rank}.pt")
    return found


def loaded(rank: int, folder: str) -> tuple[Tensor, list[str]]:
    loss = ShardedMarginSoftmaxLoss(CLASSES, WIDTH).double()
    load_partial_fc(loss, folder)
    texts = []
    for classes, width, files in (
        (CLASSES + 1, WIDTH, folder),
        (CLASSES, 5, folder),
        (CLASSES, WIDTH, folder + "/none"),
    ):
        try:
            load_partial_fc(ShardedMarginSoftmaxLoss(classes, width), files)
        except ValueError as error:
            texts.append(str(error))
        dist.barrier()
    return whole(loss.weight), texts


def test_the_loss_of_all_ranks_and_their_files(tmp_path: Path) -> None:
    folder = tmp_path / "files"
    folder.mkdir()
    found = ranks.run(on_ranks, 3, tmp_path, str(folder))
    x, weight, labels = inputs()
    for i, head in enumerate(HEADS):
        value, grad, of_weight = step(head, x, weight, labels)
        for rank, (own, own_grad, part) in enumerate(of_rank[i] for of_rank in found):
            torch.testing.assert_close(own, value)
            torch.testing.assert_close(own_grad, 3 * grad.split(COUNTS)[rank])  # which DDP divides by 3
            torch.testing.assert_close(part, of_weight.split([3, 2, 2])[rank])
    for _, (index, first), text in (of_rank[-3:] for of_rank in found):
        here = labels[(labels >= first) & (labels < first + 3 - (first > 0))].unique() - first
        assert torch.isin(here, index).all()
        assert text.startswith("rank 2: local_labels: expected shape")
    for got, texts in ranks.run(loaded, 2, tmp_path, str(folder)):
        assert torch.equal(got, weight)
        assert [text.removeprefix("rank 0: ").split(", got")[0] for text in texts] == [
            "files: expected 8 classes together",
            "files: expected centres of shape (5,) as the loss has",
            "files: expected a folder of checkpoint_gpu_*.pt",
        ]
