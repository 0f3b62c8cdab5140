// The threads of a parallel region share its loops piece by piece, and wait for pieces, not for each other: a thread
// whose core another process has taken holds up what needs the piece that it has begun, no more, and comes in where
// the others are by then. Who has to wait goes to sleep: a thread that spins for long keeps its core from those that
// work. So OpenMP starts and ends a region, and its own loops and barriers, which spin, are not used.
#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <initializer_list>
#include <mutex>

#include "buffer.h"
#include "threads.h"

namespace fused_margins {
namespace FM_ISA {

// Pieces of an item, the same number for each of them; in_order: of one item after the other.
struct Stage {
  int64_t pieces;
  bool in_order;
};

class Team {
 public:
  static constexpr int64_t MOST_AHEAD = 64;
  static constexpr int SPIN_US = 1000;  // longer than most pieces take, shorter than a core is taken for

  // f(team), on every thread. The pieces that a thread gets are ascending in a loop of one stage.
  template <class F>
  static void run(int threads, F f) {
    Shared shared;
#pragma omp parallel num_threads(threads)
    f(Team(shared));
  }

  // f(i) for i < count, `together` of them a piece. Like all loops it is to be called by every thread with the same
  // arguments, and when it returns everything is done.
  template <class F>
  void each(int64_t count, int64_t together, F f) {
    pipeline(1, 1, {{ceil_div(count, together), false}}, [&](int, int64_t, int64_t, int64_t piece) {
      for (int64_t i = piece * together; i < std::min(count, (piece + 1) * together); ++i) f(i);
    });
  }

  // f(stage, item, slot, piece) for all stages of every item: a stage of an item begins when the one before is done.
  // Up to `ahead` items (MOST_AHEAD) are under way, each in a slot < ahead; the latest stages come first.
  template <class F>
  void pipeline(int64_t items, int64_t ahead, std::initializer_list<Stage> stages, F f) {
    for (const Stage& stage : stages)
      if (!stage.pieces || !items) return;
    const int64_t loop = loop_++;
    for (Piece piece; shared_.next(loop, items, ahead, stages, piece);) f(piece.stage, piece.item, piece.slot, piece.i);
  }

 private:
  struct Piece {
    int stage = -1;
    int64_t item, slot, i;
  };

  class Shared {
   public:
    // Whether there is a piece to do, after the one before has been done.
    bool next(int64_t loop, int64_t items, int64_t ahead, std::initializer_list<Stage> stages, Piece& piece) {
      std::unique_lock<std::mutex> lock(mutex_, std::defer_lock);
      for (int i = 0; i < 100 && !lock.owns_lock();) lock.try_lock() ? void() : void(++i);
      if (!lock.owns_lock()) lock.lock();
      if (piece.stage >= 0) finish(stages.begin()[piece.stage].pieces, piece);
      for (; loop == loop_; wait(lock)) {
        if (!begun_) begin(items, ahead, stages);
        if (claim(stages.begin(), piece)) return true;
      }
      return false;
    }

   private:
    static constexpr int MOST_STAGES = 4;
    std::mutex mutex_;
    std::condition_variable changed_;
    std::atomic<int64_t> events_{0};  // stages of items that were finished
    int64_t loop_ = 0, sleepers_ = 0;
    bool begun_ = false;
    // Of the present loop. What is claimed next; and by place, the item modulo `ahead`: how many pieces of its items
    // are done, and the slot.
    int stages_;
    int64_t items_, ahead_, left_, free_;
    int64_t item_[MOST_STAGES], piece_[MOST_STAGES], done_[MOST_STAGES][MOST_AHEAD], slot_[MOST_AHEAD];
    int64_t free_slots_[MOST_AHEAD];  // those given back last are taken first: they are in the caches

    void begin(int64_t items, int64_t ahead, std::initializer_list<Stage> stages) {
      begun_ = true, stages_ = int(stages.size()), items_ = left_ = items, ahead_ = free_ = ahead;
      for (int64_t i = 0; i < ahead; ++i) free_slots_[i] = ahead - 1 - i;
      for (int s = 0; s < stages_; ++s) {
        item_[s] = piece_[s] = 0;
        std::fill_n(done_[s], ahead, int64_t(0));
      }
    }

    bool is_done(const Stage* stages, int s, int64_t item) const {
      return item < 0 || done_[s][item % ahead_] >= (item / ahead_ + 1) * stages[s].pieces;
    }

    bool claim(const Stage* stages, Piece& piece) {
      for (int s = stages_ - 1; s >= 0; --s) {
        const int64_t item = item_[s];
        if (item == items_) continue;
        if (piece_[s] == 0) {
          if (s ? !is_done(stages, s - 1, item) : !is_done(stages, stages_ - 1, item - ahead_)) continue;
          if (stages[s].in_order && !is_done(stages, s, item - 1)) continue;
          if (s == 0) slot_[item % ahead_] = free_slots_[--free_];
        }
        piece = {s, item, slot_[item % ahead_], piece_[s]++};
        if (piece_[s] == stages[s].pieces) piece_[s] = 0, ++item_[s];
        return true;
      }
      return false;
    }

    void finish(int64_t pieces, const Piece& piece) {
      if (++done_[piece.stage][piece.item % ahead_] != (piece.item / ahead_ + 1) * pieces) return;
      if (piece.stage + 1 == stages_) {
        free_slots_[free_++] = piece.slot;
        if (--left_ == 0) ++loop_, begun_ = false;
      }
      events_.fetch_add(1);
      if (sleepers_) changed_.notify_all();
    }

    void wait(std::unique_lock<std::mutex>& lock) {
      using Clock = std::chrono::steady_clock;
      const int64_t seen = events_;
      lock.unlock();
      for (const auto end = Clock::now() + std::chrono::microseconds(SPIN_US); events_ == seen && Clock::now() < end;) {
      }
      lock.lock();
      ++sleepers_;
      changed_.wait(lock, [&] { return events_ != seen; });
      --sleepers_;
    }
  };

  Shared& shared_;
  int64_t loop_ = 0;

  explicit Team(Shared& shared) : shared_(shared) {}
};

}  // namespace FM_ISA
}  // namespace fused_margins
