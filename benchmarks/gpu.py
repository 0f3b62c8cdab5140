"""What a GPU takes for our losses, and for what people use instead: ``python -m benchmarks.gpu`` where there is one.

As everywhere here: the same inputs in one process, correctness first (no figure for a contestant whose gradients are
wrong), then turns, round by round, and medians. Two times are taken of every contestant: that of a call as a program
sees it, which ends when the GPU is done, and, where the calls can be captured in a CUDA graph, that of a replay, which
is what the GPU itself needs. Peak memory is what a call adds to what was allocated before it.

Results go to ``benchmarks/results/<gpu>/results.json``; ``--readme`` writes the README's table from them.
"""

import gc
import importlib
import importlib.util
import json
import re
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fused_margins.functional import cluster_distances, magnet_loss, margin_softmax_loss, mine_negatives, mine_positives
from fused_margins.ops import registry
from fused_margins.ops.nearest import nearest

from .timing import take_turns

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "benchmarks" / "results"
Step = Callable[[], tuple[Tensor, ...]]
SCALE, MARGIN = 30.0, 0.35
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 1e-2}  # root mean square, relative: of ours
PEER_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.1}  # of a peer, which rounds where it likes


def _gradients(loss: Callable[..., Tensor], *leaves: Tensor) -> Step:
    def step() -> tuple[Tensor, ...]:
        value = loss(*leaves)
        return value.detach(), *torch.autograd.grad(value, leaves)

    return step


def _randn(*shape: int, dtype: torch.dtype) -> Tensor:
    """Slice by slice, for a float32 copy of the largest would be in the way."""
    out = torch.empty(shape, dtype=dtype, device="cuda")
    for part in out.split(1 << 17):
        part.normal_()
    return out


def margin_softmax(
    rows: int, width: int, classes: int, dtype: torch.dtype
) -> tuple[dict[str, Step], Callable[..., Any]]:
    x, w = (_randn(n, width, dtype=dtype).requires_grad_() for n in (rows, classes))
    labels = torch.randint(classes, (rows,), device="cuda")

    def eager(x: Tensor, w: Tensor, margin: float = MARGIN) -> Tensor:
        z = F.linear(SCALE * F.normalize(x), F.normalize(w))
        z = z.scatter_add(1, labels[:, None], z.new_full((1, 1), -SCALE * margin).expand(rows, 1))
        return F.cross_entropy(z, labels)

    def ours(x: Tensor, w: Tensor, backend: str = "auto") -> Tensor:
        return margin_softmax_loss(x, w, labels, scale=SCALE, margin=MARGIN, backend=backend)

    steps = {"eager": _gradients(eager, x, w), "torch.compile": _gradients(torch.compile(eager, dynamic=False), x, w)}
    problem = registry.Problem("margin_softmax", "cuda", dtype, rows, classes, width)
    for backend in ("cuda", "triton"):
        row = next(b for b in registry.BACKENDS if b.name == backend)
        if registry.refusal(row, problem) is None:
            steps[f"ours: {backend}"] = _gradients(lambda x, w, b=backend: ours(x, w, b), x, w)
    # Without a margin, which they do not have; both sides are normalised for them within their time.
    if importlib.util.find_spec("cut_cross_entropy"):
        cut = importlib.import_module("cut_cross_entropy").linear_cross_entropy
        steps["cut-cross-entropy"] = _gradients(
            lambda x, w: cut(SCALE * F.normalize(x), F.normalize(w), labels).float(), x, w
        )
    if importlib.util.find_spec("liger_kernel"):
        module = importlib.import_module("liger_kernel.ops.fused_linear_cross_entropy")
        liger = module.LigerFusedLinearCrossEntropyFunction
        steps["Liger-Kernel"] = _gradients(
            lambda x, w: liger.apply(SCALE * F.normalize(x), F.normalize(w), labels)[0], x, w
        )

    truths = {m: _softmax_truth(x.detach(), w.detach(), labels, m) for m in (MARGIN, 0.0)}

    def judge(name: str, got: tuple[Tensor, ...]) -> str:
        truth = truths[0.0 if name in ("cut-cross-entropy", "Liger-Kernel") else MARGIN]
        granted = (TOLERANCE if name.startswith("ours") else PEER_TOLERANCE)[dtype]
        for what, a, b in zip(("loss", "gradient of x", "gradient of w"), got, truth):
            error = float((a.float() - b).norm() / b.norm())
            if not error <= granted:
                return f"{what}: relative error {error:.2g}, granted {granted:g}"
        return ""

    return steps, judge


def _softmax_truth(x: Tensor, w: Tensor, labels: Tensor, margin: float) -> tuple[Tensor, Tensor, Tensor]:
    """Loss and gradients in float32, in blocks of classes, by their formulas: in float64 it would take minutes."""
    rows = x.shape[0]
    length = x.float().norm(dim=1, keepdim=True)
    unit = x.float() / length
    blocks = list(w.split(1 << 16))

    def logits(n: int) -> tuple[Tensor, Tensor, Tensor]:
        block = blocks[n].float()
        block_length = block.norm(dim=1, keepdim=True)
        block = block / block_length
        z = SCALE * (unit @ block.T)
        mine = labels - n * (1 << 16)
        here = ((mine >= 0) & (mine < len(block))).nonzero()[:, 0]
        z[here, mine[here]] -= SCALE * margin
        own = torch.zeros_like(z)
        own[here, mine[here]] = 1
        return z, own, block / 1.0

    lse = torch.full((rows,), -torch.inf, device="cuda")
    z_own = torch.zeros(rows, device="cuda")
    for n in range(len(blocks)):
        z, own, _ = logits(n)
        lse = torch.logaddexp(lse, z.logsumexp(1))
        z_own += (z * own).sum(1)
    of_unit, of_w = torch.zeros_like(unit), []
    for n in range(len(blocks)):
        z, own, block = logits(n)
        g = ((z - lse[:, None]).exp() - own) * (SCALE / rows)
        of_unit += g @ block
        t = g.T @ unit
        of_w.append((t - block * (t * block).sum(1, keepdim=True)) / blocks[n].float().norm(dim=1, keepdim=True))
    of_x = (of_unit - unit * (of_unit * unit).sum(1, keepdim=True)) / length
    return (lse - z_own).mean(), of_x, torch.cat(of_w)


def positives(rows: int, width: int, samples: int, dtype: torch.dtype) -> tuple[dict[str, Step], Callable[..., Any]]:
    x = _randn(rows, width, dtype=dtype)
    labels = (torch.arange(rows, device="cuda") // samples)[torch.randperm(rows, device="cuda")]

    def eager() -> tuple[Tensor, ...]:
        unit = F.normalize(x.float())
        distance = torch.cdist(unit, unit)
        distance.masked_fill_(labels[:, None] != labels, torch.inf).fill_diagonal_(torch.inf)
        return (distance.argmin(1),)

    steps: dict[str, Step] = {"eager": eager}
    for backend in ("cuda", "triton"):
        steps[f"ours: {backend}"] = lambda b=backend: (mine_positives(x, labels, backend=b)[1],)
    unit = F.normalize(x.double())
    u = (unit @ unit.T).masked_fill_(labels[:, None] != labels, -torch.inf).fill_diagonal_(-torch.inf)
    return steps, _judge_choice(u, dtype)


def negatives(rows: int, width: int, samples: int, dtype: torch.dtype) -> tuple[dict[str, Step], Callable[..., Any]]:
    x = _randn(rows, width, dtype=dtype)
    labels = torch.arange(rows, device="cuda") // samples

    def eager() -> tuple[Tensor, ...]:
        unit = F.normalize(x)
        return ((unit @ unit.T).masked_fill_(labels[:, None] == labels, -torch.inf).argmax(1),)

    steps: dict[str, Step] = {"eager": eager}
    steps["ours: triton"] = lambda: (mine_negatives(x, labels, backend="triton")[1],)
    unit = F.normalize(x.double())
    u = (unit @ unit.T).masked_fill_(labels[:, None] == labels, -torch.inf)
    return steps, _judge_choice(u, dtype)


def _judge_choice(u: Tensor, dtype: torch.dtype) -> Callable[..., Any]:
    best = u.amax(1)

    def judge(name: str, got: tuple[Tensor, ...]) -> str:
        lost = float((best - u.gather(1, got[0][:, None])[:, 0]).max())
        granted = 1e-5 if name.startswith("ours") else {torch.float32: 1e-3, torch.bfloat16: 0.02}[dtype]
        return "" if lost <= granted else f"a choice that is {lost:.2g} less similar than the best, granted {granted:g}"

    return judge


def magnet(clusters: int, samples: int, width: int, dtype: torch.dtype) -> tuple[dict[str, Step], Callable[..., Any]]:
    own = torch.arange(clusters * samples, device="cuda") % clusters
    classes = torch.arange(clusters, device="cuda") % 4
    centres = torch.randn(clusters, width, device="cuda")
    x = (centres[own] + 0.7 * torch.randn(len(own), width, device="cuda")).to(dtype).requires_grad_()

    def eager(x: Tensor) -> Tensor:
        x = x.float()
        belongs = (torch.arange(clusters, device="cuda")[:, None] == own).float()
        mu = (belongs @ x) / belongs.sum(1, keepdim=True)
        distance = x.square().sum(1, keepdim=True) + mu.square().sum(1) - 2 * x @ mu.T
        mine = distance.gather(1, own[:, None])[:, 0]
        variance = mine.sum() / (len(x) - 1)
        z = (-distance / (2 * variance)).masked_fill(classes[own][:, None] == classes, -torch.inf)
        return F.relu(1.0 + mine / (2 * variance) + z.logsumexp(1)).mean()

    steps = {"eager": _gradients(eager, x), "torch.compile": _gradients(torch.compile(eager, dynamic=False), x)}
    steps["ours: cuda"] = _gradients(lambda x: magnet_loss(x, own, classes, backend="cuda"), x)
    exact = x.detach().double().requires_grad_()
    truth = _gradients(lambda x: magnet_loss(x, own, classes, backend="reference"), exact)()

    def judge(name: str, got: tuple[Tensor, ...]) -> str:
        for a, b in zip(got, truth):
            error = float((a.double() - b).norm() / b.norm())
            if not error <= TOLERANCE[dtype]:
                return f"relative error {error:.2g}, granted {TOLERANCE[dtype]:g}"
        return ""

    return steps, judge


def clusters(rows: int, centres: int, width: int, dtype: torch.dtype) -> tuple[dict[str, Step], Callable[..., Any]]:
    x, y = _randn(rows, width, dtype=dtype), _randn(centres, width, dtype=dtype)
    nothing = torch.zeros(rows, dtype=torch.int64, device="cuda")

    def eager() -> tuple[Tensor, ...]:
        parts = x.split(1 << 17)
        return (torch.cat([(y.float().square().sum(1) - 2 * (part @ y.T).float()).argmin(1) for part in parts]),)

    options = {"relation": "any", "similarity": "negative_squared_euclidean", "backend": "triton"}
    steps: dict[str, Step] = {"eager": eager}
    steps["ours: triton"] = lambda: (nearest(x, y, nothing, nothing[:centres], **options)[1][:, 0],)
    some = torch.arange(0, rows, max(1, rows // 4096), device="cuda")
    distance = -cluster_distances(x[some].double(), y.double(), backend="reference")
    best = distance.amax(1)

    def judge(name: str, got: tuple[Tensor, ...]) -> str:
        lost = float((best - distance.gather(1, got[0][some][:, None])[:, 0]).max())
        granted = 1e-3 if name.startswith("ours") else 4.0
        return "" if lost <= granted else f"a choice that is {lost:.2g} farther than the nearest, granted {granted:g}"

    return steps, judge


UNCAPTURED = ("cut-cross-entropy", "Liger-Kernel")  # they wait for the GPU, which a capture forbids
BF16, FP32 = torch.bfloat16, torch.float32
ROWS: tuple[tuple[Callable[..., Any], str, tuple[int, int, int], torch.dtype], ...] = (
    (margin_softmax, "B x D x C", (256, 512, 64), BF16),
    (margin_softmax, "B x D x C", (256, 1600, 200), BF16),
    (margin_softmax, "B x D x C", (1024, 512, 10_000), BF16),
    (margin_softmax, "B x D x C", (1024, 512, 100_000), BF16),
    (margin_softmax, "B x D x C", (1024, 512, 1_000_000), BF16),
    (margin_softmax, "B x D x C", (256, 512, 64), FP32),
    (margin_softmax, "B x D x C", (1024, 512, 100_000), FP32),
    (positives, "B x D, samples a class", (8192, 512, 4), BF16),
    (negatives, "B x D, samples a class", (32_768, 512, 4), BF16),
    (magnet, "clusters x samples x D", (12, 4, 128), BF16),
    (magnet, "clusters x samples x D", (12, 16, 1024), BF16),
    (clusters, "rows x centres x D", (1_000_000, 4096, 128), BF16),
)


def _measure(name: str, step: Step, judge: Callable[..., str]) -> tuple[Step | None, dict[str, Any]]:
    """The step with the GPU waited for, and what is known before its turns."""
    try:
        fault = judge(name, step())
        if fault:
            return None, {"reason": f"wrong: {fault}"}
        torch.cuda.synchronize()
        gc.collect()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        torch.cuda.synchronize()
        figure: dict[str, Any] = {"extra_bytes": torch.cuda.max_memory_allocated() - before}
    except Exception as error:
        torch.cuda.empty_cache()
        return None, {"reason": f"{type(error).__name__}: {str(error).splitlines()[0][:150]}"}

    def waited() -> tuple[Tensor, ...]:
        result = step()
        torch.cuda.synchronize()
        return result

    return waited, figure


def _replay_ms(step: Step) -> float | None:
    """Median time of a replay of the captured step; None where it cannot be captured."""
    try:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
    except Exception:
        torch.cuda.synchronize()
        return None
    times = []
    for _ in range(15):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(5):
            graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / 5)
    del graph
    return statistics.median(times)


def measure() -> list[dict[str, Any]]:
    results = []
    for workload, symbols, size, dtype in ROWS:
        torch.compiler.reset()
        torch.manual_seed(0)
        gc.collect()
        torch.cuda.empty_cache()
        steps, judge = workload(*size, dtype)
        figures: dict[str, dict[str, Any]] = {}
        running = {}
        for name, step in steps.items():
            waited, figures[name] = _measure(name, step, judge)
            if waited is not None:
                running[name] = waited
        for name, times in take_turns(running, 0.4).items():
            figures[name]["call_ms"] = 1e3 * times.median
            figures[name]["rounds"] = len(times.seconds)
            captured = name not in UNCAPTURED
            figures[name]["replay_ms"] = _replay_ms(steps[name]) if captured else None
        name = str(dtype).removeprefix("torch.")
        results.append(
            {"workload": workload.__name__, "symbols": symbols, "size": size, "dtype": name, "figures": figures}
        )
        print(json.dumps(results[-1]), flush=True)
        del steps, judge, running, step
    return results


def _file() -> Path:
    name = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-")
    return FOLDER / name / "results.json"


def _versions() -> dict[str, str]:
    try:
        git = ["git", "rev-parse", "--short=10", "HEAD"]
        commit = subprocess.run(git, cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = "unknown"
    found = {"commit": commit, "torch": torch.__version__, "gpu": torch.cuda.get_device_name()}
    for package in ("triton", "cut_cross_entropy", "liger_kernel"):
        if importlib.util.find_spec(package):
            found[package] = getattr(importlib.import_module(package), "__version__", "installed")
    return found


def table(results: dict[str, Any]) -> str:
    """Markdown: a line for every row and contestant."""
    lines = ["| case | size | dtype | contestant | call ms | replay ms | extra MiB |", "|---|---|---|---|--:|--:|--:|"]
    for row in results["rows"]:
        case = f"{row['workload']} | {' x '.join(f'{n:,}' for n in row['size'])} | {row['dtype']}"
        for name, figure in row["figures"].items():
            if "call_ms" not in figure:
                lines.append(f"| {case} | {name} | {figure.get('reason', 'no figure')} | | |")
                continue
            replay = "-" if figure["replay_ms"] is None else f"{figure['replay_ms']:.3f}"
            lines.append(
                f"| {case} | {name} | {figure['call_ms']:.3f} | {replay} | {figure['extra_bytes'] / 2**20:,.0f} |"
            )
    versions = ", ".join(f"{name} {value}" for name, value in results["versions"].items())
    return "\n".join([*lines, "", f"{versions}."])


def write_readme() -> None:
    files = sorted(FOLDER.glob("*/results.json"))
    tables = "\n\n".join(table(json.loads(file.read_text(encoding="utf-8"))) for file in files) or "Not measured yet."
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8")
    pattern = re.compile(r"(<!-- gpu -->\n).*?(<!-- end gpu -->)", re.DOTALL)
    readme.write_text(pattern.sub(lambda m: m[1] + tables + "\n" + m[2], text), encoding="utf-8")


def main() -> None:
    if "--readme" in sys.argv:
        write_readme()
        return
    results = {"versions": _versions(), "rows": measure()}
    file = Path(sys.argv[1]) if len(sys.argv) > 1 else _file()
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_suffix(".part")
    temporary.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    temporary.replace(file)


if __name__ == "__main__":
    main()
