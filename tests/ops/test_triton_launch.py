"""Launches on a GPU from the host's side: what is compiled anew, and what a compiled kernel is handed."""

from types import SimpleNamespace

import pytest
import torch

from fused_margins.backends.triton import launch as triton


class Kernel:
    """Counts how often it is compiled, and what its compiled form is run with."""

    arg_names = ("a", "b", "size", "BLOCK")

    def __init__(self):
        self.compiled, self.runs = 0, []

    def __getitem__(self, grid):
        def first_launch(*args, **options):
            self.compiled += 1
            run = lambda *values: self.runs.append(values)  # noqa: E731
            return SimpleNamespace(run=run, function="function", packed_metadata="metadata")

        return first_launch


@pytest.fixture
def kernel(monkeypatch):
    monkeypatch.setattr(triton, "interpreted", False)
    monkeypatch.setattr(triton, "_compiled", {})
    monkeypatch.setattr(triton, "triton_version", (3, 6))
    triton._runs_compiled.cache_clear()
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: 1234, raising=False)
    yield Kernel()
    triton._runs_compiled.cache_clear()


@pytest.mark.parametrize(("version", "amd"), [((3, 8), False), ((3, 6), True)])
def test_an_unknown_version_launches_as_triton_does_and_warns_once(kernel, monkeypatch, version, amd):
    monkeypatch.setattr(triton, "triton_version", version)
    monkeypatch.setattr(triton, "on_amd", amd)
    with pytest.warns(RuntimeWarning, match="takes Triton's"):
        triton.launch(kernel, (3,), torch.zeros(4), None, 32, BLOCK=64, num_warps=4)
    for _ in range(2):  # a second warning would be an error
        triton.launch(kernel, (3,), torch.zeros(4), None, 32, BLOCK=64, num_warps=4)
    assert kernel.compiled == 3  # each of them Triton's own launch
    assert not kernel.runs


def test_the_installed_version_is_one_that_is_known():
    if not triton.triton_version or triton.triton_version > max(triton.COMPILED_RUNS_IN):
        pytest.skip("Triton is not installed, or is newer than this: it launches as it does itself")
    assert triton.triton_version in triton.COMPILED_RUNS_IN


def test_an_amd_gpu_is_no_hopper(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 4))
    for amd, major, of_float32 in ((False, 9, "tf32x3"), (True, 0, "ieee")):
        monkeypatch.setattr(triton, "on_amd", amd)
        triton.capability.cache_clear()
        assert triton.capability(torch.device("cuda", 0)) == major
        assert triton.precision(torch.float32) == of_float32
    triton.capability.cache_clear()


def test_a_second_launch_runs_what_the_first_compiled(kernel):
    a, b = torch.zeros(4), torch.zeros(4, dtype=torch.bfloat16)
    triton.launch(kernel, (3,), a, None, 32, BLOCK=64, num_warps=4)
    triton.launch(kernel, (5, 2), a, None, 48, BLOCK=64, num_warps=4)
    assert kernel.compiled == 1
    assert kernel.runs == [
        (5, 2, 1, 1234, "function", "metadata", None, None, None, a.data_ptr(), None, 48, 64),
    ]
    triton.launch(kernel, (1,), a, b, 32, BLOCK=64, num_warps=4)
    assert kernel.compiled == 2  # there was none


@pytest.mark.parametrize(
    ("first", "second", "again"),
    [
        (16, 32, False),  # multiples of 16
        (17, 33, False),
        (16, 17, True),
        (1, 17, True),  # 1 is compiled in
        (1, 0, True),
        (16, -1, True),
        (2**31 - 16, 2**31, True),  # 64 bits
    ],
)
def test_integers_that_are_compiled_alike(kernel, first, second, again):
    for size in (first, second):
        triton.launch(kernel, (1,), torch.zeros(4), None, size, BLOCK=64)
    assert kernel.compiled == 1 + again


def test_what_else_is_compiled_anew(kernel):
    pytest.importorskip("triton")
    t = torch.arange(64.0)

    def launches(a, **options):
        triton.launch(kernel, (1,), a, None, 32, **({"BLOCK": 64} | options))
        return kernel.compiled

    assert launches(t) == 1
    assert launches(t[16:]) == launches(torch.nn.Parameter(t)) == 1
    part = triton.Part(t, 16, 16, torch.float32, t.data_ptr() + 64)
    assert launches(part) == launches(part.slice(4, 8)) == 1
    assert kernel.runs[-1][9] == t[20:].data_ptr()
    assert torch.equal(part.slice(4, 8).tensor(), t[20:28])
    assert launches(t[1:]) == launches(part.slice(1, 8)) == 2  # not at 16 bytes
    assert launches(t.half()) == 3
    assert launches(t, BLOCK=128) == 4
    half = torch.zeros(64, 64, dtype=torch.float16)
    assert launches(triton.tma_descriptor(half, 16, 64)) == 5
    assert launches(triton.tma_descriptor(half, 32, 64)) == 6
    assert launches(triton.tma_descriptor(half[1:], 32, 64)) == 6


@pytest.mark.parametrize(
    ("t", "fits"),
    [
        (torch.zeros(4, 8, dtype=torch.bfloat16), True),
        (torch.zeros(4, 8), False),  # 32 bits
        (torch.zeros(4, 12, dtype=torch.float16), False),  # rows 24 bytes apart
        (torch.zeros(4, 16, dtype=torch.float16)[:, :12], True),
        (torch.zeros(4, 16, dtype=torch.float16)[:, 1:9], False),  # begins at 2 bytes
        (torch.zeros(8, 4, dtype=torch.float16).T, False),
        (torch.zeros(1, 8, dtype=torch.float16).expand(4, 8), False),
        (torch.zeros(0, 8, dtype=torch.float16), False),
        (torch.zeros(4, 0, dtype=torch.float16), False),
    ],
)
def test_what_descriptors_can_fetch(monkeypatch, t, fits):
    monkeypatch.setattr(triton, "capability", lambda device: 9)
    assert triton.can_use_tma(t) is fits
    assert triton.can_use_tma(torch.zeros(4, 8, dtype=torch.float16), t) is fits
    monkeypatch.setattr(triton, "interpreted", False)
    monkeypatch.setattr(triton, "capability", lambda device: 8)
    assert not triton.can_use_tma(t)


@pytest.mark.parametrize(("a", "b"), [(0, 4), (1, 4), (4, 4), (5, 4), (2**40, 3)])
def test_division_rounded_up(a, b):
    assert triton.cdiv(a, b) == -(-a // b) == (a + b - 1) // b
