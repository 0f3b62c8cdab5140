"""Who computes: one row a backend in `registry`, and the host code that a backend's kernels share."""
