// The Python module fused_margins._CUDA: names, no logic. Memory is that of the GPU, the stream comes as its address;
// nothing here waits for the GPU. No torch header, so one build serves every torch release; the CUDA runtime is linked
// in, and loads where there is no driver.
#include "bindings.h"

#include "contrast/cuda.h"
#include "magnet/cuda.h"
#include "nearest/cuda.h"

using namespace fused_margins;

PYBIND11_MODULE(_CUDA, m) {
  define_objects(m);

  m.def("contrast_saved_size", &cuda::contrast_saved_size);
  m.def("contrast_scratch_size", &cuda::contrast_scratch_size);
  m.def("contrast_tickets", &cuda::contrast_tickets);
  m.def("contrast_forward_grid", &cuda::contrast_forward_grid);
  m.def("contrast_backward_grid", &cuda::contrast_backward_grid);
  define<cuda::contrast_forward>(m, "contrast_forward");
  define<cuda::contrast_backward>(m, "contrast_backward");
  m.def("nearest_grid", &cuda::nearest_grid);
  define<cuda::nearest>(m, "nearest");
  m.def("magnet_saved_size", &cuda::magnet_saved_size);
  m.def("magnet_scratch_size", &cuda::magnet_scratch_size);
  define<cuda::magnet_forward>(m, "magnet_forward");
  define<cuda::magnet_backward>(m, "magnet_backward");
}
