"""Interpreted and compiled Triton kernels cannot share a process: TRITON_INTERPRET=1 says which this one is for."""

from fused_margins.backends.triton import launch

INTERPRETED, COMPILED = ["test_interpreted.py", "test_exponentials.py"], ["test_compile.py", "test_cuda_sources.py"]
collect_ignore = COMPILED if launch.interpreted else INTERPRETED
