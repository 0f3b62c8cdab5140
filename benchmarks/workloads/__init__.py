"""Every workload: the ``WORKLOADS`` of each module in this folder."""

import importlib
import pkgutil

from ..workload import Row, Series, Workload, rows

_modules = [importlib.import_module(f"{__name__}.{m.name}") for m in pkgutil.iter_modules(__path__)]

WORKLOADS: tuple[Workload, ...] = tuple(w for module in _modules for w in module.WORKLOADS)

SERIES: tuple[Series, ...] = tuple(s for module in _modules for s in getattr(module, "SERIES", ()))


def rows_on(device: str) -> tuple[Row, ...]:
    """Every row of a device."""
    return tuple(rows(WORKLOADS, device))


ROWS = rows_on("cpu")


def find_row(row_id: str) -> Row:
    """Of those on a CPU."""
    everything = (*ROWS, *(row for series in SERIES for row in series.rows))
    return next(row for row in everything if row.id == row_id)
