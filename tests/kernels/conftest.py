"""Interpreted and compiled Triton kernels cannot share a process: TRITON_INTERPRET=1 says which this one is for."""

from fused_margins.backends.triton import launch

collect_ignore = ["test_compile.py", "test_cuda_sources.py"] if launch.interpreted else ["test_interpreted.py"]
