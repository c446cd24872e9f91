#include "bindings.h"

#include "../seam.h"
#include "cuda.h"

namespace pxc::cuda {

void def_kernels(pybind11::module_& m) {
  using seam::def;
  m.attr("SORT_TILE") = kTileKeys;
  m.attr("SORT_THREADS") = kSortThreads;
  m.attr("MAX_CLASSES") = kMaxClasses;
  m.attr("MAX_CHANNELS") = kMaxChannels;
  def<SamplingParams>(m, "sampling", sampling);
  def<GatherParams>(m, "gather", gather);
  def<GatherBackwardParams>(m, "gather_backward", gather_backward);
  def<CollectParams>(m, "collect", collect);
  def<WriteParams>(m, "write", write);
  def<InfonceForwardParams>(m, "infonce_forward", infonce_forward);
  def<InfonceBackwardParams>(m, "infonce_backward", infonce_backward);
  def<MinedForwardParams>(m, "mined_forward", mined_forward);
  def<MinedBackwardParams>(m, "mined_backward", mined_backward);
  def<ScoreCountsParams>(m, "score_counts", score_counts);
  pybind11::class_<InfonceTile>(m, "InfonceTile", pybind11::module_local())
      .def_readonly("rows", &InfonceTile::rows)
      .def_readonly("columns", &InfonceTile::columns)
      .def_readonly("piece", &InfonceTile::piece)
      .def_readonly("shared", &InfonceTile::shared)
      .def_readonly("resident", &InfonceTile::resident);
  m.def("infonce_negatives_tile", infonce_negatives_tile);
  m.def("infonce_positives_tile", infonce_positives_tile);
  m.def("infonce_backward_tile", infonce_backward_tile);
  m.def("mined_negatives_tile", mined_negatives_tile);
  m.def("mined_positives_tile", mined_positives_tile);
  m.def("mined_backward_tile", mined_backward_tile);
  m.def("score_counts_tile", score_counts_tile);
  m.def("runtime_problem", runtime_problem);
}

}  // namespace pxc::cuda
