"""Which way a call of a loss or a miner takes, and why."""

from typing import Any

import torch
from pytorch_metric_learning.losses import MultipleLosses, SelfSupervisedLoss
from pytorch_metric_learning.utils import common_functions
from torch import nn

from . import calls, losses, miners
from .calls import AllPairs, is_by_label
from .losses.memory import BY_LABEL, why_not_self_index
from .switch import OURS
from .utils import distributed


def explain(
    module: nn.Module,
    embeddings: Any,
    labels: Any = None,
    indices_tuple: Any = None,
    ref_emb: Any = None,
    ref_labels: Any = None,
) -> str:
    """Which way a call of a loss, miner or wrapper takes, and why; nothing is computed but what miners find.

    Args:
        module: a loss or miner of either library, or a `CrossBatchMemory`, `DistributedLossWrapper`, `MultipleLosses`
            or `SelfSupervisedLoss` of some.
        embeddings, labels, indices_tuple, ref_emb, ref_labels: as the module is called with.

    Returns:
        One line: "NAME: our code, by labels", "NAME: our code, by the indices_tuple", or
        "NAME: the code of pytorch-metric-learning: REASON".

    Raises:
        What theirs raises for shapes that it checks before it computes.

    >>> import torch
    >>> from fused_margins.compat.pytorch_metric_learning import explain, losses
    >>> call = torch.eye(3), torch.tensor([0, 0, 1])
    >>> explain(losses.TripletMarginLoss(), *call)
    'TripletMarginLoss: our code, by labels'
    >>> explain(losses.TripletMarginLoss(swap=True), *call)
    'TripletMarginLoss: the code of pytorch-metric-learning: with swap, distances of positives from negatives count'
    """
    name = type(module).__name__
    inner: Any = getattr(module, "loss", None)  # of a wrapper
    if type(module) in OURS:
        return _theirs(name, "it is theirs; accelerate() turns it into ours")
    if type(module) is MultipleLosses:
        of_all: Any = module
        found = []
        for key, loss in of_all.losses.items() if of_all.is_dict else enumerate(of_all.losses):
            pairs = of_all.get_indices_tuple(key, embeddings, labels, indices_tuple)
            found.append(explain(loss, embeddings, labels, pairs, ref_emb, ref_labels))
        return f"{name} of {'; '.join(found)}"
    if type(module) is SelfSupervisedLoss:
        views = embeddings, embeddings if ref_emb is None else ref_emb
        rows = torch.arange(len(embeddings), device=embeddings.device)
        if module.symmetric:
            return f"{name} of {explain(inner, torch.cat(views), rows.repeat(2))}"
        return f"{name} of {explain(inner, embeddings, rows, None, views[1], rows.clone())}"
    if isinstance(module, distributed.DistributedLossWrapper):
        pairs = indices_tuple
        if module.efficient and pairs is None and type(module.loss) in BY_LABEL and labels is not None:
            # Of several processes: references like the rows here, and none of them the row itself.
            ref_emb, ref_labels = embeddings.detach(), labels.clone()
            pairs = AllPairs(labels, ref_labels, None)
        return f"{name} of {explain(inner, embeddings, labels, pairs, ref_emb, ref_labels)}"
    if isinstance(module, losses.CrossBatchMemory):
        if reason := why_not_self_index(module, labels, indices_tuple):
            return f"{name}: its pairs are listed: {reason}"
        # Whatever the memory holds, its rows are like those of the batch.
        pairs = AllPairs(labels, labels.clone(), None)
        return f"{name} of {explain(inner, embeddings, labels, pairs, embeddings.detach(), labels.clone())}"
    if not isinstance(module, calls.OnKernels | miners.OnKernels):
        return _theirs(name, "there is no other for this class")
    common_functions.check_shapes(embeddings, labels)
    labels = None if labels is None else labels.to(embeddings.device)
    sides = common_functions.set_ref_emb(embeddings, labels, ref_emb, ref_labels)
    if isinstance(module, miners.OnKernels):
        reason = module._why_not(embeddings, labels, *sides)
        return _theirs(name, reason) if reason else f"{name}: our code, by labels"
    if reason := module._why_not(embeddings, labels, indices_tuple, *sides):
        return _theirs(name, reason)
    return f"{name}: our code, by {'labels' if is_by_label(indices_tuple) else 'the indices_tuple'}"


def _theirs(name: str, reason: str) -> str:
    return f"{name}: the code of pytorch-metric-learning: {reason}"
