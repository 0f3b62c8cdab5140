"""Triton: whether it is there, and on which device it runs. With TRITON_INTERPRET=1 its kernels run on the CPU, slowly."""

import importlib.util
import os

import torch

interpreted = os.environ.get("TRITON_INTERPRET") == "1"
# The device of the tensors that Triton's kernels take.
triton_device = "cpu" if interpreted else "cuda"
missing: str | None = None
if importlib.util.find_spec("triton") is None:
    missing = "Triton is not installed"
elif not interpreted and not torch.cuda.is_available():
    missing = "no GPU is at hand"
