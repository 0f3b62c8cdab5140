"""Every workload: the ``WORKLOADS`` of each module in this folder."""

import importlib
import pkgutil

from ..workload import Row, Workload, rows

_modules = [importlib.import_module(f"{__name__}.{m.name}") for m in pkgutil.iter_modules(__path__)]

WORKLOADS: tuple[Workload, ...] = tuple(w for module in _modules for w in module.WORKLOADS)
ROWS: tuple[Row, ...] = tuple(rows(WORKLOADS))


def find_row(row_id: str) -> Row:
    for row in ROWS:
        if row.id == row_id:
            return row
    raise LookupError(f"no row {row_id}")
