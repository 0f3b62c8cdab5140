"""Every workload: the ``WORKLOADS`` of each module in this folder."""

import importlib
import pkgutil

from ..workload import Row, Workload, rows

_modules = [importlib.import_module(f"{__name__}.{m.name}") for m in pkgutil.iter_modules(__path__)]

WORKLOADS: tuple[Workload, ...] = tuple(w for module in _modules for w in module.WORKLOADS)
ROWS: tuple[Row, ...] = tuple(rows(WORKLOADS))


def find_row(workload: str, size: str, dtype: str) -> Row:
    """The row of these names; `size` is the size's text."""
    for row in ROWS:
        if (row.workload.name, row.size.text, row.dtype_name) == (workload, size, dtype):
            return row
    raise LookupError(f"no row {workload} {size} {dtype}")
