// The cosine of every neuron with one direction on NVIDIA GPUs, in one pass over the weight.
//
// A block takes a strip of neurons and a part of their components; the parts' sums are written out and added in order
// by a second kernel. Sums are float64: a safety probe's ranking should not hang on rounding.

#include <torch/csrc/stable/library.h>

#include <algorithm>

#include "../layers.h"
#include "launch.h"
#include "numeric.cuh"

namespace shapo::cuda {
namespace {

constexpr int THREADS = 128;
constexpr int ROWS_IN_PART = 128;
constexpr int AT_ONCE = 4;            // rows whose loads are in flight together
constexpr int64_t MAX_PARTS = 65535;  // the grid's second dimension

struct Weight {
  const void* data;
  int64_t neurons, components;
  int64_t neuron_stride, component_stride;
  int64_t direction_stride;
  int64_t rows_in_part;
};

// dots[part, n], squares[part, n]: WIDTH neighbouring neurons for each thread, its part's components one after another.
template <class T, int WIDTH>
__global__ void __launch_bounds__(THREADS) strip_kernel(Weight weight, const Compute<T>* __restrict__ direction,
                                                        double* __restrict__ dots, double* __restrict__ squares) {
  const int64_t n = (static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x) * WIDTH;
  if (n >= weight.neurons) return;
  const int64_t first = blockIdx.y * weight.rows_in_part;
  const int64_t last = min(first + weight.rows_in_part, weight.components);
  const T* at = static_cast<const T*>(weight.data) + n * weight.neuron_stride;
  double dot[WIDTH] = {}, square[WIDTH] = {};
  for (int64_t begin = first; begin < last; begin += AT_ONCE) {
    T values[AT_ONCE][WIDTH];
#pragma unroll
    for (int i = 0; i < AT_ONCE; ++i)  // a row behind the last is the last again, and not counted
      load_neighbours(at + min(begin + i, last - 1) * weight.component_stride, values[i]);
#pragma unroll
    for (int i = 0; i < AT_ONCE; ++i) {
      if (begin + i >= last) continue;
      const auto v = static_cast<double>(direction[(begin + i) * weight.direction_stride]);
#pragma unroll
      for (int j = 0; j < WIDTH; ++j) {
        const auto x = static_cast<double>(widen(values[i][j]));
        dot[j] += x * v;
        square[j] += x * x;
      }
    }
  }
  const int64_t to = blockIdx.y * weight.neurons + n;
#pragma unroll
  for (int j = 0; j < WIDTH; ++j) {
    dots[to + j] = dot[j];
    squares[to + j] = square[j];
  }
}

// The same for neurons whose components lie side by side: a warp for each neuron, which is one part.
template <class T>
__global__ void __launch_bounds__(THREADS) neuron_kernel(Weight weight, const Compute<T>* __restrict__ direction,
                                                         double* __restrict__ dots, double* __restrict__ squares) {
  constexpr int SIZE = Packet<T>::SIZE;
  const int64_t n = static_cast<int64_t>(blockIdx.x) * (THREADS / 32) + threadIdx.x / 32;
  if (n >= weight.neurons) return;
  const T* at = static_cast<const T*>(weight.data) + n * weight.neuron_stride;
  double dot = 0.0, square = 0.0;
#pragma unroll 4
  for (int64_t c = threadIdx.x % 32 * SIZE; c < weight.components; c += 32 * SIZE) {
    T values[SIZE];
    load_neighbours(at + c, values);
#pragma unroll
    for (int i = 0; i < SIZE; ++i) {
      const auto x = static_cast<double>(widen(values[i]));
      dot += x * static_cast<double>(direction[(c + i) * weight.direction_stride]);
      square += x * x;
    }
  }
  dot = add_warp(dot);
  square = add_warp(square);
  if (threadIdx.x % 32 == 0) {
    dots[n] = dot;
    squares[n] = square;
  }
}

// cosines[n] = <W_n, v> / (||W_n|| ||v||), 0 where a norm is zero.
template <class C>
__global__ void __launch_bounds__(THREADS)
    finish_kernel(Weight weight, const C* __restrict__ direction, const double* __restrict__ dots,
                  const double* __restrict__ squares, int64_t parts, C* __restrict__ cosines) {
  double mine = 0.0;
  for (int64_t c = threadIdx.x; c < weight.components; c += THREADS) {
    const auto v = static_cast<double>(direction[c * weight.direction_stride]);
    mine += v * v;
  }
  const double direction_square = add_block<THREADS>(mine);
  const int64_t n = static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x;
  if (n >= weight.neurons) return;
  double dot = 0.0, square = 0.0;
  for (int64_t part = 0; part < parts; ++part) {
    dot += dots[part * weight.neurons + n];
    square += squares[part * weight.neurons + n];
  }
  const double norms = sqrt(square) * sqrt(direction_square);
  cosines[n] = static_cast<C>(norms == 0.0 ? 0.0 : dot / norms);
}

bool on_16_bytes(const void* pointer, int64_t stride, int64_t bytes) {
  return reinterpret_cast<uintptr_t>(pointer) % 16 == 0 && stride * bytes % 16 == 0;
}

template <class T>
void launch(Weight weight, const Tensor& direction, const Tensor& like, const Tensor& result, cudaStream_t stream) {
  using C = Compute<T>;
  constexpr int SIZE = Packet<T>::SIZE;
  const auto* v = static_cast<const C*>(direction.data_ptr());
  const bool along_components = weight.component_stride == 1 && weight.components % SIZE == 0 &&
                                on_16_bytes(weight.data, weight.neuron_stride, sizeof(T));
  const int64_t parts =
      along_components ? 1 : std::clamp<int64_t>(ceil_div<int64_t>(weight.components, ROWS_IN_PART), 1, MAX_PARTS);
  weight.rows_in_part = ceil_div(weight.components, parts);
  const Tensor sums = new_doubles(like, 2 * parts * weight.neurons);
  double* dots = doubles(sums);
  double* squares = dots + parts * weight.neurons;
  if (along_components) {
    const unsigned int blocks = grid_size(ceil_div<int64_t>(weight.neurons, THREADS / 32));
    neuron_kernel<T><<<blocks, THREADS, 0, stream>>>(weight, v, dots, squares);
  } else {
    const bool wide = weight.neuron_stride == 1 && weight.neurons % SIZE == 0 &&
                      on_16_bytes(weight.data, weight.component_stride, sizeof(T));
    const dim3 grid(grid_size(ceil_div<int64_t>(weight.neurons, THREADS * (wide ? SIZE : 1))),
                    static_cast<unsigned int>(parts));
    if (wide)
      strip_kernel<T, SIZE><<<grid, THREADS, 0, stream>>>(weight, v, dots, squares);
    else
      strip_kernel<T, 1><<<grid, THREADS, 0, stream>>>(weight, v, dots, squares);
  }
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  finish_kernel<C><<<grid_size(ceil_div<int64_t>(weight.neurons, THREADS)), THREADS, 0, stream>>>(
      weight, v, dots, squares, parts, static_cast<C*>(result.data_ptr()));
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

Tensor column_cosine(Tensor weight, Tensor direction, int64_t axis) {
  STD_TORCH_CHECK(axis == 0 || axis == 1, "axis is ", axis, ": expected 0 (neurons are rows) or 1 (columns)");
  const ScalarType dtype = weight.scalar_type();
  STD_TORCH_CHECK(weight.dim() == 2 && is_floating(dtype), "weight is ", dtype, " ", describe_shape(weight),
                  ": expected two dimensions of a floating-point dtype");
  STD_TORCH_CHECK(direction.dim() == 1 && direction.size(0) == weight.size(1 - axis) &&
                      direction.scalar_type() == compute_dtype_of(dtype),
                  "direction is ", direction.scalar_type(), " ", describe_shape(direction), ": expected ",
                  compute_dtype_of(dtype), " [", weight.size(1 - axis), "]");
  check_same_device("direction", 0, direction, weight);
  const Weight w{weight.data_ptr(),
                 weight.size(axis),
                 weight.size(1 - axis),
                 weight.stride(axis),
                 weight.stride(1 - axis),
                 direction.stride(0),
                 0};
  const OnDeviceOf device(weight);
  Tensor result = torch::stable::new_empty(weight, {w.neurons}, compute_dtype_of(dtype));
  if (w.neurons == 0) return result;
  if (dtype == ScalarType::Float)
    launch<float>(w, direction, weight, result, device.stream());
  else if (dtype == ScalarType::BFloat16)
    launch<__nv_bfloat16>(w, direction, weight, result, device.stream());
  else if (dtype == ScalarType::Half)
    launch<__half>(w, direction, weight, result, device.stream());
  else
    launch<double>(w, direction, weight, result, device.stream());
  return result;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(shapo_kernels, CUDA, m) { m.impl("column_cosine", TORCH_BOX(&column_cosine)); }

}  // namespace shapo::cuda
