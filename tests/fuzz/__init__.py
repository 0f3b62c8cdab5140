"""Random cases: calls, direct calls of the registered ops, and files; see `tests.fuzz.__main__`."""
