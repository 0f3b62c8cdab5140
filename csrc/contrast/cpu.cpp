// contrast on a CPU: weights exp(logit) are made block by block in the cache and multiplied while they are there.
//
// Every sum runs in an order that the sizes alone decide. Labels, targets and scales are checked before anything is
// computed. Memory beyond the outputs: x as panels, and of the few blocks of columns under way
// the vectors and the weights.
#include "backward.h"
#include "forward.h"
#ifdef __AVX512BF16__
#include "products_bf16.h"
#else
#include "products.h"
#endif

namespace fused_margins {
namespace FM_ISA {

#ifdef __AVX512BF16__
void contrast_forward(const ContrastForward& args) {
  forward<Bf16Products>(args);
}

void contrast_backward(const ContrastBackward& args) {
  Backward<Bf16Products>(args).run();
}
#else
void contrast_forward(const ContrastForward& args) {
  args.in.x.dtype == DType::float64 ? forward<VectorProducts<double>>(args) : forward<VectorProducts<float>>(args);
}

void contrast_backward(const ContrastBackward& args) {
  args.in.x.dtype == DType::float64 ? Backward<VectorProducts<double>>(args).run()
                                    : Backward<VectorProducts<float>>(args).run();
}
#endif

}  // namespace FM_ISA
}  // namespace fused_margins
