"""How implementations are made: steps from functions, the usual PyTorch code, ours on every backend, CUDA graphs."""

import importlib.util
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fused_margins.backends import registry

from .workload import Implementation, Inputs, Outputs, Step

Function = Callable[..., Any]
Prepare = Callable[[Function, Inputs], Step]  # makes the step that calls a function with the inputs

GRAPH_WARM_UP = 3  # calls before a capture, as torch's documentation asks: libraries set themselves up


def forward_backward(function: Callable[[Inputs], Outputs], inputs: Inputs, wrt: tuple[str, ...]) -> Step:
    """A step: the outputs and their gradients with respect to those of the inputs in `wrt` that are tensors."""
    names = [name for name in wrt if isinstance(inputs.get(name), Tensor)]
    # One tensor under two names (a batch against itself) is one leaf, as in training.
    leaf_of = {id(inputs[name]): inputs[name].detach().requires_grad_() for name in names}
    leaves = {name: leaf_of[id(inputs[name])] for name in names}
    arguments = inputs | leaves
    incoming: dict[str, Tensor] = {}

    def step() -> Outputs:
        outputs = function(arguments)
        for name in outputs.keys() - incoming.keys():
            incoming[name] = _incoming(outputs[name])
        grads = torch.autograd.grad(list(outputs.values()), list(leaves.values()), [incoming[name] for name in outputs])
        return {n: t.detach() for n, t in outputs.items()} | {f"grad_{n}": g for n, g in zip(leaves, grads)}

    return step if leaves else lambda: function(inputs)


def _incoming(output: Tensor) -> Tensor:
    """1 for a loss; for a matrix or vector numbers in [-1, 1] that every dtype holds and nobody can foresee."""
    if output.dim() == 0:
        return torch.ones_like(output)
    return torch.randint(-64, 65, output.shape, generator=torch.Generator().manual_seed(1)).to(output) / 64


def differentiated(output: str, *wrt: str) -> Prepare:
    """The function's result under the name `output`, and its gradients."""
    return lambda function, inputs: forward_backward(lambda given: {output: function(**given)}, inputs, wrt)


def returned(*names: str) -> Prepare:
    """The function's results under these names, without gradients."""

    def step(function: Function, inputs: Inputs) -> Outputs:
        results = function(**inputs)
        return dict(zip(names, results if isinstance(results, tuple) else (results,)))

    return lambda function, inputs: partial(step, function, inputs)


def on_device(*size: int, generator: torch.Generator) -> Tensor:
    """Normal random numbers on the generator's device."""
    return torch.randn(*size, generator=generator, device=generator.device)


def unless_installed(module: str) -> Callable[[Inputs], str | None]:
    """`refuses` of an implementation that needs the module."""
    return lambda inputs: None if importlib.util.find_spec(module) else f"{module} not installed"


def peer(
    name: str, prepare: Prepare, function: Function, note: str, needs: str = "torch", **options: Any
) -> Implementation:
    """`function`, which needs a module beside ours."""
    return Implementation(name, partial(prepare, function), note, refuses=unless_installed(needs), **options)


def metric_learning(name: str, step: Callable[[Inputs], Step], note: str, most: int | None = None) -> Implementation:
    note, refuses = f"pytorch-metric-learning{note}", unless_installed("pytorch_metric_learning")
    return Implementation(f"PML {name}", step, note, refuses=refuses, most_products=most)


def usual(prepare: Prepare, eager: Function, note: str = "") -> tuple[Implementation, ...]:
    """The usual PyTorch code, as it is and compiled: for one shape and without a fallback."""
    compiled = torch.compile(eager, fullgraph=True, dynamic=False)
    return (
        Implementation("eager", partial(prepare, eager), note),
        Implementation("torch.compile", partial(prepare, compiled), "of the eager code"),
    )


def ours(prepare: Prepare, function: Function, most_products: int | None = None) -> tuple[Implementation, ...]:
    """`function`, which takes a `backend`, on every backend of the registry; where one cannot run, its error says so.

    `most_products` is of the reference."""
    most = {"reference": most_products}
    return tuple(
        replace(on_backend(prepare, function, b.name), most_products=most.get(b.name)) for b in registry.BACKENDS
    )


def on_backend(prepare: Prepare, function: Function, backend: str) -> Implementation:
    return Implementation(backend, partial(prepare, partial(function, backend=backend)), backend=backend)


def captured(implementation: Implementation, sizes: tuple[str, ...] | None = None) -> Implementation:
    """The implementation's step as a CUDA graph: recorded once, replayed without Python or launches one by one."""

    def prepare(inputs: Inputs) -> Step:
        step = implementation.prepare(inputs)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(GRAPH_WARM_UP):
                step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs = step()

        def replay() -> Outputs:
            graph.replay()
            return outputs

        return replay

    name = f"{implementation.name}, CUDA graph"
    return replace(implementation, name=name, prepare=prepare, devices=("cuda",), sizes=sizes, allocates=False)


def graphs(
    peers: tuple[Implementation, ...], prepare: Prepare, function: Function, sizes: tuple[str, ...] | None = None
) -> tuple[Implementation, ...]:
    """The peers and ours as "auto" chooses, captured."""
    return tuple(captured(i, sizes) for i in (*peers, on_backend(prepare, function, "auto")))
