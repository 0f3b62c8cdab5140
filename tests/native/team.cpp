// What csrc/cpu/team.h promises, in deadlocks: run with a time limit, and with two threads or more.
#define FM_ISA baseline
#include "../../csrc/cpu/team.h"

#include <cstdio>
#include <cstdlib>
#include <thread>
#include <vector>

using namespace fused_margins::baseline;

namespace fused_margins {
int max_threads() {
  return omp_get_max_threads();
}
}  // namespace fused_margins

void must(bool holds, const char* what) {
  if (holds) return;
  std::puts(what);
  std::exit(1);
}
template <class F>
void wait_until(F holds) {
  while (!holds()) std::this_thread::yield();
}

int main() {
  const int threads = fused_margins::max_threads();
  must(threads > 1, "two threads are needed");

  // Who comes late misses what the others have done without it.
  std::atomic<int> loops{0}, runs{0};
  Team::run(threads, [&](Team team) {
    if (thread_index() > 0) wait_until([&] { return loops == 3; });
    for (int loop = 0; loop < 3; ++loop) {
      team.each(10, 3, [&](int64_t) { ++runs; });
      if (thread_index() == 0) ++loops;
    }
    team.each(0, 1, [&](int64_t) { must(false, "a loop of nothing"); });
    team.each(5, 1, [&](int64_t) { ++runs; });
    must(runs == 35, "after a loop everything is done");
  });

  // While one piece takes for ever, the others go as far ahead as they may, and no further; order and slots hold.
  constexpr int64_t items = 50, ahead = 4, pieces[] = {2, 3, 2};
  std::vector<std::atomic<int64_t>> done(3 * items);
  std::vector<std::atomic<int64_t>> owner(ahead);
  std::atomic<int64_t> latest{0};
  Team::run(threads, [&](Team team) {
    team.pipeline(items, ahead, {{pieces[0], false}, {pieces[1], false}, {pieces[2], true}},
                  [&](int stage, int64_t item, int64_t slot, int64_t piece) {
                    if (stage == 0 && piece == 0) {
                      if (item > latest) latest = item;
                      owner[size_t(slot)] = item;
                    }
                    if (stage == 0 && piece == 0 && item == 3)
                      wait_until([&] { return done[3 * 6] == pieces[0] && done[3 * 2 + 2] == pieces[2]; });
                    if (item == 3 && stage == 0) must(latest < 3 + ahead, "no more than `ahead` under way");
                    if (stage == 2 && piece == 0 && item == 10)
                      wait_until([&] { return done[3 * 13 + 1] == pieces[1]; });
                    if (stage > 0) must(owner[size_t(slot)] == item, "a slot is one item's");
                    if (stage > 0)
                      must(done[size_t(3 * item + stage - 1)] == pieces[stage - 1], "the stage before is done");
                    if (stage == 2 && item > 0) must(done[size_t(3 * item - 1)] == pieces[2], "items in order");
                    must(++done[size_t(3 * item + stage)] <= pieces[stage], "no piece twice");
                  });
    for (int64_t i = 0; i < 3 * items; ++i) must(done[size_t(i)] == pieces[i % 3], "every piece");
  });
  std::puts("passed");
}
