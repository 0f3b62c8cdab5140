"""Plain softmax cross entropy of a linear layer, not normalised, without a margin: what libraries for language models
fuse, so that they and ours are compared at the same thing. With both sides normalised within their time they take part
in `margin_softmax`, too."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from fused_margins.functional import margin_softmax_loss

from ..correctness import check_values
from ..implementations import differentiated, on_device, ours, unless_installed, usual
from ..timing import fastest, waiting_for
from ..workload import DEVICES, Implementation, Inputs, Size, Step, Workload

# Rows that 128 divides and classes that 256 does: what QuACK and Liger's CuTe DSL take.
SHAPES = (
    ("few_shot", (256, 512, 64), DEVICES),
    ("many_classes", (128, 512, 10_000), ("cpu",)),
    ("many_classes", (1024, 512, 100_096), ("cuda",)),
    ("vocabulary", (4096, 4096, 128_256), ("cuda",)),  # of Llama 3: the size of QuACK's and Liger's own figures
)
BFLOAT16_ONLY = (
    2**34
)  # multiply-adds of a product: float32 is nobody's choice there, and its logits alone have gigabytes
ON_GPU = {"devices": ("cuda",)}

LossOf = Callable[[Tensor, Tensor, Tensor], Tensor]  # of embeddings (B, D), weight (C, D), labels (B,)
StepOf = Callable[[LossOf], Step]  # with its gradients


def _size(name: str, shape: tuple[int, int, int], devices: tuple[str, ...]) -> Size:
    rows, width, classes = shape

    def make(dtype: torch.dtype, g: Generator) -> Inputs:
        return {
            "embeddings": on_device(rows, width, generator=g).to(dtype),
            "weight": (on_device(classes, width, generator=g) / width**0.5).to(dtype),  # logits of variance 1
            "labels": torch.randint(classes, (rows,), generator=g, device=g.device),
        }

    products = rows * width * classes
    dtypes = (torch.bfloat16,) if products >= BFLOAT16_ONLY else None
    return Size(name, shape, make, multiply_adds=3 * products, devices=devices, dtypes=dtypes)


def eager(embeddings: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(embeddings, weight), labels)


def our_loss(embeddings: Tensor, weight: Tensor, labels: Tensor, backend: str) -> Tensor:
    return margin_softmax_loss(embeddings, weight, labels, scale=1.0, similarity="dot", backend=backend)


# Every peer is made of `step_of`, which puts a loss and its gradients in a step, and of the inputs, which choose its
# settings.


def torch_chunks(step_of: StepOf, inputs: Inputs) -> Step:
    rows, options = inputs["embeddings"].shape[0], torch.nn.LinearCrossEntropyOptions
    candidates = [None, options(), options(batch_chunk_size=rows), options(batch_chunk_size=max(1, rows // 4))]
    return _fastest(step_of, [partial(F.linear_cross_entropy, options=chosen) for chosen in candidates], inputs)


def cut_cross_entropy(step_of: StepOf, inputs: Inputs, **options: str | None) -> Step:
    from cut_cross_entropy import linear_cross_entropy

    return step_of(partial(linear_cross_entropy, impl="cce", **options))


def liger(step_of: StepOf, inputs: Inputs) -> Step:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return step_of(liger_fused_linear_cross_entropy)


def liger_cute(step_of: StepOf, inputs: Inputs) -> Step:
    # LIGER_KERNEL_IMPL chooses for a whole process, when it imports Liger; here both take turns in one.
    from liger_kernel.ops.cutedsl.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

    return step_of(lambda x, weight, labels: LigerFusedLinearCrossEntropyFunction.apply(x, weight, labels)[0])


def quack(step_of: StepOf, inputs: Inputs) -> Step:
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    rows = inputs["embeddings"].shape[0]
    sizes = sorted({min(rows, size) for size in (1024, 2048, 4096, 8192)})
    return _fastest(step_of, [partial(chunked_linear_cross_entropy, chunk_size=size) for size in sizes], inputs)


def _fastest(step_of: StepOf, losses: list[LossOf], inputs: Inputs) -> Step:
    return fastest([step_of(loss) for loss in losses], wait=waiting_for(inputs["embeddings"].device.type))


def _without_linear_cross_entropy(inputs: Inputs) -> str | None:
    return None if hasattr(F, "linear_cross_entropy") else "this torch does not have it"


def _needs_cute(module: str, steps: Callable[[StepOf, Inputs], Step]) -> Callable[[Inputs], str | None]:
    """Not installed; or what the peer's own guards say of these inputs: dtypes, sizes, the GPU."""

    def refuses(inputs: Inputs) -> str | None:
        for name in (module, "cutlass"):
            if reason := unless_installed(name)(inputs):
                return reason
        try:
            steps(partial(plain, inputs=inputs), inputs)()
        except (AssertionError, ImportError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
            return f"it refuses: {(str(error).strip() or type(error).__name__).splitlines()[0]}"
        return None

    return refuses


prepare = differentiated("loss", "embeddings", "weight")


def plain(loss_of: LossOf, inputs: Inputs) -> Step:
    return prepare(lambda embeddings, weight, labels, **_: loss_of(embeddings, weight, labels), inputs)


def peers(step_of: Callable[[LossOf, Inputs], Step], note: str = "", **options: object) -> tuple[Implementation, ...]:
    """The libraries' linear cross entropies, each with its best setting; `step_of` puts them in a step."""

    def of(name: str, steps: Callable[..., Step], about: str, refuses: Callable, **more: object) -> Implementation:
        def prepared(inputs: Inputs) -> Step:
            return steps(partial(step_of, inputs=inputs), inputs)

        return Implementation(name, prepared, note + about, refuses=refuses, **options, **more)

    cce, all_gradients = unless_installed("cut_cross_entropy"), partial(cut_cross_entropy, filter_eps=None)
    of_liger, cute = unless_installed("liger_kernel"), _needs_cute("liger_kernel", liger_cute)
    return (
        of("F.linear_cross_entropy", torch_chunks, "its fastest chunk setting", _without_linear_cross_entropy),
        of("cut-cross-entropy", cut_cross_entropy, "small gradients left out", cce, **ON_GPU),
        of("cut-cross-entropy, all gradients", all_gradients, "filter_eps=None", cce, **ON_GPU),
        of("Liger", liger, "its fused linear cross entropy in Triton, as it comes", of_liger, **ON_GPU),
        of("Liger, CuTe DSL", liger_cute, "the same as LIGER_KERNEL_IMPL=cutedsl chooses it", cute, **ON_GPU),
        of("QuACK", quack, "chunked_linear_cross_entropy, its fastest chunks", _needs_cute("quack", quack), **ON_GPU),
    )


WORKLOADS = (
    Workload(
        "cross_entropy",
        "Softmax cross entropy of a linear layer, no margin, not normalised: loss and gradients of both sides",
        "B x D x C",
        tuple(_size(*shape) for shape in SHAPES),
        (*usual(prepare, eager), *peers(plain), *ours(prepare, our_loss)),
        partial(
            check_values,
            truth=partial(prepare, partial(our_loss, backend="reference")),
            call=lambda inputs: (
                "contrast",
                {"x": inputs["embeddings"], "y": inputs["weight"], "target": inputs["labels"]}
                | {"scale": 1.0, "similarity": "dot", "epilogue": "margin_softmax"},
            ),
        ),
        (torch.float32, torch.bfloat16),
    ),
)
