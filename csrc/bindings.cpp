// The Python module fused_margins._C: names, no logic. No torch header, so one build serves every torch release.
#include "bindings.h"

#include "contrast/cpu.h"
#include "cpu/workspace.h"
#include "kmeans/cpu.h"
#include "magnet/cpu.h"
#include "nearest/cpu.h"
#include "sample/cpu.h"
#include "scores/cpu.h"

using namespace fused_margins;

PYBIND11_MODULE(_C, m) {
  define_objects(m);
  py::class_<Workspace>(m, "Workspace", py::buffer_protocol())
      .def(py::init<int64_t, int64_t>())
      .def_buffer([](Workspace& w) { return py::buffer_info(static_cast<uint8_t*>(w.data()), w.bytes()); })
      .def_static("waiting_bytes", &Workspace::waiting_bytes)
      .def_static("keep_at_most", &Workspace::keep_at_most);

  m.def("instruction_set", &isa_name);
  m.def("max_threads", &max_threads);

  m.def("contrast_saved_blocks", &contrast_saved_blocks);
  m.def("contrast_saved_size", &contrast_saved_size);
  define<contrast_forward>(m, "contrast_forward");
  define<contrast_backward>(m, "contrast_backward");
  define<nearest>(m, "nearest");
  define<scores_forward>(m, "scores_forward");
  define<scores_backward>(m, "scores_backward");
  define<sample>(m, "sample");
  m.def("magnet_saved_size", &magnet_saved_size);
  define<magnet_forward>(m, "magnet_forward");
  define<magnet_backward>(m, "magnet_backward");
  define<kmeans>(m, "kmeans");
}
