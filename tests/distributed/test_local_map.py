"""Functions take DTensors whose rows are cut over ranks, by torch's local_map; without it they name the placements."""

import functools
from pathlib import Path

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.experimental import local_map

from fused_margins.functional import margin_softmax_loss, mine_positives

from . import ranks


def _on_two_ranks(rank: int) -> None:
    mesh = init_device_mesh("cpu", (2,))
    torch.manual_seed(0)
    x, w, labels = torch.randn(6, 4), torch.randn(5, 4), torch.tensor([0, 4, 1, 1, 3, 0])
    rows, whole = [Shard(0)], [Replicate()]
    dx, dw, dy = (distribute_tensor(t, mesh, p) for t, p in ((x, rows), (w, whole), (labels, rows)))
    dx, dw = dx.requires_grad_(), dw.requires_grad_()
    losses = local_map(
        functools.partial(margin_softmax_loss, margin=0.2, reduction="none"),
        out_placements=rows,
        in_placements=(rows, whole, rows),
        in_grad_placements=(rows, [Partial()], rows),
        device_mesh=mesh,
    )(dx, dw, dy)
    assert losses.placements == (Shard(0),)
    loss = losses.mean()
    loss.backward()
    x, w = x.requires_grad_(), w.requires_grad_()
    expected = margin_softmax_loss(x, w, labels, margin=0.2)
    expected.backward()
    torch.testing.assert_close(loss.full_tensor(), expected)
    torch.testing.assert_close(dx.grad.full_tensor(), x.grad)
    torch.testing.assert_close(dw.grad.full_tensor(), w.grad)
    for call in (lambda: margin_softmax_loss(dx, dw, dy), lambda: mine_positives(dx.detach(), dy)):
        with pytest.raises(
            TypeError, match=r"embeddings: expected a plain tensor, got a DTensor with placements .*dim=0"
        ):
            call()


def test_rows_over_two_ranks(tmp_path: Path) -> None:
    ranks.run(_on_two_ranks, 2, tmp_path)
