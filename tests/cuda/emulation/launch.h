// Stands for csrc/cuda/launch.h: the tensors are on the CPU, and a launch runs the kernel before it returns.

#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "cuda_emulation.h"

#define STD_CUDA_KERNEL_LAUNCH_CHECK() static_cast<void>(0)

namespace shapo::cuda {

using torch::stable::Tensor;

class OnDeviceOf {
 public:
  explicit OnDeviceOf(const Tensor&) {}
  cudaStream_t stream() const { return nullptr; }
};

template <class A>
constexpr A ceil_div(A a, A b) {
  return (a + b - 1) / b;
}

inline unsigned int grid_size(int64_t blocks) { return static_cast<unsigned int>(blocks); }

// Poisoned: what a kernel reads before it was written is noticed.
inline Tensor new_doubles(const Tensor& like, int64_t elements) {
  Tensor made = torch::stable::new_empty(like, {elements}, torch::headeronly::ScalarType::Double);
  std::fill_n(static_cast<double*>(made.data_ptr()), elements, std::nan(""));
  return made;
}

inline double* doubles(const Tensor& tensor) { return static_cast<double*>(tensor.data_ptr()); }

}  // namespace shapo::cuda
