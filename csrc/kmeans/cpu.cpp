// k-means of each class apart: a thread takes a class from its seeds to its last iteration, while the class is in the
// cache. Every step is that of fused_margins/ops/kmeans/reference.py, in the same order; nothing depends on the number
// of threads.
#include "cpu.h"

#include <numeric>

#include "../cpu/pairs.h"
#include "../cpu/rows.h"
#include "../cpu/scratch.h"
#include "../cpu/team.h"

namespace fused_margins {
namespace FM_ISA {
namespace {

template <class T>
class Clustering {
 public:
  explicit Clustering(const Kmeans& args) : a_(args), x_(args.x, Similarity::dot, nullptr) {
    for (int64_t c = 0; c < a_.classes; ++c) {
      most_members_ = std::max(most_members_, members(c));
      most_clusters_ = std::max(most_clusters_, clusters(c));
    }
  }

  void run() {
    const int64_t width = a_.x.width, n = most_members_, k = most_clusters_;
    const int threads = thread_count(double(a_.x.rows) * double(k) * double(width) * double(a_.iterations + 1));
    Scratch<T> numbers(threads, n * k + k * width + (x_.readable() ? 0 : n * width));
    Scratch<int64_t> indices(threads, 2 * n + k);
    Scratch<const T*> pointers(threads, n + k);
    const auto one = [&](int64_t c) {
      Class cluster = {*this, c, numbers.mine(), indices.mine(), pointers.mine()};
      cluster.seed();
      cluster.assign();
      for (int64_t i = 0; i < a_.iterations && cluster.move(); ++i) {
      }
    };
    Team::run(threads, [&](Team team) { team.each(a_.classes, 1, one); });
  }

 private:
  const Kmeans& a_;
  Rows<T> x_;
  int64_t most_members_ = 0, most_clusters_ = 0;

  int64_t members(int64_t c) const { return a_.first_member[c + 1] - a_.first_member[c]; }
  int64_t clusters(int64_t c) const { return a_.first_cluster[c + 1] - a_.first_cluster[c]; }

  // One class: n members, k clusters.
  struct Class {
    const int64_t n, k, width;
    const int64_t* const names;  // (n,): rows of x
    const int64_t first_cluster;
    const double* const waiting;  // (k, rows of x)
    const int64_t waiting_stride;
    T* const centroids;          // (k, width)
    int64_t* const assignments;  // by row of x
    T* const squared;            // by row of x
    T *const distances, *const sums;
    int64_t *const own, *const farthest, *const counts;
    const T** const rows;     // (n,)
    const T** const centres;  // (k,)

    Class(const Clustering& all, int64_t c, T* numbers, int64_t* indices, const T** pointers)
        : n(all.members(c)),
          k(all.clusters(c)),
          width(all.a_.x.width),
          names(all.a_.members + all.a_.first_member[c]),
          first_cluster(all.a_.first_cluster[c]),
          waiting(all.a_.waiting),
          waiting_stride(all.a_.x.rows),
          centroids(static_cast<T*>(all.a_.centroids) + first_cluster * width),
          assignments(all.a_.assignments),
          squared(static_cast<T*>(all.a_.squared)),
          distances(numbers),
          sums(distances + n * k),
          own(indices),
          farthest(own + n),
          counts(farthest + n),
          rows(pointers),
          centres(rows + n) {
      for (int64_t i = 0; i < n; ++i) rows[i] = all.x_.row_of(names[i], sums + (k + i) * width);
      for (int64_t j = 0; j < k; ++j) centres[j] = centroids + j * width;
    }

    // k-means++: a race of waiting times, each divided by the squared distance from the nearest seed so far.
    void seed() {
      for (int64_t j = 0; j < k; ++j) {
        int64_t drawn = 0;
        double least = std::numeric_limits<double>::infinity();
        for (int64_t i = 0; i < n; ++i) {
          const double weight = j ? double(squared[names[i]]) : 1;
          const double time = waiting[j * waiting_stride + names[i]] / weight;  // infinite or NaN for a seed again
          if (time < least) least = time, drawn = i;
        }
        std::copy(rows[drawn], rows[drawn] + width, centroids + j * width);
        for (int64_t i = 0; i < n; ++i) {
          const T distance = squared_distance(rows[i], centres[j], width);
          T& nearest = squared[names[i]];
          nearest = j && nearest < distance ? nearest : distance;
        }
      }
    }

    // Every member to its nearest centroid, the lowest of equally near ones; false where nobody changes.
    bool assign(bool first = true) {
      bool changed = first;
      all_pairs(rows, n, centres, k, width, true, false, distances, k);
      for (int64_t i = 0; i < n; ++i) {
        const T* const to = distances + i * k;
        const int64_t nearest = std::min_element(to, to + k) - to;
        changed = changed || own[i] != nearest;
        own[i] = nearest;
        assignments[names[i]] = first_cluster + nearest;
        squared[names[i]] = to[nearest];
      }
      return changed;
    }

    // One iteration of Lloyd's; false where it changes no assignment.
    bool move() {
      std::fill(counts, counts + k, int64_t(0));
      std::fill(sums, sums + k * width, T(0));
      for (int64_t i = 0; i < n; ++i) {
        ++counts[own[i]];
        // Differences from the old centroid do not cancel, however far the data lie from the origin.
        T* const sum = sums + own[i] * width;
        const T* const centre = centres[own[i]];
#pragma omp simd
        for (int64_t d = 0; d < width; ++d) sum[d] += rows[i][d] - centre[d];
      }
      int64_t empty = 0;
      for (int64_t j = 0; j < k; ++j) {
        empty += counts[j] == 0;
        for (int64_t d = 0; d < width && counts[j]; ++d) centroids[j * width + d] += sums[j * width + d] / T(counts[j]);
      }
      if (empty) fill_empty(empty);
      return assign(false);
    }

    // The r-th empty cluster to the r-th farthest member.
    void fill_empty(int64_t empty) {
      std::iota(farthest, farthest + n, int64_t(0));
      std::partial_sort(farthest, farthest + empty, farthest + n, [&](int64_t i, int64_t j) {
        const T at_i = squared[names[i]], at_j = squared[names[j]];
        return at_i > at_j || (at_i == at_j && i < j);
      });
      const int64_t* next = farthest;
      for (int64_t j = 0; j < k; ++j)
        if (!counts[j]) std::copy(rows[*next], rows[*next] + width, centroids + j * width), ++next;
    }
  };
};

}  // namespace

void kmeans(const Kmeans& args) {
  args.x.dtype == DType::float64 ? Clustering<double>(args).run() : Clustering<float>(args).run();
}

}  // namespace FM_ISA
}  // namespace fused_margins
