"""How far a number of ranks goes: memory, bytes and time of a step of the sharded margin softmax, before anything runs.

The model, for W ranks with n rows each (B = W n), C classes of width D in vectors of e bytes, C_r = ceil(C / W):

    memory      weight, gradient and optimizer state 4 C_r D (2 + k) bytes, k 1 (SGD with momentum) or 2 (AdamW); with a
                sample of S rows 4 D ((1 + k) C_r + (2 + k) S), S = rate C_r + the positives' B / W; rows of all ranks
                B D (e + a + e), a = max(e, 4), and what the op saves, which it says itself; or, where that is more, the
                optimizer's temporaries 4 D S t bytes, t 0 or 2 (S = C_r without a sample): the one is there in the
                forward and the backward, the other in the optimizer's step
    bytes       handed over by a rank, independent of C: 16 of the header, 8 n of labels, n D e of rows, 3 B a of
                the combination, and B D a of gradients
    time        8 B S D / (operations a second) + what the host needs + the bytes over the links, where ring algorithms
                send (W - 1) / W of what is gathered or scattered and twice that of what is reduced; and the optimizer,
                4 S D (3 + 2 k) bytes of memory read and written

Bytes are exact, memory is but for the allocator, the backbone and the hashes of a sample (about 50 bytes a class of the
rank): a test holds it against the peak of a process. Time is a prediction: on the CPU where it was checked
(``python -m tests.distributed.planned``) steps of 1 and 2 ranks took 0.88 to 1.14 of it; on GPUs nobody has checked.
Without the library, as Partial FC does it, the logits and their gradient of B S float32 entries exist as well; such a
step has three products instead of four and goes 17 times over a matrix of B S: the cosines written, scale and margin
read and written, the log-softmax read and written, and in the backward 10 for the gradients of these. A prediction.

    python -m fused_margins.distributed.plan --classes 100000000 --embedding-size 512 --ranks 256 --batch 128
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import math
import os
import sys
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from ..backends import registry
from ..core import checks
from ..functional import margin_softmax_loss
from ..ops.contrast.op import contrast

OPTIMIZERS = {"sgd": (1, 0), "adamw": (2, 2)}  # numbers that are kept of each weight, and made of it in a step
HEADER, LABEL, COMBINED = 16, 8, 3  # bytes of a rank, bytes of a row, numbers of a row of all ranks
PASSES = 17  # over a matrix of rows and classes, of a step that makes one
SHARE = 0.8  # of the memory of a device, that a loss may take beside its backbone
_ROWS, _SAVED, _TEMPORARIES = (
    "rows of all ranks, their gradient",
    "saved by the forward",
    "temporaries of the optimizer",
)
RATES = (0.5, 0.2, 0.1, 0.05, 0.02, 0.01)


@dataclasses.dataclass(frozen=True)
class Device:
    """What a rank runs on.

    memory: bytes. bandwidth, link, network: bytes a second, of memory, within a node and beyond. operations: a second.
    host: seconds a step. ranks_of_node: 0 for this machine's CPU.

    source: where the figures are from, and which of them are predictions.
    """

    memory: float
    bandwidth: float
    operations: float
    host: float
    link: float
    network: float
    ranks_of_node: int
    dtype: torch.dtype
    source: str


DEVICES = {
    "h200": Device(
        141e9, 4.8e12, 4.77e14, 1.3e-3, 3.6e11, 4.5e10, 8, torch.bfloat16,
        "operations and host as measured at 1024 x 512 x 100,000 (0.88 ms of kernels, 2.2 ms a call); links: predicted",
    ),
    "a100": Device(80e9, 2.0e12, 1.5e14, 1.3e-3, 2.4e11, 2.2e10, 8, torch.bfloat16, "a prediction"),
}  # fmt: skip


class Plan(NamedTuple):
    """Of each rank.

    rows: classes that a step works on. memory: bytes by what holds them. sent: bytes handed over in a step. seconds: of
    a step, by what takes them. without, seconds_without: bytes of the matrices that a loss without the kernels makes,
    and seconds of its step.
    """

    classes: int
    rows: int
    memory: dict[str, int]
    sent: dict[str, int]
    seconds: dict[str, float]
    without: int
    seconds_without: float

    @property
    def peak(self) -> int:
        """Bytes at once: what the step of the optimizer makes is not there while rows are."""
        passing = self.memory[_ROWS] + self.memory[_SAVED]
        return sum(self.memory.values()) - min(passing, self.memory[_TEMPORARIES])

    def fits(self, device: Device) -> bool:
        """Whether the peak is within the share of the device's memory that a loss may take."""
        return self.peak <= SHARE * device.memory


def plan(
    num_classes: int,
    embedding_size: int,
    ranks: int,
    batch: int,
    device: Device,
    *,
    rate: float = 1.0,
    optimizer: str = "sgd",
    equal_batches: bool = False,
) -> Plan:
    """Memory, bytes and time of a step of `ShardedMarginSoftmaxLoss` on each rank.

    Args:
        num_classes: C. embedding_size: D. ranks: W. batch: n, rows of a rank.
        device: one of `DEVICES`, or what `measured` says of this machine.
        rate: of classes that are sampled. optimizer: "sgd" (with momentum) or "adamw".
        equal_batches: as for the loss: without the header.

    Raises:
        ValueError, TypeError: numbers that are none of these.

    >>> from fused_margins.distributed.plan import DEVICES, plan
    >>> of_rank = plan(100_000_000, 512, 256, 128, DEVICES["h200"], rate=0.1)
    >>> of_rank.classes, of_rank.sent["rows"]
    (390625, 131072)
    """
    num_classes, width, ranks, batch = _sizes(num_classes, embedding_size, ranks, batch)
    if not 0 < checks.number("rate", rate) <= 1:
        raise ValueError(f"rate: expected a number in (0, 1], got {rate}")
    checks.one_of("optimizer", optimizer, tuple(OPTIMIZERS))
    kept, made = OPTIMIZERS[optimizer]
    everyone, classes, entry = ranks * batch, math.ceil(num_classes / ranks), device.dtype.itemsize
    rows = classes if rate == 1 else min(classes, math.ceil(rate * classes + everyone / ranks))
    of_weight, number = 4 * classes * width, max(entry, 4)
    memory = {"weight": of_weight, "optimizer state": kept * of_weight}
    if rate == 1:
        memory["gradient of the weight"] = of_weight
    else:
        memory["sampled rows, their gradient and state"] = (2 + kept) * 4 * rows * width
    memory[_ROWS] = everyone * width * (2 * entry + number)
    memory[_SAVED] = _saved(everyone, rows, width, device)
    memory[_TEMPORARIES] = made * 4 * rows * width
    sent = {} if equal_batches else {"header": HEADER}
    sent |= {
        "labels": LABEL * batch,
        "rows": batch * width * entry,
        "log-sum-exps and positives": COMBINED * number * everyone,
        "gradients of rows": number * everyone * width,
    }
    seconds = _seconds(everyone, rows, width, ranks, device, sent)
    seconds["optimizer"] = 4.0 * rows * width * (3 + 2 * kept) / device.bandwidth
    matrix = 4 * everyone * rows
    without = sum(seconds.values()) - seconds["products"] / 4 + PASSES * matrix / device.bandwidth
    return Plan(classes, rows, memory, sent, seconds, 2 * matrix, without)


def _sizes(num_classes: int, embedding_size: int, ranks: int, batch: int) -> tuple[int, ...]:
    sizes = {"num_classes": num_classes, "embedding_size": embedding_size, "ranks": ranks, "batch": batch}
    return tuple(checks.integer(name, size, 1) for name, size in sizes.items())


def _saved(rows: int, columns: int, width: int, device: Device) -> int:
    """Bytes that the op says its forward saves; as Triton's kernels do it on a GPU, which the C++ ones do on a CPU."""
    name = "cpu" if device.ranks_of_node == 0 and registry.has_kernel("contrast", "cpu") else "triton"
    kernel = registry.kernel("contrast", name)
    a = contrast.example(rows, columns, width, device.dtype)
    needs = [n in ("x", "y") for n, f in contrast.fields.items() if f.differentiable]
    itemsize = torch.promote_types(device.dtype, torch.float32).itemsize
    return int(kernel.saved_size(a, kernel.plan(a, needs))) * itemsize


def _seconds(
    everyone: int, rows: int, width: int, ranks: int, device: Device, sent: dict[str, int]
) -> dict[str, float]:
    """By what takes them: four products, as the backward makes the similarities again; the host; the links."""
    share = (ranks - 1) / ranks
    link = device.link if ranks <= max(1, device.ranks_of_node) else device.network
    gathered = ranks * (sent["labels"] + sent["rows"]) + sent["gradients of rows"]
    on_the_way = share * (gathered + 2 * sent["log-sum-exps and positives"])
    return {
        "products": 8.0 * everyone * rows * width / device.operations,
        "host": device.host,
        "links": on_the_way / link if ranks > 1 else 0.0,
    }


def measured(embedding_size: int, rows: int, seconds: float = 1.0, classes: int = 8192) -> Device:
    """This machine's CPU: what a loss of some classes takes gives the operations; links are memory, as gloo's are here.

    Args:
        embedding_size: D. rows: B of all ranks. seconds: to measure for. classes: of the loss that is timed.
    """
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, embedding_size, generator=generator).requires_grad_()
    weight = torch.randn(classes, embedding_size, generator=generator).requires_grad_()
    labels = torch.arange(rows) % classes

    def once(part: int) -> float:
        start = time.perf_counter()
        torch.autograd.grad(margin_softmax_loss(x, weight[:part], labels % part), (x, weight))
        return time.perf_counter() - start

    def median(part: int) -> float:
        end = time.perf_counter() + seconds / 2
        times: list[float] = []
        while len(times) < 3 or time.perf_counter() < end:
            times.append(once(part))
        return sorted(times)[len(times) // 2]

    # Two sizes tell what each class takes from what each call does.
    few, many = classes // 8, classes
    fast, slow = median(few), median(many)
    operations = 8.0 * rows * embedding_size * (many - few) / max(slow - fast, 1e-9)
    host = max(fast - 8.0 * rows * embedding_size * few / operations, 0.0)
    told = f"measured here with {torch.get_num_threads()} threads; links as fast as gloo's over memory: a prediction"
    source, copy = torch.zeros(2**26, dtype=torch.uint8), torch.zeros(2**26, dtype=torch.uint8)
    start = time.perf_counter()
    for _ in range(8):
        copy.copy_(source)
    bandwidth = 8 * 2 * copy.numel() / (time.perf_counter() - start)
    return Device(_memory_here(), bandwidth, operations, host, 1e9, 1e9, 0, torch.float32, told)


def _memory_here() -> float:
    try:
        return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    except (AttributeError, OSError, ValueError):
        return math.inf


def ways_out(asked: dict[str, Any], device: Device) -> list[dict[str, Any]]:
    """Changes of what was asked for with which a plan made anew fits: the least of each kind, or of two at once.

    Args:
        asked: arguments of `plan` by name, all but the device.
    """
    changes: dict[str, list[Any]] = {
        "optimizer": ["sgd"] if asked["optimizer"] != "sgd" else [],
        "rate": [rate for rate in RATES if rate < asked["rate"]],
        "ranks": [asked["ranks"] * 2**i for i in range(1, 11)],
        "batch": [asked["batch"] // 2**i for i in range(1, 11) if asked["batch"] >= 2**i],
    }
    for number in (1, 2):
        found: list[dict[str, Any]] = []
        for names in itertools.combinations(changes, number):
            tried = (dict(zip(names, values)) for values in itertools.product(*(changes[name] for name in names)))
            found += itertools.islice((c for c in tried if plan(**(asked | c), device=device).fits(device)), 1)
        if found:
            return found
    return []


def advice(of_rank: Plan, device: Device, asked: dict[str, Any]) -> str:
    """Whether it fits, or what to change."""
    limit = f"{_bytes(SHARE * device.memory)}, which are {SHARE:.0%} of {_bytes(device.memory)}"
    need = f"{_bytes(of_rank.peak)} of {limit}"
    if of_rank.fits(device):
        return f"It fits: {need}, beside which the backbone has to live."
    ways = [" ".join(f"--{name} {value}" for name, value in way.items()) for way in ways_out(asked, device)]
    change = (
        f"It would with {', or with '.join(ways)}" if ways else "No rate, ranks and batch make it: narrower vectors"
    )
    return f"It does not fit: {need}. {change}."


def report(of_rank: Plan, device: Device, asked: dict[str, Any]) -> str:
    """The plan as a page of text."""
    classes = f"holds {of_rank.classes:,} classes and works on {of_rank.rows:,} of them a step."
    lines = [f"Each of {asked['ranks']} ranks {classes}", ""]
    for title, total, values, unit in (
        ("Memory, at most at once", of_rank.peak, of_rank.memory, _bytes),
        ("Sent in a step", sum(of_rank.sent.values()), of_rank.sent, _bytes),
        ("Time of a step", sum(of_rank.seconds.values()), of_rank.seconds, _time),
    ):
        lines.append(f"{title:44}{unit(total):>12}")
        lines += [f"  {name:42}{unit(value):>12}" for name, value in values.items()]
    lines.append(f"{'Without the kernels, more memory':44}{_bytes(of_rank.without):>12}")
    lines += [f"{'Without the kernels, time of a step':44}{_time(of_rank.seconds_without):>12}", ""]
    lines += [f"Time: {device.source}.", advice(of_rank, device, asked)]
    return "\n".join(lines)


def _bytes(count: float) -> str:
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count:.0f} B"


def _time(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.2f} ms"


def main(arguments: Sequence[str] | None = None) -> int:
    """The command: prints a plan, 0 where it fits."""
    parser = argparse.ArgumentParser(
        prog="fused-margins plan", description="Memory, bytes and time of margin softmax over classes on many ranks."
    )
    parser.add_argument("--classes", dest="num_classes", type=int, required=True, help="of all ranks together")
    parser.add_argument("--embedding-size", type=int, default=512)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--batch", type=int, default=128, help="rows of each rank")
    parser.add_argument("--device", choices=[*DEVICES, "cpu"], default="h200", help="cpu: this machine, measured")
    parser.add_argument("--rate", type=float, default=1.0, help="of classes that a step samples")
    parser.add_argument("--optimizer", choices=list(OPTIMIZERS), default="sgd", help="sgd has momentum")
    options = parser.parse_args(arguments)
    try:
        asked = {name: value for name, value in vars(options).items() if name != "device"}
        _sizes(*(asked[name] for name in ("num_classes", "embedding_size", "ranks", "batch")))  # before any is measured
        device = DEVICES.get(options.device) or measured(options.embedding_size, options.ranks * options.batch)
        of_rank = plan(**asked, device=device)
    except (TypeError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(report(of_rank, device, asked))
    return 0 if of_rank.fits(device) else 1


if __name__ == "__main__":
    sys.exit(main())
