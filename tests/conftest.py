"""What all tests share: backends that must be there, and memory that is never zero by luck."""

import warnings
from collections.abc import Callable, Iterator

import hypothesis
import pytest
import torch

with warnings.catch_warnings():
    warnings.simplefilter("ignore", RuntimeWarning)  # without the C++ kernels: the tests that need them say so
    from fused_margins.ops import registry


def pytest_addoption(parser: pytest.Parser) -> None:
    text = "comma-separated backends: a test that would skip for want of one of them fails"
    parser.addoption("--require-backends", default="", metavar="A,B", help=text)


def pytest_configure(config: pytest.Config) -> None:
    known = {b.name for b in registry.BACKENDS}
    if unknown := required_backends(config) - known:
        raise pytest.UsageError(f"--require-backends: expected some of {sorted(known)}, got {sorted(unknown)}")
    hypothesis.settings.register_profile("suite", derandomize=True, deadline=None, database=None)
    hypothesis.settings.load_profile("suite")
    # torch.empty then returns NaN and the largest integer: a kernel that forgets to write is seen.
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True


def required_backends(config: pytest.Config) -> set[str]:
    return set(filter(None, config.getoption("--require-backends").split(",")))


@pytest.fixture(scope="session")
def device_for(pytestconfig: pytest.Config) -> Callable[[str, str], str]:
    """device_for(op, backend): the device on which the backend runs the op here; without one the test skips."""
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]

    def find(op: str, backend: str) -> str:
        row = next(b for b in registry.BACKENDS if b.name == backend)
        reasons = []
        for device in devices:
            reason = registry.refusal(row, registry.Problem(op, device, torch.float32, 32, 32, 32, "same"))
            if reason is None:
                return device
            reasons.append(f"{device}: {reason}")
        required = backend in required_backends(pytestconfig) and registry._HAS_KERNEL[op, backend]
        end = pytest.fail if required else pytest.skip
        end(f"backend {backend} cannot run {op} here ({'; '.join(reasons)})")

    return find


@pytest.fixture(autouse=True)
def _runs_on_a_cpu(request: pytest.FixtureRequest) -> None:
    """Tests that do not ask for a device make their tensors on the CPU, where a GPU's backend has nothing to do."""
    backend = request.node.callspec.params.get("backend") if hasattr(request.node, "callspec") else None
    if backend in ("cuda", "triton") and "device_for" not in request.fixturenames:
        row = next(b for b in registry.BACKENDS if b.name == backend)
        if reason := registry.refusal(row, registry.Problem("contrast", "cpu", torch.float32, 32, 32, 32)):
            pytest.skip(reason)


@pytest.fixture
def no_memory_budget() -> Iterator[None]:
    """No forward keeps weights: every backward computes them again."""
    with registry.within_memory_budget(0):
        yield
