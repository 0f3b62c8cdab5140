"""What all tests share: backends that must be there, and memory that is never zero by luck."""

import gc
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import hypothesis
import pytest
import torch

with warnings.catch_warnings():
    warnings.simplefilter("ignore", RuntimeWarning)  # without the C++ kernels: the tests that need them say so
    import fused_margins.functional  # noqa: F401  # every op registers itself
    from fused_margins.backends import budget, registry
    from fused_margins.backends.triton import launch as triton

from tests import interpreter

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
ROWS = {row.name: row for row in registry.BACKENDS}
_required: set[str] = set()


def pytest_addoption(parser: pytest.Parser) -> None:
    text = "comma-separated backends: their tests run, and fail where one of them is missing"
    parser.addoption("--require-backends", default="", metavar="A,B", help=text)


def pytest_configure(config: pytest.Config) -> None:
    _required.update(required_backends(config))
    if unknown := _required - ROWS.keys():
        raise pytest.UsageError(f"--require-backends: expected some of {sorted(ROWS)}, got {sorted(unknown)}")
    hypothesis.settings.register_profile("suite", derandomize=True, deadline=None, database=None)
    hypothesis.settings.load_profile("suite")
    poison_memory()
    if triton.interpreted:
        interpreter.patch_the_language_once()
        interpreter.round_to_nearest()
        interpreter.add_up_products_alike()


def poison_memory() -> None:
    """torch.empty then returns NaN and the largest integer: a kernel that forgets to write is seen."""
    torch.set_deterministic_debug_mode("error")  # use_deterministic_algorithms would import Inductor, for seconds
    torch.utils.deterministic.fill_uninitialized_memory = True


def pytest_terminal_summary(terminalreporter: Any) -> None:
    missing = {name: _why_not(row) for name, row in ROWS.items()}
    left_out = [f"{name} ({reason})" for name, reason in missing.items() if reason and name not in _required]
    if left_out:
        terminalreporter.write_line(f"backends left out: {', '.join(left_out)}")


def required_backends(config: pytest.Config) -> set[str]:
    return set(filter(None, config.getoption("--require-backends").split(",")))


def _why_not(row: registry.Backend) -> str | None:
    """Why a backend runs nothing on any device here, or None."""
    reasons = [row.why_not(device) for device in DEVICES]
    return None if None in reasons else reasons[-1]


def refusals(op: str, backend: str, **options: Any) -> dict[str, str | None]:
    """Of each device here, why a backend cannot run a small problem there."""
    sizes = {"rows": 32, "columns": 32, "width": 32}
    asked = {device: registry.problem(op, **sizes, device=device, **options) for device in DEVICES}
    return {device: registry.refusal(ROWS[backend], problem) for device, problem in asked.items()}


def backends_with_kernels(op: str, *, reference: bool = False) -> list[str]:
    """The backends that have kernels for an op and are here or required; they may refuse some problems."""
    here = [n for n, row in ROWS.items() if registry.has_kernel(op, n) and (_why_not(row) is None or n in _required)]
    return [name for name in here if reference or name != "reference"]


def backends(op: str, *, reference: bool = True, **options: Any) -> list[str]:
    """The backends that run a small problem with these options here, or must."""
    here = [n for n in ROWS if n in backends_with_kernels(op, reference=reference)]
    return [n for n in here if _why_not(ROWS[n]) or None in refusals(op, n, **options).values()]


@pytest.fixture(scope="session")
def device_for(pytestconfig: pytest.Config) -> Callable[..., str]:
    """device_for(op, backend): the device on which the backend runs the op here; without one the test skips."""

    def find(op: str, backend: str, **options: Any) -> str:
        found = refusals(op, backend, **options)
        for device, reason in found.items():
            if reason is None:
                return device
        end = pytest.fail if backend in _required and registry.has_kernel(op, backend) else pytest.skip
        reasons = "; ".join(f"{device}: {reason}" for device, reason in found.items())
        end(f"backend {backend} cannot run {op} here ({reasons})")

    return find


@pytest.fixture(autouse=True)
def _the_same_numbers_in_any_order() -> None:
    """Tests run in whatever order the processes take them: what one draws must not depend on those before it."""
    torch.default_generator.manual_seed(0)  # torch.manual_seed would look at every kind of device, for milliseconds
    if torch.cuda.is_available():
        torch.cuda.manual_seed(0)


@pytest.fixture(autouse=True)
def _runs_on_a_cpu(request: pytest.FixtureRequest) -> None:
    """Tests that do not ask for a device make their tensors on the CPU, where a GPU's backend has nothing to do."""
    backend = request.node.callspec.params.get("backend") if hasattr(request.node, "callspec") else None
    asks = "device_for" in request.fixturenames
    if backend in ("cuda", "triton") and not asks and (reason := ROWS[backend].why_not("cpu")):
        pytest.skip(reason)


@pytest.fixture(scope="module", autouse=True)
def _garbage_of_tests_alone() -> None:
    """What is there before a file's tests, a million objects of torch and pytest, is no garbage: nobody looks at it.

    Every training of the trainer collects garbage, which took more than a third of the time of its tests.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture
def no_memory_budget() -> Iterator[None]:
    """No forward saves softmax weights: every backward computes them again."""
    with budget.within_memory_budget(0):
        yield


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """A test of backends none of which is here is left out with them."""
    empty = [
        item for item in items for m in item.iter_markers("skip") if "empty parameter set" in m.kwargs.get("reason", "")
    ]
    if empty:
        config.hook.pytest_deselected(items=empty)
        items[:] = [item for item in items if item not in empty]
