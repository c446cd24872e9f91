// Exposes a kernel to Python as a function whose keyword arguments are named like the fields of its struct;
// params.h lists the fields beside the struct.
//
// A pointer is passed as (address, dtype) or None, and is refused unless the dtype is the field's own; a
// tensor of any strides is passed as (address, dtype, sizes, strides). A missing or superfluous field is a
// TypeError. The GIL is released while a kernel runs, and no struct outlives its call.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <iterator>
#include <set>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "params.h"

namespace pxc::seam {

namespace py = pybind11;

constexpr std::array kDTypeNames = {"float32", "float16", "bfloat16",
                                    "float64", "int32",   "int64"};  // indexed by DType
static_assert(kDTypeNames.size() == size_t(DType::kInt64) + 1);

// The dtype behind a pointer of this type. Tensors have no unsigned integers of these sizes; signed ones hold
// the same bits.
template <class Element>
constexpr DType dtype_of() {
  using Plain = std::remove_const_t<Element>;
  if constexpr (std::is_same_v<Plain, float>) return DType::kFloat32;
  if constexpr (std::is_same_v<Plain, Float16>) return DType::kFloat16;
  if constexpr (std::is_same_v<Plain, double>) return DType::kFloat64;
  if constexpr (std::is_same_v<Plain, int32_t>) return DType::kInt32;
  if constexpr (std::is_same_v<Plain, int64_t> || std::is_same_v<Plain, uint64_t>) return DType::kInt64;
}

// Reads named fields out of keyword arguments and counts them, so that none is left over.
class Fields {
 public:
  Fields(const char* kernel, const py::kwargs& values) : kernel_(kernel), values_(values) {}

  template <class Value>
  void operator()(const char* name, Value& field) {
    if (!values_.contains(name)) throw py::type_error(std::string(kernel_) + ": missing field: " + name);
    if (!used_.insert(name).second) throw std::logic_error(std::string(kernel_) + " has two fields " + name);
    try {
      assign(name, field, values_[name]);
    } catch (const py::cast_error&) {
      throw py::type_error(std::string(kernel_) + ": " + name + " may not be " +
                           std::string(py::repr(values_[name])));
    }
  }

  void done() const {
    std::string others;
    for (const auto& [name, value] : values_) {
      const std::string known = name.cast<std::string>();
      if (!used_.contains(known)) others += (others.empty() ? "" : ", ") + known;
    }
    if (!others.empty()) throw py::type_error(std::string(kernel_) + ": superfluous fields: " + others);
  }

 private:
  template <class Number>
  void assign(const char*, Number& field, const py::handle& value) {
    field = value.cast<Number>();
  }

  template <class Element>
  void assign(const char* name, Element*& field, const py::handle& value) {
    if constexpr (std::is_void_v<Element>) {
      Array<Element> rows;
      assign(name, rows, value);
      field = rows.data;
      return;
    } else {
      field = nullptr;
      if (value.is_none()) return;
      const auto [address, dtype] = value.cast<std::pair<uintptr_t, int32_t>>();
      expect(name, kDTypeNames[int(dtype_of<Element>())], DType(dtype) == dtype_of<Element>(), dtype);
      field = reinterpret_cast<Element*>(address);
    }
  }

  template <class Void>
  void assign(const char* name, Array<Void>& field, const py::handle& value) {
    field = {};
    if (value.is_none()) return;
    const auto [address, dtype] = value.cast<std::pair<uintptr_t, int32_t>>();
    expect(name, "float32, float16 or bfloat16", is_row_type(dtype), dtype);
    const int32_t known = rows_;
    expect(name, known < 0 ? "" : kDTypeNames[known], known < 0 || known == dtype, dtype);
    rows_ = dtype;
    field = {.data = reinterpret_cast<Void*>(address), .dtype = DType(dtype)};
  }

  using Strided = std::tuple<uintptr_t, int32_t, std::array<int64_t, 4>, std::array<int64_t, 4>>;

  void assign(const char* name, EmbeddingMap& field, const py::handle& value) {
    const auto [address, dtype, sizes, strides] = value.cast<Strided>();
    expect(name, "float32, float16 or bfloat16", is_row_type(dtype), dtype);
    field = {.map = reinterpret_cast<const void*>(address),
             .map_dtype = DType(dtype),
             .batch = sizes[0],
             .channels = sizes[1],
             .height = sizes[2],
             .width = sizes[3],
             .stride_batch = strides[0],
             .stride_channel = strides[1],
             .stride_row = strides[2],
             .stride_column = strides[3]};
    map_ = &field;
  }

  void assign(const char* name, GradientMap& field, const py::handle& value) {
    if (map_ == nullptr) throw std::logic_error(std::string(kernel_) + ": a gradient before its map");
    const auto [address, dtype, sizes, strides] = value.cast<Strided>();
    expect(name, kDTypeNames[int(map_->map_dtype)], DType(dtype) == map_->map_dtype, dtype);
    if (sizes != std::array{map_->batch, map_->channels, map_->height, map_->width})
      throw py::value_error(std::string(kernel_) + ": " + name + " must have the shape of the map");
    field = {.grad_map = reinterpret_cast<void*>(address),
             .grad_stride_batch = strides[0],
             .grad_stride_channel = strides[1],
             .grad_stride_row = strides[2],
             .grad_stride_column = strides[3]};
  }

  static bool is_row_type(int32_t dtype) { return dtype >= 0 && dtype <= int32_t(DType::kBFloat16); }

  void expect(const char* name, const char* expected, bool right, int32_t dtype) const {
    if (right) return;
    const bool known = dtype >= 0 && dtype < int32_t(kDTypeNames.size());
    throw py::type_error(std::string(kernel_) + ": " + name + " must be " + expected + ", got " +
                         (known ? kDTypeNames[dtype] : "another dtype"));
  }

  const char* kernel_;
  const py::kwargs& values_;
  const EmbeddingMap* map_ = nullptr;  // its gradient has the same dtype and sizes
  int32_t rows_ = -1;                  // the dtype of the rows; -1 before the first
  std::set<std::string> used_;
};

// Adds up the sizes of the fields that a list names. A field that the list forgets leaves a gap.
struct Sizes {
  template <class Value>
  void operator()(const char*, Value&) {
    sum += sizeof(Value);
  }
  size_t sum = 0;
};

template <class Params>
void check_list(const char* name) {
  Params params{};
  Sizes sizes;
  params.each_field(sizes);
  // A smaller remainder may be padding after a lone 32-bit number. A field that hides in it is a superfluous
  // one at the first call.
  if (sizeof(Params) - sizes.sum >= sizeof(void*) * 2)
    throw std::logic_error(std::string(name) + ": PXC_FIELDS leaves out a field of its struct");
}

template <class Params>
using Kernel = void (*)(const Params&);

// Every call asks `find` for the kernel, because the instruction set may have changed since the last one.
template <class Params, class Find>
void def_late(py::module_& m, const char* name, Find find) {
  check_list<Params>(name);
  m.def(name, [name, find](const py::kwargs& values) {
    Params params{};
    Fields fields(name, values);
    params.each_field(fields);
    fields.done();
    const Kernel<Params> kernel = find();
    if (kernel == nullptr) throw std::runtime_error(std::string(name) + ": not for this instruction set");
    const py::gil_scoped_release release;
    kernel(params);
  });
}

template <class Params>
void def(py::module_& m, const char* name, Kernel<Params> kernel) {
  def_late<Params>(m, name, [kernel] { return kernel; });
}

}  // namespace pxc::seam
