// The kernels that subspace_update.cu launches. A block works on the elements that elements.cuh gives it; where its
// layer's rows lie side by side it moves them 16 bytes at a time.

#pragma once

#include "elements.cuh"
#include "numeric.cuh"
#include "table.h"

namespace shapo::cuda {
namespace {

constexpr int SUM_THREADS = 256;
constexpr int KEEP = -1;  // weights are compared as they are

template <class T>
__device__ double gather_scattered(const Row& row, uint32_t block) {
  const Scattered elements(row, block);
  const T* data = static_cast<const T*>(row.data);
  auto* to = static_cast<Compute<T>*>(row.computed);
  T values[PER_THREAD];
#pragma unroll
  for (int i = 0; i < PER_THREAD; ++i)
    values[i] = elements.places[i] == NOWHERE ? not_a_number<T>() : data[elements.places[i]];
  double square = 0.0;
#pragma unroll
  for (int i = 0; i < PER_THREAD; ++i) {
    if (i >= elements.count) continue;
    const Compute<T> x = widen(values[i]);
    if (to) to[elements.first + i * THREADS] = x;
    square += static_cast<double>(x) * static_cast<double>(x);
  }
  return square;
}

template <class T>
__device__ double gather_rows(const Row& row, uint32_t block) {
  using Group = Packets<T>;
  const Group packets(row, block);
  const T* data = static_cast<const T*>(row.data) + packets.place;
  auto* to = static_cast<Compute<T>*>(row.computed);
  T values[Group::COUNT][Group::SIZE];
#pragma unroll
  for (int p = 0; p < Group::COUNT; ++p)
    if (packets.there(p) && packets.place != NOWHERE) load_neighbours(data + p * Group::STEP, values[p]);
  double square = 0.0;
#pragma unroll
  for (int p = 0; p < Group::COUNT; ++p) {
    if (!packets.there(p)) continue;
    Compute<T> wide[Group::SIZE];
#pragma unroll
    for (int i = 0; i < Group::SIZE; ++i) {
      wide[i] = packets.place == NOWHERE ? not_a_number<Compute<T>>() : widen(values[p][i]);
      square += static_cast<double>(wide[i]) * static_cast<double>(wide[i]);
    }
    if (to) store_neighbours(to + packets.compact + p * Group::STEP, wide);
  }
  return square;
}

template <class T>
__device__ double square_whole(const Row& row, uint32_t block) {
  constexpr int SIZE = Packet<T>::SIZE, COUNT = PER_THREAD / SIZE;
  const T* data = static_cast<const T*>(row.data);
  const int64_t begin = static_cast<int64_t>(block) * BLOCK;
  T values[PER_THREAD];
  if (begin + BLOCK <= row.inner && reinterpret_cast<uintptr_t>(data) % 16 == 0) {
#pragma unroll
    for (int p = 0; p < COUNT; ++p) {
      T packet[SIZE];
      load_neighbours(data + begin + (p * THREADS + threadIdx.x) * SIZE, packet);
#pragma unroll
      for (int i = 0; i < SIZE; ++i) values[p * SIZE + i] = packet[i];
    }
  } else {
#pragma unroll
    for (int i = 0; i < PER_THREAD; ++i) {
      const int64_t e = begin + i * THREADS + threadIdx.x;
      values[i] = e < row.inner ? data[e] : narrow<T>(0);
    }
  }
  double square = 0.0;
#pragma unroll
  for (int i = 0; i < PER_THREAD; ++i) {
    const auto x = static_cast<double>(widen(values[i]));
    square += x * x;
  }
  return square;
}

// partials[block] = the block's sum of squares; values go to the compact form where the layer has one.
template <int CAPACITY>
__global__ void __launch_bounds__(THREADS)
    gather_kernel(const __grid_constant__ Table<CAPACITY> table, double* __restrict__ partials) {
  uint32_t layer, block;
  const Row& row = row_of_block(table, &layer, &block);
  double square = 0.0;
  with_kind(row.kind, [&](auto value) {
    using T = decltype(value);
    square = row.path == WHOLE  ? square_whole<T>(row, block)
             : row.path == ROWS ? gather_rows<T>(row, block)
                                : gather_scattered<T>(row, block);
  });
  square = add_block<THREADS>(square);
  if (threadIdx.x == 0) partials[blockIdx.x] = square;
}

// x in float64 after rounding to the compute dtype.
template <class C>
__device__ double rounded(C x, int rounding) {
  if (rounding == FLOAT) return static_cast<float>(x);
  if (rounding == BFLOAT16) return __bfloat162float(__float2bfloat16_rn(static_cast<float>(x)));
  if (rounding == HALF) return __half2float(__float2half_rn(static_cast<float>(x)));
  return x;
}

struct Realised {
  double squares = 0.0, along = 0.0, old_squares = 0.0;

  template <class C>
  __device__ void count(C before, C after, C step, int rounding) {
    const double moved = rounded(after, rounding) - rounded(before, rounding);
    squares += moved * moved;
    along += moved * static_cast<double>(step);
  }
};

template <class T>
__device__ Realised perturb_scattered(const Row& row, uint32_t block, double scale, int rounding) {
  using C = Compute<T>;
  const Scattered elements(row, block);
  T* data = static_cast<T*>(row.data);
  T* kept = static_cast<T*>(row.kept) + elements.first;
  const C* direction = static_cast<const C*>(row.computed) + elements.first;
  const bool moving = scale != 0.0;  // else the weights keep every bit, whatever the direction holds
  T old[PER_THREAD];
  C steps[PER_THREAD];
#pragma unroll
  for (int i = 0; i < PER_THREAD; ++i) {
    old[i] = elements.places[i] == NOWHERE ? not_a_number<T>() : data[elements.places[i]];
    steps[i] = moving && i < elements.count ? direction[i * THREADS] : C(0);
  }
  Realised sums;
#pragma unroll
  for (int i = 0; i < PER_THREAD; ++i) {
    if (i >= elements.count) continue;
    kept[i * THREADS] = old[i];
    if (elements.places[i] == NOWHERE) continue;
    const C before = widen(old[i]);
    sums.old_squares += static_cast<double>(before) * static_cast<double>(before);
    if (!moving) continue;
    const C step = multiply(steps[i], static_cast<C>(scale));
    const T fresh = narrow<T>(add(before, step));
    data[elements.places[i]] = fresh;
    sums.count(before, static_cast<C>(widen(fresh)), step, rounding);
  }
  return sums;
}

template <class T>
__device__ Realised perturb_rows(const Row& row, uint32_t block, double scale, int rounding) {
  using C = Compute<T>;
  using Group = Packets<T>;
  const Group packets(row, block);
  T* data = static_cast<T*>(row.data) + packets.place;
  T* kept = static_cast<T*>(row.kept) + packets.compact;
  const C* direction = static_cast<const C*>(row.computed) + packets.compact;
  Realised sums;
#pragma unroll
  for (int p = 0; p < Group::COUNT; ++p) {
    if (!packets.there(p)) continue;
    T old[Group::SIZE];
#pragma unroll
    for (int i = 0; i < Group::SIZE; ++i) old[i] = not_a_number<T>();
    if (packets.place != NOWHERE) load_neighbours(data + p * Group::STEP, old);
    store_neighbours(kept + p * Group::STEP, old);
    if (packets.place == NOWHERE) continue;
#pragma unroll
    for (int i = 0; i < Group::SIZE; ++i) {
      const auto before = static_cast<double>(widen(old[i]));
      sums.old_squares += before * before;
    }
    if (scale == 0.0) continue;  // the weights keep every bit, whatever the direction holds
    C steps[Group::SIZE];
    T fresh[Group::SIZE];
    load_neighbours(direction + p * Group::STEP, steps);
#pragma unroll
    for (int i = 0; i < Group::SIZE; ++i) {
      const C before = widen(old[i]);
      const C step = multiply(steps[i], static_cast<C>(scale));
      fresh[i] = narrow<T>(add(before, step));
      sums.count(before, static_cast<C>(widen(fresh[i])), step, rounding);
    }
    store_neighbours(data + p * Group::STEP, fresh);
  }
  return sums;
}

// Old bits to the backup, W += scale * direction; partials[c, block] = the block's three sums.
template <int CAPACITY>
__global__ void __launch_bounds__(THREADS)
    perturb_kernel(const __grid_constant__ Table<CAPACITY> table, const double* __restrict__ scales, int rounding,
                   double* __restrict__ partials, int64_t all_blocks) {
  uint32_t layer, block;
  const Row& row = row_of_block(table, &layer, &block);
  const double scale = scales[layer];
  Realised sums;
  with_kind(row.kind, [&](auto value) {
    using T = decltype(value);
    sums = row.path == ROWS ? perturb_rows<T>(row, block, scale, rounding)
                            : perturb_scattered<T>(row, block, scale, rounding);
  });
  const double squares = add_block<THREADS>(sums.squares);
  const double along = add_block<THREADS>(sums.along);
  const double old_squares = add_block<THREADS>(sums.old_squares);
  if (threadIdx.x == 0) {
    partials[blockIdx.x] = squares;
    partials[blockIdx.x + all_blocks] = along;
    partials[blockIdx.x + 2 * all_blocks] = old_squares;
  }
}

// Bits are moved, so that the dtype is only a size.
template <class U>
__device__ void restore_block(const Row& row, uint32_t block) {
  if (row.path == ROWS) {
    using Group = Packets<U>;
    const Group packets(row, block);
    if (packets.place == NOWHERE) return;
    U* data = static_cast<U*>(row.data) + packets.place;
    const U* kept = static_cast<const U*>(row.kept) + packets.compact;
#pragma unroll
    for (int p = 0; p < Group::COUNT; ++p) {
      if (!packets.there(p)) continue;
      U old[Group::SIZE];
      load_neighbours(kept + p * Group::STEP, old);
      store_neighbours(data + p * Group::STEP, old);
    }
    return;
  }
  const Scattered elements(row, block);
  U* data = static_cast<U*>(row.data);
  const U* kept = static_cast<const U*>(row.kept) + elements.first;
  U old[PER_THREAD];
#pragma unroll
  for (int i = 0; i < PER_THREAD; ++i)
    if (elements.places[i] != NOWHERE) old[i] = kept[i * THREADS];
#pragma unroll
  for (int i = 0; i < PER_THREAD; ++i)
    if (elements.places[i] != NOWHERE) data[elements.places[i]] = old[i];
}

template <int CAPACITY>
__global__ void __launch_bounds__(THREADS) restore_kernel(const __grid_constant__ Table<CAPACITY> table) {
  uint32_t layer, block;
  const Row& row = row_of_block(table, &layer, &block);
  if (row.kind == FLOAT)
    restore_block<uint32_t>(row, block);
  else if (row.kind == DOUBLE)
    restore_block<uint64_t>(row, block);
  else
    restore_block<uint16_t>(row, block);
}

// The sum of count values, in every thread of the block, in an order that depends on their number alone.
__device__ double add_values(const double* values, int64_t count) {
  double sum = 0.0;
  for (int64_t i = threadIdx.x; i < count; i += SUM_THREADS) sum += values[i];
  return add_block<SUM_THREADS>(sum);
}

struct ScaleOf {
  const double* rho;
  const double* weight_squares;  // may be null
  double eta;
  int64_t layers;
  int norm;  // 0 global, 1 layer, 2 none

  // The formula of perturbation_scale for one layer; every thread takes part.
  __device__ double operator()(int64_t layer, double own, double everything) const {
    double radius = rho[layer];
    if (norm == 2) return isfinite(everything) ? radius : 0.0;
    if (weight_squares) radius *= sqrt(norm == 1 ? weight_squares[layer] : add_values(weight_squares, layers));
    const double square = norm == 1 ? own : everything;
    return isfinite(square) && square > 0.0 && isfinite(radius) ? radius / (sqrt(square) + eta) : 0.0;
  }
};

// sums[layer, c] = the sum of the layer's blocks in partials[c]; one block of threads for each layer.
template <int CAPACITY>
__global__ void __launch_bounds__(SUM_THREADS)
    add_kernel(const __grid_constant__ Table<CAPACITY> table, const double* __restrict__ all_partials,
               int64_t all_blocks, int64_t done_blocks, int64_t done_layers, int columns, double* __restrict__ sums) {
  const uint32_t l = blockIdx.x;
  const int64_t first = table.rows[l].first_block;
  const int64_t last = l + 1 < table.layers ? table.rows[l + 1].first_block : table.blocks;
  for (int c = 0; c < columns; ++c) {
    const double sum = add_values(all_partials + c * all_blocks + done_blocks + first, last - first);
    if (threadIdx.x == 0) sums[(done_layers + l) * columns + c] = sum;
  }
}

// scales[layer] from the squared norms of all layers.
__global__ void __launch_bounds__(SUM_THREADS)
    scale_kernel(const double* __restrict__ squares, ScaleOf scale_of, double* __restrict__ scales) {
  const double everything = scale_of.norm == 1 ? 0.0 : add_values(squares, scale_of.layers);
  const double scale = scale_of(blockIdx.x, squares[blockIdx.x], everything);
  if (threadIdx.x == 0) scales[blockIdx.x] = scale;
}

}  // namespace
}  // namespace shapo::cuda
