// The Python module fused_margins._CUDA: names, no logic. Memory arrives as addresses (0: null) of contiguous tensors
// on the GPU or as a Matrix with strides, the stream as its address; nothing here waits for the GPU. No torch header,
// so one build serves every torch release; the CUDA runtime is linked in, and loads where there is no driver.
#include <pybind11/pybind11.h>

#include <string>

#include "common/checks.h"
#include "magnet/cuda.h"
#include "margin_softmax/cuda.h"
#include "nearest/cuda.h"

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
int* counters(Address a) {
  return reinterpret_cast<int*>(a);
}

cuda::MarginSoftmaxInputs margin_softmax_inputs(const Matrix& x, const Matrix& y, Address scale, bool scale_per_row,
                                                Address margin, bool margin_per_row, Address target,
                                                const std::string& similarity, const Angle& angle, int64_t ignore_index,
                                                const std::string& reduction) {
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
          parse_reduction(reduction)};
}

cuda::MagnetInputs magnet_inputs(const Matrix& x, int64_t num_clusters, Address clusters, Address cluster_labels,
                                 double alpha, double variance_floor, const std::string& reduction) {
  return {x, num_clusters, ints(clusters), ints(cluster_labels), alpha, variance_floor, parse_reduction(reduction)};
}

}  // namespace

PYBIND11_MODULE(_CUDA, m) {
  // Local: fused_margins._C has a class of the same C++ type.
  py::class_<Matrix>(m, "Matrix", py::module_local())
      .def(py::init([](Address data, int64_t rows, int64_t width, int64_t row_stride, int64_t column_stride,
                       int dtype) { return Matrix{in(data), rows, width, row_stride, column_stride, DType(dtype)}; }));

  py::class_<Angle>(m, "Angle", py::module_local())
      .def(py::init<double, double, double, double, double, double, double, bool>());

  m.def("margin_softmax_saved_size", &cuda::margin_softmax_saved_size);
  m.def("margin_softmax_tickets", &cuda::margin_softmax_tickets);
  m.def("margin_softmax_forward_grid", &cuda::margin_softmax_forward_grid);
  m.def("margin_softmax_backward_grid", &cuda::margin_softmax_backward_grid);
  m.def("margin_softmax_scratch_size", &cuda::margin_softmax_scratch_size);
  m.def("magnet_scratch_size", &cuda::magnet_scratch_size);
  m.def("nearest_grid", &cuda::nearest_grid);

  m.def("margin_softmax_forward",
        [](const Matrix& x, const Matrix& y, Address scale, bool scale_per_row, Address margin, bool margin_per_row,
           Address target, const std::string& similarity, const Angle& angle, int64_t ignore_index,
           const std::string& reduction, Address loss, Address saved, Address tickets, Address stream) {
          cuda::margin_softmax_forward({margin_softmax_inputs(x, y, scale, scale_per_row, margin, margin_per_row,
                                                              target, similarity, angle, ignore_index, reduction),
                                        out(loss), out(saved), counters(tickets)},
                                       out(stream));
        });

  m.def("margin_softmax_backward",
        [](Address grad_loss, const Matrix& x, const Matrix& y, Address scale, bool scale_per_row, Address margin,
           bool margin_per_row, Address target, const std::string& similarity, const Angle& angle, int64_t ignore_index,
           const std::string& reduction, Address saved, Address grad_x, Address grad_y, Address grad_scale,
           Address grad_margin, Address scratch, Address tickets, Address stream) {
          cuda::margin_softmax_backward({margin_softmax_inputs(x, y, scale, scale_per_row, margin, margin_per_row,
                                                               target, similarity, angle, ignore_index, reduction),
                                         in(grad_loss), in(saved), out(grad_x), out(grad_y), out(grad_scale),
                                         out(grad_margin), out(scratch), counters(tickets)},
                                        out(stream));
        });

  m.def("magnet_forward", [](const Matrix& x, int64_t num_clusters, Address clusters, Address cluster_labels,
                             double alpha, double variance_floor, const std::string& reduction, Address loss,
                             Address saved, Address tickets, Address stream) {
    cuda::magnet_forward({magnet_inputs(x, num_clusters, clusters, cluster_labels, alpha, variance_floor, reduction),
                          out(loss), out(saved), counters(tickets)},
                         out(stream));
  });

  m.def("magnet_backward", [](Address grad_loss, const Matrix& x, int64_t num_clusters, Address clusters,
                              Address cluster_labels, double alpha, double variance_floor, const std::string& reduction,
                              Address saved, Address grad_x, Address scratch, Address tickets, Address stream) {
    cuda::magnet_backward({magnet_inputs(x, num_clusters, clusters, cluster_labels, alpha, variance_floor, reduction),
                           in(grad_loss), in(saved), out(grad_x), out(scratch), counters(tickets)},
                          out(stream));
  });

  m.def("nearest_forward",
        [](const Matrix& x, const Matrix& y, Address row_labels, Address column_labels, Address self_index,
           Address below, const std::string& similarity, int64_t k, Address best, Address index, Address stream) {
          cuda::nearest_forward({x, y, ints(row_labels), ints(column_labels), ints(self_index), in(below),
                                 parse_similarity(similarity), k, out(best), reinterpret_cast<int64_t*>(index)},
                                out(stream));
        });
}
