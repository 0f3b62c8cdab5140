"""The most that this machine's cores can multiply and add: a loop of nothing else, compiled for them.

    python -m benchmarks.peak [--threads 1] [--seconds 10]

says what of it a margin softmax reaches, float32, forward and backward with all that Python and autograd take, counted
as three products, by the fastest of many calls in a row. Half of a core may be somebody else's, in a virtual machine
above all: a call then takes up to 1.7 times as long, while the loop, which asks nothing of caches, hardly notices. The
fastest twentieth of the calls had the core to themselves; the tables' medians are of all.
"""

import argparse
import functools
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

import torch

from fused_margins.functional import margin_softmax_loss

SIZES = [(256, 512, 64), (256, 1600, 200), (1024, 128, 1000), (128, 512, 10_000), (512, 512, 20_000)]  # B, D, C
SHARES = {"fastest": 0.0, "5% of calls": 0.05, "a quarter": 0.25, "half": 0.5}

# As many sums as hide an instruction's latency; 2 x 16 x 64 bytes of registers at most are in use.
SOURCE = r"""
#include <chrono>
#include <cstdio>
#if defined(__AVX512F__)
constexpr int BYTES = 64, SUMS = 24;
#elif defined(__AVX__)
constexpr int BYTES = 32, SUMS = 12;
#else
constexpr int BYTES = 16, SUMS = 24;
#endif
typedef float Vector __attribute__((vector_size(BYTES)));
constexpr long ROUNDS = 4'000'000;

int main() {
  Vector sums[SUMS] = {}, by = Vector{} + 0.999f, more = Vector{} + 1e-3f;
  double best = 0;
  for (int turn = 0; turn < 9; ++turn) {
    const auto start = std::chrono::steady_clock::now();
    for (long round = 0; round < ROUNDS; ++round) {
#pragma GCC unroll 24
      for (int i = 0; i < SUMS; ++i) sums[i] = sums[i] * by + more;
    }
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
    const double rate = 2e-9 * ROUNDS * SUMS * (BYTES / sizeof(float)) / seconds.count();
    if (rate > best) best = rate;
  }
  float total = 0;
  for (const Vector& sum : sums) total += sum[0];
  std::printf("%.2f %g\n", best, total);  // the sum keeps the loop alive
}
"""


@functools.cache
def _program() -> Path | None:
    """The compiled loop; None where nothing compiles it."""
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        return None
    folder = Path(tempfile.mkdtemp())
    (folder / "peak.cpp").write_text(SOURCE)
    options = ["-O3", "-march=native", "-ffp-contract=fast", "-std=c++17"]
    done = subprocess.run([compiler, *options, "peak.cpp", "-o", "peak"], cwd=folder, capture_output=True)
    return folder / "peak" if done.returncode == 0 else None


def peak_gflops(threads: int) -> float | None:
    """Of float32, GFLOP/s of so many cores at once, the best of nine turns of each; None where nothing compiles it."""
    program = _program()
    if program is None:
        return None
    started = [subprocess.Popen([program], stdout=subprocess.PIPE, text=True) for _ in range(threads)]
    return sum(float(process.communicate()[0].split()[0]) for process in started)


def call_seconds(size: tuple[int, int, int], seconds: float) -> list[float]:
    """Of calls of one size, one after the other for so long, 20 at least; in ascending order, without the first."""
    rows, width, columns = size
    x, weight = torch.randn(rows, width, requires_grad=True), torch.randn(columns, width, requires_grad=True)
    labels = torch.randint(columns, (rows,))
    taken: list[float] = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(taken) < 21:
        x.grad = weight.grad = None
        start = time.perf_counter()
        margin_softmax_loss(x, weight, labels, scale=30.0, margin=-0.02).backward()
        taken.append(time.perf_counter() - start)
    return sorted(taken[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=10, help="of calls, each size")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    print(f"| B x D x C | calls | peak, GFLOP/s | {' | '.join(SHARES)} |\n|---|{'--:|' * (2 + len(SHARES))}")
    for size in SIZES:
        taken, peak = call_seconds(size, options.seconds), peak_gflops(options.threads)
        if peak is None:
            raise SystemExit("error: no compiler (g++ or clang++) for the loop that tells the peak")
        rows, width, columns = size
        best = 6e-9 * rows * width * columns / peak  # seconds of three products
        reached = [f"{best / taken[int(share * len(taken))]:.0%}" for share in SHARES.values()]
        print(f"| {rows} x {width} x {columns} | {len(taken)} | {peak:.0f} | {' | '.join(reached)} |", flush=True)


if __name__ == "__main__":
    main()
