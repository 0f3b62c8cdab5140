"""`nearest` within classes in CUDA C++ (csrc/nearest/cuda.cu): the tensors' memory, handed over; one launch."""

from torch import Tensor, int64

from .. import native
from ..cuda_launch import launch, matrix
from ..similarity import accumulation_dtype


def forward(
    x: Tensor,
    y: Tensor,
    row_labels: Tensor,
    column_labels: Tensor,
    self_index: Tensor | None,
    below: Tensor | None,
    similarity: str,
    relation: str,
    k: int,
) -> tuple[Tensor, Tensor]:
    """similarity (B, k) in the accumulation dtype, index (B, k) int64."""
    assert native.cuda_module is not None
    if relation != "same":
        raise ValueError(f"relation: the CUDA kernel searches within classes only, got {relation!r}")
    best = x.new_empty((x.shape[0], k), dtype=accumulation_dtype(x.dtype))
    index = x.new_empty((x.shape[0], k), dtype=int64)
    labels = [native.int64(t) for t in (row_labels, column_labels, self_index)]
    below = None if below is None else below.contiguous()
    launch(
        native.cuda_module.nearest_forward,
        x.device,
        matrix(x),
        matrix(y),
        *map(native.pointer, labels),
        native.pointer(below),
        similarity,
        k,
        best.data_ptr(),
        index.data_ptr(),
    )
    return best, index
