"""Drop-ins for other libraries: their classes, on this library's kernels. Each needs its library, an extra of ours."""
