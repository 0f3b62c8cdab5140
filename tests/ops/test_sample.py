"""Random numbers of `sample`: published values, independence, and what depends on how they are made."""

import pytest
import torch

from fused_margins.core.similarity import unit_rows
from fused_margins.ops import cases
from fused_margins.ops.sample import reference, sample
from tests.conftest import backends

OP = cases.load("sample")
on_every_backend = pytest.mark.parametrize("backend", backends("sample"))
on_every_kernel = pytest.mark.parametrize("backend", backends("sample", reference=False))
# Of the known answers in the authors' Random123: counter, key, both words.
KNOWN = [
    ((0, 0), 0, (0xFF1DAE59, 0x6CD10DF2)),
    ((0xFFFFFFFF, 0xFFFFFFFF), 0xFFFFFFFF, (0x2C3F628B, 0xAB4FD7AD)),
    ((0x243F6A88, 0x85A308D3), 0x13198A2E, (0xDD7CE038, 0xF62A4C12)),
]
ALMOST_ONE = (50, 49, 2512)  # row, column and seed of a word of 2^32 - 128 or more
SMALL_U = (13, 708)  # row and seed of a U that is a little below 2^-6 in column 0


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN)
def test_philox_has_its_published_values(counter, key, words):
    got = reference.philox(*(torch.tensor(n) for n in (*counter, key)))
    assert tuple(map(int, got)) == words


def test_exponential_variates():
    e = reference.exponentials(0, 400, 501, torch.tensor(1), torch.float64)
    n = e.numel()
    assert abs(float(e.mean()) - 1) < 4 / n**0.5
    assert abs(float(e.square().mean()) - 2) < 4 * 20**0.5 / n**0.5  # E^2 has variance 20
    for neighbours in ((e[:, 1:], e[:, :-1]), (e[1:], e[:-1])):
        a, b = (t - 1 for t in neighbours)
        assert abs(float((a * b).mean())) < 4 / n**0.5
    assert torch.equal(e[7:9], reference.exponentials(7, 2, 501, torch.tensor(1), torch.float64))
    assert not torch.equal(e[:1], reference.exponentials(0, 1, 501, torch.tensor(2), torch.float64))


@on_every_backend
def test_every_column_can_be_chosen(backend, device_for):
    """A word that rounds to U = 1 in float32 leaves its column open, alone as it is."""
    device = device_for("sample", backend)
    row, column, seed = ALMOST_ONE
    word, _ = reference.philox(*(torch.tensor(n) for n in ALMOST_ONE))
    assert float(word.float() * 2.0**-32) == 1.0
    assert 16 < float(reference.exponentials(row, 1, column + 1, torch.tensor(seed), torch.float32)[0, column]) < 17
    x = torch.ones(row + 1, 2, device=device)
    labels = torch.arange(column + 1, device=device)  # that column alone is of the rows' class
    of_rows = torch.full((row + 1,), column, device=device)
    index = sample(
        x, x[: column + 1], of_rows, labels, torch.tensor(seed, device=device), relation="same", backend=backend
    )
    assert (index == column).all()


@on_every_backend
def test_numbers_of_float64_are_those_of_float64(backend, device_for):
    """Of two columns the second is ahead by 3e-9, more than a short series for E would lose."""
    device = device_for("sample", backend)
    row, seed = SMALL_U
    e = reference.exponentials(row, 1, 2, torch.tensor(seed), torch.float64)[0]
    assert 0.9 < float(e[0]) * 2**6 < 1
    wanted = float(reference.log_weight(torch.ones((), dtype=torch.float64), 8) - e[0].log() + e[1].log()) + 3e-9
    near, far = 0.25, 1.96
    for _ in range(100):  # the squared distance of that weight
        squared = (near + far) / 2
        ahead = float(reference.log_weight(torch.tensor(squared, dtype=torch.float64), 8)) > wanted
        near, far = (squared, far) if ahead else (near, squared)
    cosines = torch.tensor([0.5, 1 - near / 2], dtype=torch.float64)
    x, y = torch.zeros(row + 1, 8).double(), torch.zeros(2, 8).double()
    x[:, 0], y[:, 0], y[:, 1] = 1, cosines, (1 - cosines.square()).sqrt()
    labels = torch.zeros(row + 1).long()
    seed = torch.tensor(seed)
    tensors = (t.to(device) for t in (x, y, labels, labels.new_zeros(2), seed))
    assert int(sample(*tensors, relation="any", backend=backend)[row]) == 1


@on_every_backend
def test_equal_weights_draw_evenly(backend, device_for):
    device = device_for("sample", backend)
    rows, columns = 4096, 100
    x = torch.ones(rows, 3, device=device)
    y = torch.ones(columns, 3, device=device)
    y[50:] = -1  # beyond the cut-off, as long as anything is nearer
    row_labels, column_labels = (torch.zeros(n, dtype=torch.int64, device=device) for n in (rows, columns))
    for seed, of_y in ((1, y), (2, -y)):
        index = sample(
            x, of_y, row_labels, column_labels, torch.tensor(seed, device=device), relation="any", backend=backend
        )
        near = index if seed == 1 else index - 50
        counts = torch.bincount(near, minlength=50).cpu()
        assert len(counts) == 50
        expected = rows / 50
        # Chi squared with 49 degrees of freedom: 4 standard deviations above its mean.
        assert float(((counts - expected) ** 2 / expected).sum()) < 49 + 4 * 98**0.5
    away = sample(
        x, -torch.ones_like(y), row_labels, column_labels, torch.tensor(3, device=device), relation="any",
        backend=backend,
    )  # fmt: skip
    counts = torch.bincount(away, minlength=columns).cpu()
    assert float(((counts - rows / columns) ** 2 / (rows / columns)).sum()) < 99 + 4 * 198**0.5


def test_a_reference_in_blocks_draws_the_same(monkeypatch):
    g = torch.Generator().manual_seed(0)
    x, labels = torch.randn(50, 8, generator=g), torch.arange(50) % 7
    whole = sample(x, x, labels, labels, torch.tensor(9), backend="reference")
    monkeypatch.setattr(reference, "ENTRIES_AT_ONCE", 120)  # two rows at a time
    assert torch.equal(sample(x, x, labels, labels, torch.tensor(9), backend="reference"), whole)


@pytest.mark.parametrize("seed", [torch.tensor(7, dtype=torch.uint8), torch.tensor(7 + 2**40), torch.tensor(7)])
@on_every_backend
@pytest.mark.interpreted
def test_the_lowest_bits_of_a_seed_count(seed, backend, device_for):
    device = device_for("sample", backend)
    x, labels = torch.eye(9, device=device), torch.arange(9, device=device)
    got = sample(x, x, labels, labels, seed.to(device), backend=backend)
    assert torch.equal(
        got.cpu(), sample(*(t.cpu() for t in (x, x, labels, labels)), torch.tensor(7), backend="reference")
    )


@on_every_backend
@pytest.mark.parametrize("value", [9, -2, 2**40, -(2**63)])
def test_an_own_column_out_of_range_raises_before_anything_is_read(value, backend, device_for):
    if device_for("sample", backend) != "cpu":
        return
    own = torch.tensor([0, 1, -1, 3, value, 9])  # the first bad row is named, -1 is none
    tensors = torch.randn(6, 4), torch.randn(9, 4), torch.arange(6), torch.arange(9), torch.tensor(3)
    with pytest.raises(IndexError) as raised:
        sample(*tensors, self_index=own, backend=backend)
    assert str(raised.value) == f"self_index: expected values in [0, 9) or -1 (ignored), got {value} in row 4"


@on_every_kernel
@pytest.mark.interpreted
def test_half_precision_whose_squares_overflow(backend, device_for):
    """|x|^2 of 96 numbers near 300 is 8.6e6, and |x - y|^2 1.2e5: above float16's 65504."""
    inputs = OP.CASES[0].make(torch.Generator().manual_seed(0))
    inputs |= {n: 300 + 25 * torch.randn(inputs[n].shape[0], 96).double() for n in ("x", "y")}
    assert cases.disagreements(OP, inputs, backend, torch.float16, device=device_for("sample", backend)) == []


@on_every_kernel
def test_more_similarities_than_32_bits_count(backend, device_for):
    """The first rows, the last ones and some between are those of a small problem."""
    device, side = device_for("sample", backend), 46_400  # its square is more than 2^31
    x = torch.randn(side, 2, generator=torch.Generator().manual_seed(0)).to(device)
    labels, seed = torch.arange(side, device=device), torch.tensor(11, device=device)
    index = sample(x, x, labels, labels, seed, backend=backend)
    for i in (0, 7, side // 2, side - 2, side - 1):
        weight = reference.log_weight(2 - 2 * unit_rows(x.double()) @ unit_rows(x[i].double()), 2)
        number = weight - reference.exponentials(i, 1, side, seed, torch.float64)[0].log()
        number[i] = -torch.inf
        torch.testing.assert_close(number[index[i]], number.max(), rtol=0, atol=1e-4)
