// The Python module fused_margins._C: names, no logic. Memory arrives as addresses (0: null) of contiguous tensors or
// as a Matrix with strides; no torch header, so one build serves every torch release. The GIL is released while a
// kernel runs.
#include <pybind11/pybind11.h>

#include <string>

#include "common/checks.h"
#include "common/workspace.h"
#include "contrast/cpu.h"
#include "draw/cpu.h"
#include "kmeans/cpu.h"
#include "magnet/cpu.h"
#include "margin_softmax/cpu.h"
#include "nearest/cpu.h"
#include "scores/cpu.h"

namespace py = pybind11;
using namespace fused_margins;
using Address = uintptr_t;

namespace {

const void* in(Address a) {
  return reinterpret_cast<const void*>(a);
}
void* out(Address a) {
  return reinterpret_cast<void*>(a);
}
const int64_t* ints(Address a) {
  return reinterpret_cast<const int64_t*>(a);
}

ContrastInputs contrast_inputs(const Matrix& x, const Matrix& y, Address scale, bool scale_per_row, Address bias,
                               Address target, Address row_labels, Address column_labels, Address self_index,
                               const std::string& similarity, const std::string& relation, int64_t ignore_index) {
  return {x,
          y,
          in(scale),
          scale_per_row,
          in(bias),
          ints(target),
          ints(row_labels),
          ints(column_labels),
          ints(self_index),
          parse_similarity(similarity),
          parse_relation(relation),
          ignore_index};
}

ScoresInputs scores_inputs(const Matrix& x, const Matrix& y, Address scale, bool scale_per_row, Address bias,
                           Address margin, bool margin_per_row, Address target, const std::string& similarity,
                           int64_t ignore_index) {
  return {x,
          y,
          in(scale),
          scale_per_row,
          in(bias),
          in(margin),
          margin_per_row,
          ints(target),
          parse_similarity(similarity),
          ignore_index};
}

MarginSoftmaxInputs margin_softmax_inputs(const Matrix& x, const Matrix& y, Address scale, bool scale_per_row,
                                          Address margin, bool margin_per_row, Address target,
                                          const std::string& similarity, const Angle& angle, int64_t ignore_index,
                                          const std::string& reduction, bool with_mean, int64_t kept_blocks) {
  return {x,
          y,
          in(scale),
          scale_per_row,
          in(margin),
          margin_per_row,
          angle,
          ints(target),
          parse_similarity(similarity),
          ignore_index,
          parse_reduction(reduction),
          with_mean,
          kept_blocks};
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  using Release = py::call_guard<py::gil_scoped_release>;

  py::class_<Matrix>(m, "Matrix")
      .def(py::init([](Address data, int64_t rows, int64_t width, int64_t row_stride, int64_t column_stride,
                       int dtype) { return Matrix{in(data), rows, width, row_stride, column_stride, DType(dtype)}; }));

  py::class_<Workspace>(m, "Workspace", py::buffer_protocol())
      .def(py::init<int64_t, int64_t>())
      .def_buffer([](Workspace& w) { return py::buffer_info(static_cast<uint8_t*>(w.data()), w.bytes()); })
      .def_static("waiting_bytes", &Workspace::waiting_bytes)
      .def_static("keep_at_most", &Workspace::keep_at_most);

  m.def("instruction_set", &isa_name);
  m.def("max_threads", &max_threads);
  m.attr("CONTRAST_BLOCK") = CONTRAST_BLOCK;
  m.attr("CONTRAST_SPARE_ROWS") = CONTRAST_SPARE_ROWS;

  m.def(
      "contrast_forward",
      [](const Matrix& x, const Matrix& y, Address scale, bool scale_per_row, Address bias, Address target,
         Address row_labels, Address column_labels, Address self_index, const std::string& similarity,
         const std::string& relation, int64_t ignore_index, bool force_running_maximum, Address positive,
         Address negative_lse, Address mean, Address kept, int64_t kept_blocks) {
        contrast_forward({contrast_inputs(x, y, scale, scale_per_row, bias, target, row_labels, column_labels,
                                          self_index, similarity, relation, ignore_index),
                          force_running_maximum, out(positive), out(negative_lse), out(mean), out(kept), kept_blocks});
      },
      Release());

  m.def(
      "contrast_backward",
      [](Address grad_positive, Address grad_negative_lse, const Matrix& x, const Matrix& y, Address scale,
         bool scale_per_row, Address bias, Address target, Address row_labels, Address column_labels,
         Address self_index, const std::string& similarity, const std::string& relation, int64_t ignore_index,
         bool force_running_maximum, Address negative_lse, Address mean, Address kept, int64_t kept_blocks,
         Address grad_x, Address grad_y, Address grad_scale, Address grad_bias) {
        contrast_backward({contrast_inputs(x, y, scale, scale_per_row, bias, target, row_labels, column_labels,
                                           self_index, similarity, relation, ignore_index),
                           force_running_maximum, in(grad_positive), in(grad_negative_lse), in(negative_lse), in(mean),
                           in(kept), kept_blocks, out(grad_x), out(grad_y), out(grad_scale), out(grad_bias)});
      },
      Release());

  m.def(
      "draw",
      [](const Matrix& x, const Matrix& y, Address row_labels, Address column_labels, Address self_index, uint32_t seed,
         const std::string& relation, Address index) {
        draw({x, y, ints(row_labels), ints(column_labels), ints(self_index), seed, parse_relation(relation),
              reinterpret_cast<int64_t*>(index)});
      },
      Release());

  py::class_<Angle>(m, "Angle").def(py::init<double, double, double, double, double, double, double, bool>());

  m.def(
      "margin_softmax_forward",
      [](const Matrix& x, const Matrix& y, Address scale, bool scale_per_row, Address margin, bool margin_per_row,
         Address target, const std::string& similarity, const Angle& angle, int64_t ignore_index,
         const std::string& reduction, bool with_mean, int64_t kept_blocks, Address loss, Address saved) {
        margin_softmax_forward(
            {margin_softmax_inputs(x, y, scale, scale_per_row, margin, margin_per_row, target, similarity, angle,
                                   ignore_index, reduction, with_mean, kept_blocks),
             out(loss), out(saved)});
      },
      Release());

  m.def(
      "margin_softmax_backward",
      [](Address grad_loss, const Matrix& x, const Matrix& y, Address scale, bool scale_per_row, Address margin,
         bool margin_per_row, Address target, const std::string& similarity, const Angle& angle, int64_t ignore_index,
         const std::string& reduction, bool with_mean, int64_t kept_blocks, Address saved, Address grad_x,
         Address grad_y, Address grad_scale, Address grad_margin) {
        margin_softmax_backward(
            {margin_softmax_inputs(x, y, scale, scale_per_row, margin, margin_per_row, target, similarity, angle,
                                   ignore_index, reduction, with_mean, kept_blocks),
             in(grad_loss), in(saved), out(grad_x), out(grad_y), out(grad_scale), out(grad_margin)});
      },
      Release());

  m.def(
      "kmeans",
      [](const Matrix& x, int64_t classes, Address members, Address first_member, Address first_cluster,
         Address waiting, int64_t iterations, Address centroids, Address assignments, Address squared) {
        kmeans({x, classes, ints(members), ints(first_member), ints(first_cluster),
                static_cast<const double*>(in(waiting)), iterations, out(centroids),
                reinterpret_cast<int64_t*>(assignments), out(squared)});
      },
      Release());

  m.def(
      "magnet_forward",
      [](const Matrix& x, int64_t num_clusters, Address clusters, Address cluster_labels, double alpha,
         double variance_floor, const std::string& reduction, Address loss, Address saved) {
        magnet_forward(
            {{x, num_clusters, ints(clusters), ints(cluster_labels), alpha, variance_floor, parse_reduction(reduction)},
             out(loss),
             out(saved)});
      },
      Release());

  m.def(
      "magnet_backward",
      [](Address grad_loss, const Matrix& x, int64_t num_clusters, Address clusters, Address cluster_labels,
         double alpha, double variance_floor, const std::string& reduction, Address saved, Address grad_x) {
        magnet_backward(
            {{x, num_clusters, ints(clusters), ints(cluster_labels), alpha, variance_floor, parse_reduction(reduction)},
             in(grad_loss),
             in(saved),
             out(grad_x)});
      },
      Release());

  m.def(
      "nearest_forward",
      [](const Matrix& x, const Matrix& y, Address row_labels, Address column_labels, Address self_index, Address below,
         const std::string& similarity, const std::string& relation, int64_t k, Address best, Address index) {
        nearest_forward({x, y, ints(row_labels), ints(column_labels), ints(self_index), in(below),
                         parse_similarity(similarity), parse_relation(relation), k, out(best),
                         reinterpret_cast<int64_t*>(index)});
      },
      Release());

  m.def(
      "scores_forward",
      [](const Matrix& x, const Matrix& y, Address scale, bool scale_per_row, Address bias, Address margin,
         bool margin_per_row, Address target, const std::string& similarity, int64_t ignore_index, Address scores) {
        scores_forward(
            {scores_inputs(x, y, scale, scale_per_row, bias, margin, margin_per_row, target, similarity, ignore_index),
             out(scores)});
      },
      Release());

  m.def(
      "scores_backward",
      [](Address grad_scores, const Matrix& x, const Matrix& y, Address scale, bool scale_per_row, Address bias,
         Address margin, bool margin_per_row, Address target, const std::string& similarity, int64_t ignore_index,
         Address grad_x, Address grad_y, Address grad_scale, Address grad_bias, Address grad_margin) {
        scores_backward(
            {scores_inputs(x, y, scale, scale_per_row, bias, margin, margin_per_row, target, similarity, ignore_index),
             in(grad_scores), out(grad_x), out(grad_y), out(grad_scale), out(grad_bias), out(grad_margin)});
      },
      Release());
}
