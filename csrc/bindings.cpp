// The compiled module: the CPU kernels, what Python asks of them, and the CUDA kernels if there are any.
#include <stdexcept>

#include "cpu/cpu.h"
#include "seam.h"
#if PXC_HAVE_CUDA
#include "cuda/bindings.h"
#endif

#ifndef PXC_COMPILER
#define PXC_COMPILER "unknown"
#endif
#ifndef PXC_CUDA_ARCHS
#define PXC_CUDA_ARCHS ""
#endif

namespace pxc {

namespace py = pybind11;

// A call, if the instruction set has the kernels that it takes.
template <class Params>
auto if_fused(void (*call)(const Params&)) {
  return cpu::vector_kernels().fused_forward ? call : nullptr;
}

PYBIND11_MODULE(_C, m) {
  using namespace cpu;
  using seam::def, seam::def_late;

  m.doc() = "Native kernels of pixcontrast_ext; called through pixcontrast_ext.backends.native only.";
  m.attr("compiler") = PXC_COMPILER;
  m.attr("cuda_archs") = PXC_CUDA_ARCHS;

  // args = (position, value); the caller knows what they mean.
  static py::exception<BadValue> bad_value(m, "BadValue", PyExc_ValueError);
  py::register_local_exception_translator([](std::exception_ptr thrown) {
    try {
      if (thrown) std::rethrow_exception(thrown);
    } catch (const BadValue& found) {
      PyErr_SetObject(bad_value.ptr(), py::make_tuple(found.position, found.value).ptr());
    }
  });

  def<SamplingParams>(m, "sampling", sampling);
  def<GatherParams>(m, "gather", gather);
  def<GatherBackwardParams>(m, "gather_backward", gather_backward);
  def<CollectParams>(m, "collect", collect);
  def<WriteParams>(m, "write", write);
  def<TilesParams>(m, "plan_tiles", plan_tiles);
  def<CollectKeysParams>(m, "collect_keys", collect_keys);
  def_late<ContrastForwardParams>(m, "contrast_forward", [] { return if_fused(contrast_forward); });
  def_late<ContrastCountsParams>(m, "contrast_counts", [] { return if_fused(contrast_counts); });
  def_late<ContrastBackwardParams>(m, "contrast_backward", [] { return if_fused(contrast_backward); });
  def_late<WidenParams>(m, "widen", [] { return vector_kernels().widen; });
  def_late<NegativesParams>(m, "infonce_negatives", [] { return vector_kernels().negatives; });
  def_late<PositivesParams>(m, "infonce_positives", [] { return vector_kernels().positives; });
  def_late<CountScoresParams>(m, "count_scores", [] { return vector_kernels().count_scores; });
  def_late<FinishParams>(m, "infonce_finish", [] { return vector_kernels().finish; });
  def_late<ScoreGradientParams>(m, "infonce_score_gradients",
                                [] { return vector_kernels().score_gradients; });

  m.attr("SCORE_BINS") = kScoreBins;
  m.attr("LANES") = kLanes;
  m.attr("DTYPES") = std::vector<std::string>(seam::kDTypeNames.begin(), seam::kDTypeNames.end());
  m.def("instruction_sets", instruction_sets);
  m.def("select_instruction_set", select_instruction_set);
  m.def("instruction_set", instruction_set);
  m.def("has_fused", [] { return vector_kernels().fused_forward != nullptr; });
  m.def("fused_dtype", fused_dtype);

#if PXC_HAVE_CUDA
  py::module_ gpu = m.def_submodule("cuda", "Kernels for tensors in device memory.");
  cuda::def_kernels(gpu);
#endif
}

}  // namespace pxc
