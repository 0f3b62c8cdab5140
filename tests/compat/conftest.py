"""What holds in every test of the drop-ins."""

import importlib.util

import pytest


@pytest.fixture(autouse=True, scope="module")
def matrices_that_fit_are_made_in_parts_too():
    """Soft triple of a small batch is left to theirs, which makes the same matrix; here it is ours."""
    with pytest.MonkeyPatch.context() as patch:
        if importlib.util.find_spec("pytorch_metric_learning"):
            from fused_margins.compat.pytorch_metric_learning.losses import heads

            patch.setattr(heads, "memory_budget", lambda: 0)
        yield
