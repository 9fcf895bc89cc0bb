// Log-probabilities of labels under a softmax, and their gradient, on NVIDIA GPUs; each reads the logits once.
//
//     log p = x_y - m - log S,   m = max_v x_v,   S = sum_v exp(x_v - m)
//     d log p / d x_v = [v = y] - exp(x_v - m) / S
//
// Forward, a block walks one token's logits, 16 bytes a thread at a time: a thread keeps the maximum and the sum of
// what it has seen, and the block joins them at the end in a fixed order. Backward, a block writes a part of one
// token's gradient. A label outside of the vocabulary reads nothing; that there is none is asserted by the public
// function.

#include <torch/csrc/stable/library.h>

#include <cmath>
#include <tuple>

#include "../tokens.h"
#include "launch.h"
#include "numeric.cuh"

namespace shapo::cuda {
namespace {

constexpr int THREADS = 256;
constexpr int PACKETS_IN_PART = 8;  // of a thread, in a block of the gradient

template <class C>
__device__ inline C lowest() {
  return static_cast<C>(-INFINITY);
}

// What to subtract: nothing from logits that are all masked, whose difference would be NaN.
template <class C>
__device__ inline C shift_of(C highest) {
  return highest == lowest<C>() ? C(0) : highest;
}

template <class C>
__device__ C highest_of_block(C x) {
  __shared__ C warps[THREADS / 32];
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) {
    const C other = __shfl_xor_sync(0xffffffffu, x, distance);
    x = other > x ? other : x;
  }
  __syncthreads();
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = x;
  __syncthreads();
#pragma unroll
  for (int i = 0; i < THREADS / 32; ++i) x = warps[i] > x ? warps[i] : x;
  return x;
}

// WIDTH neighbours at a time; `stride` is 1 where that is more than one.
template <class T, int WIDTH, bool ENTROPY>
__global__ void __launch_bounds__(THREADS, sizeof(T) == 8 ? 2 : 4)
    normalize_kernel(Tokens tokens, Compute<T>* __restrict__ logps, Compute<T>* __restrict__ normalizers,
                     Compute<T>* __restrict__ entropies) {
  using C = Compute<T>;
  const int64_t token = blockIdx.x;
  int64_t label = 0;
  const bool counted = tokens.labelled(token, &label);
  const T* row = reinterpret_cast<const T*>(tokens.at(token));
  C highest = lowest<C>(), total = 0, weighted = 0;
  if (counted) {
#pragma unroll 1  // what a thread takes at once keeps enough loads in flight
    for (int64_t v = static_cast<int64_t>(threadIdx.x) * WIDTH; v < tokens.vocabulary; v += THREADS * WIDTH) {
      T values[WIDTH];
      load_neighbours(row + v * (WIDTH == 1 ? tokens.stride : 1), values);
      C x[WIDTH], most = highest;
#pragma unroll
      for (int i = 0; i < WIDTH; ++i) {
        x[i] = widen(values[i]);
        most = x[i] > most ? x[i] : most;
      }
      const C shift = shift_of(most), scale = exp(highest - shift);
      if (ENTROPY) weighted = scale == 0 ? C(0) : scale * (weighted - (shift - highest) * total);
      total *= scale;
#pragma unroll
      for (int i = 0; i < WIDTH; ++i) {
        const C below = x[i] - shift, e = exp(below);
        total += e;
        if (ENTROPY && e != 0) weighted += e * below;
      }
      highest = most;
    }
  }
  const C overall = highest_of_block(highest), shift = shift_of(overall);
  const C scale = exp(highest - shift);
  const double sum = add_block<THREADS>(static_cast<double>(total) * scale);
  const double spread =
      ENTROPY
          ? add_block<THREADS>(scale == 0 ? 0.0 : static_cast<double>(scale) * (weighted - (shift - highest) * total))
          : 0.0;
  if (threadIdx.x != 0) return;
  const double log_sum = log(sum);
  double logp = 0.0;
  if (counted && tokens.holds(label))
    logp = static_cast<double>(widen(row[label * tokens.stride])) - static_cast<double>(overall) - log_sum;
  logps[token] = static_cast<C>(logp);
  normalizers[token] = counted ? overall : C(0);
  normalizers[tokens.count() + token] = counted ? static_cast<C>(sum) : C(1);
  if (ENTROPY) entropies[token] = counted ? static_cast<C>(log_sum - spread / sum) : C(0);
}

template <class T, int WIDTH>
__global__ void __launch_bounds__(THREADS)
    slope_kernel(Tokens tokens, Tokens written, const Compute<T>* __restrict__ logps,
                 const Compute<T>* __restrict__ normalizers, const Compute<T>* __restrict__ grad) {
  using C = Compute<T>;
  const int64_t token = blockIdx.x;
  int64_t label = 0;
  const bool counted = tokens.labelled(token, &label);
  // `written` may be the logits' own memory: neither pointer is __restrict__.
  const T* from = reinterpret_cast<const T*>(tokens.at(token));
  T* to = reinterpret_cast<T*>(written.at(token));
  const C highest = normalizers[token], slope = grad[token], factor = -slope / normalizers[tokens.count() + token];
  // 1 - p without cancellation where p is close to 1.
  const C at_label = -slope * expm1(logps[token]);
  const int64_t first = blockIdx.y * static_cast<int64_t>(THREADS * WIDTH * PACKETS_IN_PART);
#pragma unroll 4
  for (int packet = 0; packet < PACKETS_IN_PART; ++packet) {
    const int64_t v = first + (static_cast<int64_t>(packet) * THREADS + threadIdx.x) * WIDTH;
    if (v >= tokens.vocabulary) return;
    T values[WIDTH];
    if (counted) load_neighbours(from + v * (WIDTH == 1 ? tokens.stride : 1), values);
#pragma unroll
    for (int i = 0; i < WIDTH; ++i) {
      C result = 0;
      if (counted) result = v + i == label ? at_label : factor * exp(widen(values[i]) - highest);
      values[i] = narrow<T>(result);
    }
    store_neighbours(to + v * (WIDTH == 1 ? written.stride : 1), values);
  }
}

// Elements that a thread takes at once; more than one of float64 would spill registers.
template <class T>
constexpr int AT_ONCE = sizeof(T) == 8 ? 1 : Packet<T>::SIZE;

bool in_packets(const Tokens& tokens, int64_t size) {
  const int64_t bytes = tokens.element_bytes;
  return tokens.stride == 1 && tokens.vocabulary % size == 0 && reinterpret_cast<uintptr_t>(tokens.logits) % 16 == 0 &&
         tokens.row_stride * bytes % 16 == 0 && tokens.token_stride * bytes % 16 == 0;
}

template <class T, int WIDTH>
void normalize(const Tokens& tokens, Tensor& logps, Tensor& normalizers, Tensor& entropies, bool entropy,
               cudaStream_t stream) {
  using C = Compute<T>;
  const auto kernel = entropy ? normalize_kernel<T, WIDTH, true> : normalize_kernel<T, WIDTH, false>;
  kernel<<<grid_size(tokens.count()), THREADS, 0, stream>>>(tokens, static_cast<C*>(logps.data_ptr()),
                                                            static_cast<C*>(normalizers.data_ptr()),
                                                            static_cast<C*>(entropies.data_ptr()));
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

template <class T, int WIDTH>
void slope(const Tokens& tokens, const Tokens& written, const Tensor& logps, const Tensor& normalizers,
           const Tensor& grad, cudaStream_t stream) {
  using C = Compute<T>;
  const int64_t parts = ceil_div<int64_t>(tokens.vocabulary, THREADS * WIDTH * PACKETS_IN_PART);
  STD_TORCH_CHECK(parts < 65536, "logits has a vocabulary of ", tokens.vocabulary, ": expected fewer than 2^27");
  const dim3 grid(grid_size(tokens.count()), static_cast<unsigned int>(parts));
  slope_kernel<T, WIDTH><<<grid, THREADS, 0, stream>>>(tokens, written, static_cast<const C*>(logps.data_ptr()),
                                                       static_cast<const C*>(normalizers.data_ptr()),
                                                       static_cast<const C*>(grad.data_ptr()));
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

// Calls use(T{}) with the C++ type of a floating-point dtype.
template <class F>
void with_type(ScalarType dtype, const F& use) {
  if (dtype == ScalarType::Float)
    use(float{});
  else if (dtype == ScalarType::BFloat16)
    use(__nv_bfloat16{});
  else if (dtype == ScalarType::Half)
    use(__half{});
  else
    use(double{});
}

std::tuple<Tensor, Tensor, Tensor> token_logps(Tensor logits, Tensor labels, int64_t ignore_index, int64_t shift,
                                               int64_t first, int64_t /*vocabulary*/, bool entropy) {
  const Tokens tokens = describe_tokens(logits, labels, ignore_index, shift, first);
  const ScalarType dtype = compute_dtype_of(tokens.dtype);
  const OnDeviceOf device(logits);
  Tensor logps = torch::stable::new_empty(logits, {tokens.rows, tokens.length}, dtype);
  Tensor normalizers = torch::stable::new_empty(logits, {2, tokens.rows, tokens.length}, dtype);
  Tensor entropies = torch::stable::new_empty(logits, {entropy ? tokens.rows : 0, tokens.length}, dtype);
  if (tokens.count() > 0) {
    with_type(tokens.dtype, [&](auto type) {
      using T = decltype(type);
      if (in_packets(tokens, AT_ONCE<T>))
        normalize<T, AT_ONCE<T>>(tokens, logps, normalizers, entropies, entropy, device.stream());
      else
        normalize<T, 1>(tokens, logps, normalizers, entropies, entropy, device.stream());
    });
  }
  return {logps, normalizers, entropies};
}

// Writes the gradient of sum(grad * logps) with respect to the logits to `to`, which may be their own memory.
void write_gradient(const Tensor& logits, const Tensor& to, const Tensor& labels, const Tensor& logps,
                    const Tensor& normalizers, const Tensor& grad, int64_t ignore_index, int64_t shift, int64_t first) {
  const Tokens tokens = describe_tokens(logits, labels, ignore_index, shift, first);
  const Tokens written = describe_tokens(to, labels, ignore_index, shift, first);
  check_per_token("logps", logps, tokens, 1);
  check_per_token("normalizers", normalizers, tokens, 2);
  check_per_token("grad", grad, tokens, 1);
  if (tokens.count() == 0 || tokens.vocabulary == 0) return;
  const OnDeviceOf device(logits);
  with_type(tokens.dtype, [&](auto type) {
    using T = decltype(type);
    if (in_packets(tokens, AT_ONCE<T>) && in_packets(written, AT_ONCE<T>))
      slope<T, AT_ONCE<T>>(tokens, written, logps, normalizers, grad, device.stream());
    else
      slope<T, 1>(tokens, written, logps, normalizers, grad, device.stream());
  });
}

Tensor token_logps_gradient(Tensor logits, Tensor labels, Tensor logps, Tensor normalizers, Tensor grad,
                            int64_t ignore_index, int64_t shift, int64_t first) {
  Tensor result = torch::stable::empty_like(logits);
  write_gradient(logits, result, labels, logps, normalizers, grad, ignore_index, shift, first);
  return result;
}

void token_logps_gradient_(Tensor logits, Tensor labels, Tensor logps, Tensor normalizers, Tensor grad,
                           int64_t ignore_index, int64_t shift, int64_t first) {
  write_gradient(logits, logits, labels, logps, normalizers, grad, ignore_index, shift, first);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(shapo_kernels, CUDA, m) {
  m.impl("token_logps", TORCH_BOX(&token_logps));
  m.impl("token_logps_gradient", TORCH_BOX(&token_logps_gradient));
  m.impl("token_logps_gradient_", TORCH_BOX(&token_logps_gradient_));
}

}  // namespace shapo::cuda
