// The one file that knows Python. Every kernel is exposed as a function of keyword arguments named like the
// fields of its struct in params.h; pointers travel as integers. A missing or superfluous field is a
// TypeError, the GIL is released while a kernel runs, and no struct outlives its call.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <type_traits>

#if !PXC_EMULATED
#include "cpu/cpu.h"
#endif
#include "cuda/cuda.h"
#include "params.h"

#ifndef PXC_COMPILER
#define PXC_COMPILER "unknown"
#endif
#ifndef PXC_CUDA_ARCHS
#define PXC_CUDA_ARCHS ""
#endif

namespace py = pybind11;

namespace pxc {
namespace {

template <class Value>
void assign(Value& field, const py::handle& value) {
  if constexpr (std::is_pointer_v<Value>) {
    field = reinterpret_cast<Value>(value.cast<std::uintptr_t>());
  } else {
    field = value.cast<Value>();
  }
}

// Reads named fields out of keyword arguments and counts them, so that none is left over.
class Fields {
 public:
  explicit Fields(const py::kwargs& values) : values_(values) {}

  template <class Value>
  Fields& operator()(const char* name, Value& field) {
    if (!values_.contains(name)) throw py::type_error(std::string("missing field: ") + name);
    assign(field, values_[name]);
    ++used_;
    return *this;
  }

  void done() const {
    if (used_ != values_.size())
      throw py::type_error("superfluous fields: " + std::to_string(values_.size() - used_));
  }

 private:
  const py::kwargs& values_;
  size_t used_ = 0;
};

#define PXC_FIELD(name) (#name, p.name)

void read(Fields& fields, EmbeddingMap& p) {
  fields PXC_FIELD(map) PXC_FIELD(map_dtype) PXC_FIELD(batch) PXC_FIELD(channels) PXC_FIELD(height)
      PXC_FIELD(width) PXC_FIELD(stride_batch) PXC_FIELD(stride_channel) PXC_FIELD(stride_row)
          PXC_FIELD(stride_column);
}

void read(Fields& fields, SamplingParams& p) {
  fields PXC_FIELD(labels) PXC_FIELD(predictions) PXC_FIELD(priority) PXC_FIELD(batch) PXC_FIELD(pixels)
      PXC_FIELD(num_classes) PXC_FIELD(max_samples) PXC_FIELD(max_views) PXC_FIELD(min_pixels)
          PXC_FIELD(ignore_index) PXC_FIELD(pool_keys) PXC_FIELD(indices) PXC_FIELD(anchor_labels)
              PXC_FIELD(count) PXC_FIELD(threads);
}

void read(Fields& fields, GatherParams& p) {
  read(fields, static_cast<EmbeddingMap&>(p));
  fields PXC_FIELD(indices) PXC_FIELD(num_rows) PXC_FIELD(normalize) PXC_FIELD(wide) PXC_FIELD(rows_dtype)
      PXC_FIELD(rows) PXC_FIELD(inv_norm) PXC_FIELD(threads);
}

void read(Fields& fields, GatherBackwardParams& p) {
  read(fields, static_cast<EmbeddingMap&>(p));
  fields PXC_FIELD(indices) PXC_FIELD(num_rows) PXC_FIELD(normalize) PXC_FIELD(rows_dtype)
      PXC_FIELD(grad_rows) PXC_FIELD(inv_norm) PXC_FIELD(wide) PXC_FIELD(grad_map)
          PXC_FIELD(grad_stride_batch) PXC_FIELD(grad_stride_channel) PXC_FIELD(grad_stride_row)
              PXC_FIELD(grad_stride_column) PXC_FIELD(threads);
}

void read(Fields& fields, CollectParams& p) {
  read(fields, static_cast<EmbeddingMap&>(p));
  fields PXC_FIELD(labels) PXC_FIELD(priority) PXC_FIELD(num_classes) PXC_FIELD(pixels_per_image)
      PXC_FIELD(ignore_index) PXC_FIELD(normalize) PXC_FIELD(pool_keys) PXC_FIELD(weights) PXC_FIELD(sums)
          PXC_FIELD(wide) PXC_FIELD(rows_dtype) PXC_FIELD(rows) PXC_FIELD(row_labels) PXC_FIELD(threads);
}

void read(Fields& fields, WriteParams& p) {
  fields PXC_FIELD(rows) PXC_FIELD(row_labels) PXC_FIELD(batch) PXC_FIELD(num_classes)
      PXC_FIELD(pixels_per_image) PXC_FIELD(row_bytes) PXC_FIELD(region_slots) PXC_FIELD(pixel_slots)
          PXC_FIELD(keys) PXC_FIELD(key_labels) PXC_FIELD(region_ptr) PXC_FIELD(region_fill)
              PXC_FIELD(pixel_ptr) PXC_FIELD(pixel_fill) PXC_FIELD(threads);
}

void read(Fields& fields, WidenParams& p) {
  fields PXC_FIELD(source) PXC_FIELD(source_dtype) PXC_FIELD(indices) PXC_FIELD(num_rows) PXC_FIELD(channels)
      PXC_FIELD(rows) PXC_FIELD(threads);
}

void read(Fields& fields, TilesParams& p) {
  fields PXC_FIELD(key_labels) PXC_FIELD(num_keys) PXC_FIELD(max_keys) PXC_FIELD(tiles) PXC_FIELD(capacity)
      PXC_FIELD(num_tiles);
}

void read(Fields& fields, CollectKeysParams& p) {
  fields PXC_FIELD(key_labels) PXC_FIELD(num_keys) PXC_FIELD(max_keys) PXC_FIELD(label) PXC_FIELD(cursor)
      PXC_FIELD(indices) PXC_FIELD(found);
}

void read(Fields& fields, NegativesParams& p) {
  fields PXC_FIELD(scores) PXC_FIELD(num_rows) PXC_FIELD(num_keys) PXC_FIELD(anchor_labels)
      PXC_FIELD(key_labels) PXC_FIELD(scale) PXC_FIELD(shift) PXC_FIELD(sum) PXC_FIELD(output)
          PXC_FIELD(channels) PXC_FIELD(threads);
}

void read(Fields& fields, PositivesParams& p) {
  fields PXC_FIELD(scores) PXC_FIELD(num_rows) PXC_FIELD(num_keys) PXC_FIELD(neg_lse) PXC_FIELD(anchor_index)
      PXC_FIELD(key_index) PXC_FIELD(scale) PXC_FIELD(loss_sum) PXC_FIELD(pos_weight_sum)
          PXC_FIELD(pos_counts) PXC_FIELD(threads);
}

void read(Fields& fields, FusedForwardParams& p) {
  fields PXC_FIELD(anchors) PXC_FIELD(num_rows) PXC_FIELD(channels) PXC_FIELD(anchor_labels)
      PXC_FIELD(anchor_index) PXC_FIELD(keys) PXC_FIELD(keys_dtype) PXC_FIELD(key_labels) PXC_FIELD(num_keys)
          PXC_FIELD(tiles) PXC_FIELD(num_tiles) PXC_FIELD(scale) PXC_FIELD(panels) PXC_FIELD(shift)
              PXC_FIELD(sum) PXC_FIELD(weight_sum) PXC_FIELD(neg_lse) PXC_FIELD(negatives)
                  PXC_FIELD(positives) PXC_FIELD(loss_sum) PXC_FIELD(pos_weight_sum) PXC_FIELD(pos_counts)
                      PXC_FIELD(threads);
}

void read(Fields& fields, FinishParams& p) {
  fields PXC_FIELD(num_rows) PXC_FIELD(channels) PXC_FIELD(anchor_index) PXC_FIELD(shift) PXC_FIELD(sum)
      PXC_FIELD(weight_sum) PXC_FIELD(negatives) PXC_FIELD(positives) PXC_FIELD(loss_sum)
          PXC_FIELD(pos_weight_sum) PXC_FIELD(pos_counts) PXC_FIELD(temperature) PXC_FIELD(loss)
              PXC_FIELD(neg_lse) PXC_FIELD(pos_weight) PXC_FIELD(pos_count) PXC_FIELD(anchor_grad)
                  PXC_FIELD(threads);
}

void read(Fields& fields, CoefficientsParams& p) {
  fields PXC_FIELD(scores) PXC_FIELD(num_rows) PXC_FIELD(num_anchors) PXC_FIELD(row_labels)
      PXC_FIELD(anchor_labels) PXC_FIELD(row_index) PXC_FIELD(anchor_index) PXC_FIELD(neg_lse)
          PXC_FIELD(neg_scale) PXC_FIELD(pos_scale) PXC_FIELD(row_neg_lse) PXC_FIELD(row_neg_scale)
              PXC_FIELD(row_pos_scale) PXC_FIELD(scale) PXC_FIELD(threads);
}

#if PXC_HAVE_CUDA
void read(Fields& fields, Launch& p) { fields PXC_FIELD(device) PXC_FIELD(stream); }

void read(Fields& fields, cuda::SamplingParams& p) {
  read(fields, static_cast<Launch&>(p));
  fields PXC_FIELD(labels) PXC_FIELD(predictions) PXC_FIELD(priority) PXC_FIELD(batch) PXC_FIELD(pixels)
      PXC_FIELD(num_classes) PXC_FIELD(max_samples) PXC_FIELD(max_views) PXC_FIELD(min_pixels)
          PXC_FIELD(ignore_index) PXC_FIELD(pool_keys) PXC_FIELD(pool_starts) PXC_FIELD(pair_keys)
              PXC_FIELD(pool_keep) PXC_FIELD(pool_rows) PXC_FIELD(indices) PXC_FIELD(anchor_labels)
                  PXC_FIELD(count);
}

void read(Fields& fields, cuda::GatherParams& p) {
  read(fields, static_cast<Launch&>(p));
  read(fields, static_cast<EmbeddingMap&>(p));
  fields PXC_FIELD(indices) PXC_FIELD(num_rows) PXC_FIELD(normalize) PXC_FIELD(rows_dtype) PXC_FIELD(rows)
      PXC_FIELD(inv_norm);
}

void read(Fields& fields, cuda::GatherBackwardParams& p) {
  read(fields, static_cast<Launch&>(p));
  read(fields, static_cast<EmbeddingMap&>(p));
  fields PXC_FIELD(indices) PXC_FIELD(num_rows) PXC_FIELD(normalize) PXC_FIELD(rows_dtype)
      PXC_FIELD(grad_rows) PXC_FIELD(inv_norm) PXC_FIELD(wide) PXC_FIELD(row_pixels) PXC_FIELD(sorted_pixels)
          PXC_FIELD(sorted_rows) PXC_FIELD(sort_keys) PXC_FIELD(grad_map) PXC_FIELD(grad_stride_batch)
              PXC_FIELD(grad_stride_channel) PXC_FIELD(grad_stride_row) PXC_FIELD(grad_stride_column);
}

void read(Fields& fields, cuda::CollectParams& p) {
  read(fields, static_cast<Launch&>(p));
  read(fields, static_cast<EmbeddingMap&>(p));
  fields PXC_FIELD(labels) PXC_FIELD(priority) PXC_FIELD(num_classes) PXC_FIELD(pixels_per_image)
      PXC_FIELD(ignore_index) PXC_FIELD(normalize) PXC_FIELD(pool_keys) PXC_FIELD(pool_starts)
          PXC_FIELD(chunk_sums) PXC_FIELD(sums) PXC_FIELD(chosen_pixels) PXC_FIELD(rows_dtype) PXC_FIELD(rows)
              PXC_FIELD(row_labels);
}

void read(Fields& fields, cuda::WriteParams& p) {
  read(fields, static_cast<Launch&>(p));
  fields PXC_FIELD(rows) PXC_FIELD(row_labels) PXC_FIELD(batch) PXC_FIELD(num_classes)
      PXC_FIELD(pixels_per_image) PXC_FIELD(row_bytes) PXC_FIELD(region_slots) PXC_FIELD(pixel_slots)
          PXC_FIELD(keys) PXC_FIELD(key_labels) PXC_FIELD(region_ptr) PXC_FIELD(region_fill)
              PXC_FIELD(pixel_ptr) PXC_FIELD(pixel_fill);
}

void read(Fields& fields, cuda::InfonceRows& p) {
  fields PXC_FIELD(rows_dtype) PXC_FIELD(full_float32) PXC_FIELD(channels) PXC_FIELD(temperature)
      PXC_FIELD(exclude_self) PXC_FIELD(splits) PXC_FIELD(anchors) PXC_FIELD(anchor_labels)
          PXC_FIELD(num_anchors) PXC_FIELD(order) PXC_FIELD(sorted_labels) PXC_FIELD(sort_keys)
              PXC_FIELD(score_scale) PXC_FIELD(anchor_planes) PXC_FIELD(peaks) PXC_FIELD(plane_blocks)
                  PXC_FIELD(unscale);
}

void read(Fields& fields, cuda::InfonceForwardParams& p) {
  read(fields, static_cast<Launch&>(p));
  read(fields, static_cast<cuda::InfonceRows&>(p));
  fields PXC_FIELD(keys) PXC_FIELD(key_planes) PXC_FIELD(key_labels) PXC_FIELD(num_keys)
      PXC_FIELD(label_ranges) PXC_FIELD(shift_parts) PXC_FIELD(sum_parts) PXC_FIELD(negative_parts)
          PXC_FIELD(fewest_splits) PXC_FIELD(positive_blocks) PXC_FIELD(positive_splits) PXC_FIELD(loss_parts)
              PXC_FIELD(pos_weight_parts) PXC_FIELD(pos_count_parts) PXC_FIELD(positive_parts)
                  PXC_FIELD(part_channels) PXC_FIELD(loss) PXC_FIELD(neg_lse) PXC_FIELD(pos_weight)
                      PXC_FIELD(pos_count) PXC_FIELD(anchor_grad) PXC_FIELD(grad_channels);
}

void read(Fields& fields, cuda::InfonceBackwardParams& p) {
  read(fields, static_cast<Launch&>(p));
  read(fields, static_cast<cuda::InfonceRows&>(p));
  fields PXC_FIELD(keys) PXC_FIELD(key_planes) PXC_FIELD(key_labels) PXC_FIELD(num_keys) PXC_FIELD(neg_lse)
      PXC_FIELD(pos_weight) PXC_FIELD(grad_scale) PXC_FIELD(peak) PXC_FIELD(coefficients)
          PXC_FIELD(label_ranges) PXC_FIELD(grad_parts) PXC_FIELD(grad) PXC_FIELD(grad_channels);
}
#endif

#undef PXC_FIELD

template <class Params>
using Kernel = void (*)(const Params&);

// `find` names the kernel at the time of the call: the instruction set may have been changed since.
template <class Params, class Find>
void def_late(py::module_& m, const char* name, Find find) {
  m.def(name, [find](const py::kwargs& values) {
    Params params{};
    Fields fields(values);
    read(fields, params);
    fields.done();
    const Kernel<Params> kernel = find();
    const py::gil_scoped_release release;
    kernel(params);
  });
}

template <class Params>
void def(py::module_& m, const char* name, Kernel<Params> kernel) {
  def_late<Params>(m, name, [kernel] { return kernel; });
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native kernels of pixcontrast_ext; called through pixcontrast_ext.backends.native only.";
  m.attr("compiler") = PXC_COMPILER;
  m.attr("cuda_archs") = PXC_CUDA_ARCHS;

#if PXC_HAVE_CUDA
  py::module_ gpu = m.def_submodule("cuda", "Kernels for tensors in device memory.");
  def<cuda::SamplingParams>(gpu, "sampling", cuda::sampling);
  def<cuda::GatherParams>(gpu, "gather", cuda::gather);
  def<cuda::GatherBackwardParams>(gpu, "gather_backward", cuda::gather_backward);
  def<cuda::CollectParams>(gpu, "collect", cuda::collect);
  def<cuda::WriteParams>(gpu, "write", cuda::write);
  def<cuda::InfonceForwardParams>(gpu, "infonce_forward", cuda::infonce_forward);
  def<cuda::InfonceBackwardParams>(gpu, "infonce_backward", cuda::infonce_backward);
  py::class_<cuda::InfonceTile>(gpu, "InfonceTile", py::module_local())
      .def_readonly("rows", &cuda::InfonceTile::rows)
      .def_readonly("columns", &cuda::InfonceTile::columns)
      .def_readonly("piece", &cuda::InfonceTile::piece)
      .def_readonly("shared", &cuda::InfonceTile::shared)
      .def_readonly("resident", &cuda::InfonceTile::resident);
  gpu.def("infonce_negatives_tile", cuda::infonce_negatives_tile);
  gpu.def("infonce_positives_tile", cuda::infonce_positives_tile);
  gpu.def("infonce_backward_tile", cuda::infonce_backward_tile);
  gpu.def("runtime_problem", cuda::runtime_problem);
#endif

#if !PXC_EMULATED  // a module of the emulated CUDA kernels has nothing else
  // args = (position, value); the caller knows what they mean.
  static py::exception<BadValue> bad_value(m, "BadValue", PyExc_ValueError);
  py::register_local_exception_translator([](std::exception_ptr thrown) {
    try {
      if (thrown) std::rethrow_exception(thrown);
    } catch (const BadValue& found) {
      PyErr_SetObject(bad_value.ptr(), py::make_tuple(found.position, found.value).ptr());
    }
  });

  def<SamplingParams>(m, "sampling", sample_hard_anchors);
  def<GatherParams>(m, "gather", gather);
  def<GatherBackwardParams>(m, "gather_backward", gather_backward);
  def<CollectParams>(m, "collect", collect);
  def<WriteParams>(m, "write", write);
  def<TilesParams>(m, "plan_tiles", plan_tiles);
  def<CollectKeysParams>(m, "collect_keys", collect_keys);
  def_late<WidenParams>(m, "widen", [] { return vector_kernels().widen; });
  def_late<NegativesParams>(m, "infonce_negatives", [] { return vector_kernels().negatives; });
  def_late<PositivesParams>(m, "infonce_positives", [] { return vector_kernels().positives; });
  def_late<FusedForwardParams>(m, "infonce_fused_forward", [] { return vector_kernels().fused_forward; });
  def_late<FinishParams>(m, "infonce_finish", [] { return vector_kernels().finish; });
  def_late<CoefficientsParams>(m, "infonce_coefficients", [] { return vector_kernels().coefficients; });

  m.attr("FUSED_BLOCK_K") = kFusedBlockK;
  m.def("instruction_sets", instruction_sets);
  m.def("select_instruction_set", select_instruction_set);
  m.def("instruction_set", instruction_set);
  m.def("fused_dtype", fused_dtype);
#endif
}

}  // namespace pxc
