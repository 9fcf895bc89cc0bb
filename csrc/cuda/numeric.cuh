// Dtypes on the device: widening, rounding, 16-byte packets, and sums that have one order.

#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace shapo::cuda {

// Float64 is computed in float64, everything else in float32.
template <class T>
struct ComputeOf {
  using type = float;
};
template <>
struct ComputeOf<double> {
  using type = double;
};
template <class T>
using Compute = typename ComputeOf<T>::type;

__device__ inline float widen(float x) { return x; }
__device__ inline double widen(double x) { return x; }
__device__ inline float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline float widen(__half x) { return __half2float(x); }

template <class T>
__device__ T narrow(Compute<T> x);
template <>
__device__ inline float narrow<float>(float x) {
  return x;
}
template <>
__device__ inline double narrow<double>(double x) {
  return x;
}
template <>
__device__ inline __nv_bfloat16 narrow<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}
template <>
__device__ inline __half narrow<__half>(float x) {
  return __float2half_rn(x);
}

// A product and a sum that the compiler must not fuse: weights agree with PyTorch's to the bit.
__device__ inline float multiply(float a, float b) { return __fmul_rn(a, b); }
__device__ inline double multiply(double a, double b) { return __dmul_rn(a, b); }
__device__ inline float add(float a, float b) { return __fadd_rn(a, b); }
__device__ inline double add(double a, double b) { return __dadd_rn(a, b); }

template <class T>
__device__ T not_a_number();
template <>
__device__ inline float not_a_number<float>() {
  return __int_as_float(0x7fc00000);
}
template <>
__device__ inline double not_a_number<double>() {
  return __longlong_as_double(0x7ff8000000000000ll);
}
template <>
__device__ inline __nv_bfloat16 not_a_number<__nv_bfloat16>() {
  return __ushort_as_bfloat16(0x7fc0);
}
template <>
__device__ inline __half not_a_number<__half>() {
  return __ushort_as_half(0x7e00);
}

// 16 bytes that are loaded and stored at once.
template <class T>
struct alignas(16) Packet {
  static constexpr int SIZE = 16 / sizeof(T);
  T values[SIZE];
};

// N neighbours in as few accesses of at most 16 bytes as can be; `at` begins on a packet or on all of them.
template <int N, class T>
__device__ inline void load_neighbours(const T* at, T (&to)[N]) {
  if constexpr (N % Packet<T>::SIZE == 0) {
#pragma unroll
    for (int p = 0; p < N / Packet<T>::SIZE; ++p) {
      const auto packet = reinterpret_cast<const Packet<T>*>(at)[p];
#pragma unroll
      for (int i = 0; i < Packet<T>::SIZE; ++i) to[p * Packet<T>::SIZE + i] = packet.values[i];
    }
  } else {
    static_assert(N == 1, "one element or whole packets");
    to[0] = *at;
  }
}

template <int N, class T>
__device__ inline void store_neighbours(T* at, const T (&from)[N]) {
  if constexpr (N % Packet<T>::SIZE == 0) {
#pragma unroll
    for (int p = 0; p < N / Packet<T>::SIZE; ++p) {
      Packet<T> packet;
#pragma unroll
      for (int i = 0; i < Packet<T>::SIZE; ++i) packet.values[i] = from[p * Packet<T>::SIZE + i];
      reinterpret_cast<Packet<T>*>(at)[p] = packet;
    }
  } else {
    static_assert(N == 1, "one element or whole packets");
    *at = from[0];
  }
}

__device__ inline double add_warp(double x) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) x += __shfl_xor_sync(0xffffffffu, x, distance);
  return x;
}

// The sum over the threads of a block, in every thread, in one order.
template <int THREADS>
__device__ double add_block(double x) {
  __shared__ double warps[THREADS / 32];
  x = add_warp(x);
  __syncthreads();  // whoever reads the sums of the call before is done
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = x;
  __syncthreads();
  double total = 0.0;
#pragma unroll
  for (int i = 0; i < THREADS / 32; ++i) total += warps[i];
  return total;
}

}  // namespace shapo::cuda
