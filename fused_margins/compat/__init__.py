"""Drop-ins for other libraries: their classes, on this library's kernels, and converters of their state dicts.

`pytorch_metric_learning` needs that library, an extra of ours; `insightface` and `convert` need none.
"""
