"""Which way a call of a loss or a miner takes, and why."""

from typing import Any

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
    """Which way a call of a loss, miner or wrapper takes, and why; nothing is computed.

    Args:
        module: a loss or miner of either library, or a `CrossBatchMemory` or `DistributedLossWrapper` of one.
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
    if type(module) in OURS:
        return _theirs(name, "it is theirs; accelerate() turns it into ours")
    if isinstance(module, distributed.DistributedLossWrapper):
        pairs = indices_tuple
        if module.efficient and pairs is None and type(module.loss) in BY_LABEL and labels is not None:
            # Of several processes: references like the rows here, and none of them the row itself.
            ref_emb, ref_labels = embeddings.detach(), labels.clone()
            pairs = AllPairs(labels, ref_labels, None)
        return f"{name} of {explain(module.loss, embeddings, labels, pairs, ref_emb, ref_labels)}"
    if isinstance(module, losses.CrossBatchMemory):
        if reason := why_not_self_index(module, labels, indices_tuple):
            return f"{name}: its pairs are listed: {reason}"
        # Whatever the memory holds, its rows are like those of the batch.
        pairs = AllPairs(labels, labels.clone(), None)
        return f"{name} of {explain(module.loss, embeddings, labels, pairs, embeddings.detach(), labels.clone())}"
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
