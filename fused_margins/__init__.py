"""Fused margin softmax, nearest-positive mining and magnet losses for PyTorch."""
