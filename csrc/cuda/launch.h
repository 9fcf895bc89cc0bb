// What every CUDA operator does around its kernels: the tensors' device, PyTorch's current stream, a check after a
// launch.

#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/shim_utils.h>

#include <cstdint>

namespace shapo::cuda {

using torch::stable::Tensor;

// Makes a tensor's device the current one while it lives, and names the stream to launch on.
//
// The CUDA runtime is linked statically: the name of the shared one has its major version, and PyTorch loads only its
// own (pytorch/pytorch#187320). A second copy may keep a current device of its own, so both are set.
class OnDeviceOf {
 public:
  explicit OnDeviceOf(const Tensor& tensor) : guard_(tensor.get_device_index()) {
    STD_CUDA_CHECK(cudaSetDevice(tensor.get_device_index()));
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }

  cudaStream_t stream() const { return stream_; }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_ = nullptr;
};

template <class A>
constexpr __host__ __device__ A ceil_div(A a, A b) {
  return (a + b - 1) / b;
}

inline unsigned int grid_size(int64_t blocks) {
  STD_TORCH_CHECK(blocks < (int64_t{1} << 31), "the work needs ", blocks, " blocks: one launch takes fewer than 2^31");
  return static_cast<unsigned int>(blocks);
}

inline Tensor new_doubles(const Tensor& like, int64_t elements) {
  return torch::stable::new_empty(like, {elements}, torch::headeronly::ScalarType::Double);
}

inline double* doubles(const Tensor& tensor) { return static_cast<double*>(tensor.data_ptr()); }

}  // namespace shapo::cuda
