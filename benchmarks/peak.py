"""The most that this machine's cores can multiply and add: a loop of nothing else, compiled for them."""

import functools
import shutil
import subprocess
import tempfile
from pathlib import Path

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
