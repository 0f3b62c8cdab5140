"""insightface's PartialFC_V2 on several ranks against one process, and its files in a loss on other ranks."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch import distributed as dist

from fused_margins import MarginSoftmaxLoss
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
    found.append(disagree(rank))
    torch.save({"epoch": 1, "state_dict_softmax_fc": {"weight": part}}, f"{folder}/checkpoint_gpu_{rank}.pt")
    return found


MISTAKES: dict[str, Callable[[int, Tensor, Tensor], Any]] = {
    "rank 1: local_embeddings: expected width 4 as weight has, got 3": lambda r, x, y: mine()(x[:, : 4 - (r == 1)], y),
    "rank 2: local_labels: expected shape (1,), got (0,)": lambda r, x, y: mine()(x, y[: len(y) - (r == 2)]),
    "rank 1: local_labels: expected values in [0, 7), got 9 in row 0": lambda r, x, y: mine()(x, y * 0 + 9 * (r == 1)),
    "a gradient of local_embeddings: expected the same on all ranks, got False on ranks 0, 2; True on rank 1": (
        lambda r, x, y: mine()(x.detach().requires_grad_(r == 1), y)
    ),
    "num_classes: expected the same on all ranks, got 7 on ranks 0, 2; 8 on rank 1": (
        lambda r, x, y: mine(num_classes=7 + (r == 1))
    ),
    "sample_rate: expected the same on all ranks, got 1.0 on ranks 0, 2; 0.5 on rank 1": (
        lambda r, x, y: mine(sample_rate=0.5 if r == 1 else 1)
    ),
    "margin_loss: expected the same on all ranks, got 'CosFace(s=64, m=0.4)' on ranks 0, 2; 'CosFace(s=64, m=1": (
        lambda r, x, y: mine(CosFace(m=1.0) if r == 1 else CosFace())
    ),
}


def mine(margin_loss: Any = None, num_classes: int = CLASSES, **options: Any) -> PartialFC_V2:
    return PartialFC_V2(margin_loss or CosFace(), WIDTH, num_classes, **options).double()


def disagree(rank: int) -> list[str]:
    """What all ranks say of the mistake of one."""
    found = []
    x, labels = (t.split(COUNTS)[rank] for t in inputs()[::2])
    for mistake in MISTAKES.values():
        try:
            mistake(rank, x, labels)
            found.append("nothing")
        except Exception as error:
            found.append(str(error))
        dist.barrier()
    return found


def loaded(rank: int, folder: str) -> tuple[Tensor, list[str]]:
    loss = ShardedMarginSoftmaxLoss(CLASSES, WIDTH).double()
    load_partial_fc(loss, folder)
    texts = []
    file = folder + "/checkpoint_gpu_{}.pt"
    for kind, classes, width, files in (
        (ValueError, CLASSES - 1, WIDTH, folder),
        (ValueError, CLASSES, 5, folder),
        (ValueError, CLASSES, WIDTH, folder + "/none"),
        (ValueError, 5, WIDTH, folder + "/gap"),
        (FileNotFoundError, CLASSES, WIDTH, [file.format(i + 7 * (i == 2) * rank) for i in range(3)]),
        (KeyError, CLASSES, WIDTH, [folder + "/gap/other.pt"]),
    ):
        other = ShardedMarginSoftmaxLoss(classes, width)
        before = whole(other.weight).clone()
        with pytest.raises(kind) as raised:
            load_partial_fc(other, files)
        texts.append(str(raised.value))
        assert torch.equal(whole(other.weight), before), "a load that fails writes nothing"
    with pytest.raises(TypeError, match="rank 0: loss: expected a ShardedMarginSoftmaxLoss, got MarginSoftmaxLoss"):
        load_partial_fc(MarginSoftmaxLoss(CLASSES, WIDTH), folder)  # type: ignore[arg-type]
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
    for _, (index, first), said in (of_rank[-3:] for of_rank in found):
        here = labels[(labels >= first) & (labels < first + 3 - (first > 0))].unique() - first
        assert torch.isin(here, index).all()
        for text, got in zip(MISTAKES, said, strict=True):
            assert got.startswith(text)
    (folder / "gap").mkdir()
    for rank in (0, 2):
        shutil.copy(folder / f"checkpoint_gpu_{rank}.pt", folder / "gap")
    torch.save({"state_dict_softmax_fc": {"bias": weight}}, folder / "gap" / "other.pt")
    for got, texts in ranks.run(loaded, 2, tmp_path, str(folder)):
        assert torch.equal(got, weight)
        expected = [
            "rank 0: files: expected 6 classes together, got 7",
            "rank 0: files: expected centres of shape (5,) as the loss has",
            "rank 0: files: expected a folder of checkpoint_gpu_*.pt",
            "rank 0: files: expected checkpoint_gpu_0.pt to checkpoint_gpu_1.pt",
            "rank 1: files: expected a checkpoint_gpu_*.pt, got",
            "rank 0: files: expected an entry 'weight', got ['bias'] in",
        ]
        for text, start in zip(texts, expected, strict=True):
            assert text.strip("\"'").startswith(start), text
