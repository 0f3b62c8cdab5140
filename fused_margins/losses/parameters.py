"""What an optimizer needs of a model and of a loss that has parameters of its own."""

from typing import Any

from torch import nn

from ..core import checks


def parameter_groups(
    model: nn.Module, loss: nn.Module, *, lr: float, head_lr: float | None = None
) -> list[dict[str, Any]]:
    """Parameter groups for an optimizer: the model's, and after them those of the loss, which are easily forgotten.

    Args:
        model: what makes the embeddings.
        loss: what they are given to; one without parameters adds no group.
        lr: learning rate of the model. head_lr: of the loss, None for the same.

    Returns:
        Groups as every optimizer of torch takes them, the one of the loss last.

    Raises:
        TypeError: a model or a loss that is no module, rates that are no numbers. ValueError: rates below 0; a loss
            that is part of the model, or has one of its parameters, which an optimizer would then step twice.

    >>> import torch
    >>> from fused_margins import ArcFaceLoss, parameter_groups
    >>> model, loss = torch.nn.Linear(8, 4), ArcFaceLoss(num_classes=10, embedding_size=4)
    >>> optimizer = torch.optim.SGD(parameter_groups(model, loss, lr=0.01, head_lr=0.1), momentum=0.9)
    >>> [(group["lr"], len(group["params"])) for group in optimizer.param_groups]
    [(0.01, 2), (0.1, 1)]
    """
    for name, module in (("model", model), ("loss", loss)):
        if not isinstance(module, nn.Module):
            raise TypeError(f"{name}: expected a torch.nn.Module, got {type(module).__name__}")
    rates = {"lr": lr, "head_lr": lr if head_lr is None else head_lr}
    for name, rate in rates.items():
        if not 0 <= checks.number(name, rate) < float("inf"):
            raise ValueError(f"{name}: expected a number of at least 0, got {rate}")
    of_model = {id(p): name for name, p in model.named_parameters()}
    for name, parameter in loss.named_parameters():
        if id(parameter) in of_model:
            raise ValueError(
                f"loss: expected parameters that the model has not, got {name!r}, which the model has as "
                f"{of_model[id(parameter)]!r}; a loss within the model needs no group of its own"
            )
    groups = [{"params": list(module.parameters()), "lr": rate} for module, rate in zip((model, loss), rates.values())]
    return [group for group in groups if group["params"]]
