// What the operators' lists of tensors mean, and the checks that every backend owes its callers.
//
// Host code only, shared by cpu/ and cuda/. Nothing here reads device memory; index values are checked by the backends.

#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <sstream>
#include <string>
#include <vector>

namespace shapo {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// One layer: a 2-D tensor of any stride, and the neurons selected along `axis` (0: rows, 1: columns).
// Its compact form is [outer, inner], contiguous: [rows, selected] for axis 1, [selected, columns] for axis 0.
struct Layer {
  void* data;
  ScalarType dtype;
  int axis;
  int64_t rows, columns;
  int64_t row_stride, column_stride;
  const int64_t* index;
  int64_t index_stride;
  int64_t selected;

  int64_t outer() const { return axis == 1 ? rows : selected; }
  int64_t inner() const { return axis == 1 ? selected : columns; }
  int64_t neurons() const { return axis == 1 ? columns : rows; }
};

inline bool is_floating(ScalarType dtype) {
  return dtype == ScalarType::Float || dtype == ScalarType::BFloat16 || dtype == ScalarType::Half ||
         dtype == ScalarType::Double;
}

// Directions are held, and sums formed, in float64 for float64 layers and in float32 for all others.
inline ScalarType compute_dtype_of(ScalarType dtype) {
  return dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline int64_t bytes_of(ScalarType dtype) {
  return dtype == ScalarType::Double ? 8 : dtype == ScalarType::Float ? 4 : 2;
}

// A contiguous tensor of any shape as a layer with all of it selected: [1, numel].
inline Layer whole(const Tensor& tensor) {
  static const int64_t first = 0;
  const int64_t n = tensor.numel();
  return Layer{tensor.data_ptr(), tensor.scalar_type(), 0, 1, n, n, 1, &first, 1, 1};
}

inline std::string describe_shape(const Tensor& tensor) {
  std::ostringstream text;
  text << '[';
  for (int64_t i = 0; i < tensor.dim(); ++i) text << (i ? ", " : "") << tensor.size(i);
  text << ']';
  return text.str();
}

inline void check_same_device(const char* name, size_t position, const Tensor& tensor, const Tensor& like) {
  STD_TORCH_CHECK(tensor.is_cuda() == like.is_cuda() && tensor.is_cpu() == like.is_cpu() &&
                      tensor.get_device_index() == like.get_device_index(),
                  name, "[", position,
                  "] is on another device than the first layer: expected all tensors on one device");
}

// `like` is a tensor of the device that `tensor` has to be on.
inline void check_float64_vector(const char* name, const Tensor& tensor, size_t layers, const Tensor& like) {
  STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Double && tensor.dim() == 1 &&
                      tensor.size(0) == static_cast<int64_t>(layers) && tensor.is_contiguous(),
                  name, " is ", tensor.scalar_type(), " ", describe_shape(tensor), ": expected a contiguous float64 [",
                  layers, "], one for each layer");
  check_same_device(name, 0, tensor, like);
}

inline std::vector<Layer> describe_layers(const char* name, const std::vector<Tensor>& tensors,
                                          const std::vector<Tensor>& indices, const std::vector<int64_t>& axes) {
  STD_TORCH_CHECK(tensors.size() == indices.size() && tensors.size() == axes.size(), "got ", tensors.size(), " ", name,
                  ", ", indices.size(), " indices and ", axes.size(), " axes: expected as many of each");
  std::vector<Layer> layers;
  layers.reserve(tensors.size());
  for (size_t l = 0; l < tensors.size(); ++l) {
    const Tensor& tensor = tensors[l];
    const Tensor& index = indices[l];
    const ScalarType dtype = tensor.scalar_type();
    STD_TORCH_CHECK(is_floating(dtype), name, "[", l, "] is ", dtype,
                    ": expected float32, bfloat16, float16 or float64");
    STD_TORCH_CHECK(tensor.dim() == 2, name, "[", l, "] has shape ", describe_shape(tensor),
                    ": expected [rows, columns]");
    STD_TORCH_CHECK(index.scalar_type() == ScalarType::Long && index.dim() == 1, "indices[", l, "] is ",
                    index.scalar_type(), " ", describe_shape(index), ": expected int64 [neurons]");
    STD_TORCH_CHECK(axes[l] == 0 || axes[l] == 1, "axes[", l, "] is ", axes[l],
                    ": expected 0 (neurons are rows) or 1 (columns)");
    check_same_device(name, l, tensor, tensors[0]);
    check_same_device("indices", l, index, tensors[0]);
    layers.push_back(Layer{tensor.data_ptr(), dtype, static_cast<int>(axes[l]), tensor.size(0), tensor.size(1),
                           tensor.stride(0), tensor.stride(1), static_cast<const int64_t*>(index.data_ptr()),
                           index.stride(0), index.size(0)});
  }
  return layers;
}

// Checks compact companions of the layers (values, directions, backups) and returns their data pointers.
// `compute`: they are in the compute dtype of their layer, else in its own.
inline std::vector<void*> describe_compact(const char* name, const std::vector<Tensor>& tensors,
                                           const std::vector<Layer>& layers, bool compute) {
  STD_TORCH_CHECK(tensors.size() == layers.size(), "got ", tensors.size(), " ", name, " for ", layers.size(),
                  " layers: expected as many of each");
  std::vector<void*> data;
  data.reserve(tensors.size());
  for (size_t l = 0; l < tensors.size(); ++l) {
    const Tensor& tensor = tensors[l];
    const ScalarType expected = compute ? compute_dtype_of(layers[l].dtype) : layers[l].dtype;
    STD_TORCH_CHECK(tensor.scalar_type() == expected, name, "[", l, "] is ", tensor.scalar_type(), ": expected ",
                    expected, " for a layer of ", layers[l].dtype);
    STD_TORCH_CHECK(tensor.dim() == 2 && tensor.size(0) == layers[l].outer() && tensor.size(1) == layers[l].inner() &&
                        tensor.is_contiguous(),
                    name, "[", l, "] has shape ", describe_shape(tensor), ": expected a contiguous [",
                    layers[l].outer(), ", ", layers[l].inner(), "]");
    check_same_device(name, l, tensor, tensors[0]);
    data.push_back(tensor.data_ptr());
  }
  return data;
}

}  // namespace shapo
