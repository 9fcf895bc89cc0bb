// Where the elements of a block of a layer lie: in its compact form, and in the layer itself.
//
// An index outside of its layer has no place: it reads as NaN, which makes the norm NaN and the scale 0, and it is
// never written to. Offsets have 64 bits; the divisions that find a lane's row have 32, and one of 64 finds the
// block's.

#pragma once

#include "numeric.cuh"
#include "table.h"

namespace shapo::cuda {

constexpr int64_t NOWHERE = -1;

// The row of the table that this block of threads works on; `block` becomes the block's number within the layer.
template <int CAPACITY>
__device__ inline const Row& row_of_block(const Table<CAPACITY>& table, uint32_t* layer, uint32_t* block) {
  uint32_t low = 0, high = table.layers;
  while (high - low >
         1) {  // the last layer whose first block is not behind this one: layers without blocks are passed over
    const uint32_t middle = (low + high) / 2;
    if (table.rows[middle].first_block <= blockIdx.x)
      low = middle;
    else
      high = middle;
  }
  *layer = low;
  *block = blockIdx.x - table.rows[low].first_block;
  return table.rows[low];
}

__device__ inline int64_t neuron_at(const Row& row, int64_t position) {
  const int64_t neuron = row.index[position * row.index_stride];
  return neuron >= 0 && neuron < row.neurons ? neuron : NOWHERE;
}

// Any layout: this thread's element i is the compact one at first + i * THREADS.
struct Scattered {
  int64_t first;
  int64_t places[PER_THREAD];  // in the layer, or NOWHERE
  int count;                   // of this thread's elements

  __device__ Scattered(const Row& row, uint32_t block) {
    const int64_t begin = static_cast<int64_t>(block) * BLOCK;
    const int64_t left = row.outer * row.inner - begin;
    const int64_t above = begin / row.inner;
    const auto inner = static_cast<uint32_t>(row.inner);
    const auto beside = static_cast<uint32_t>(begin - above * row.inner);
    first = begin + threadIdx.x;
    count = 0;
#pragma unroll
    for (int i = 0; i < PER_THREAD; ++i) {
      const uint32_t lane = i * THREADS + threadIdx.x;
      places[i] = NOWHERE;
      if (lane >= left) continue;
      count = i + 1;
      const uint32_t down = (beside + lane) / inner;
      const int64_t a = above + down;
      const int64_t b = beside + lane - down * inner;
      const int64_t neuron = neuron_at(row, row.axis == 1 ? b : a);
      if (neuron == NOWHERE) continue;
      places[i] = row.axis == 1 ? a * row.row_stride + neuron * row.column_stride
                                : neuron * row.row_stride + b * row.column_stride;
    }
  }
};

// Rows that can be moved in packets: this thread's packet p is STEP elements behind its packet p - 1.
template <class T>
struct Packets {
  static constexpr int SIZE = Packet<T>::SIZE;
  static constexpr int COUNT = PER_THREAD / SIZE;
  static constexpr int STEP = THREADS * SIZE;
  int64_t compact;
  int64_t place;  // or NOWHERE
  int64_t left;   // elements of the row from this thread's first on; packets are whole, the row's length is a multiple

  __device__ Packets(const Row& row, uint32_t block) {
    const auto across = static_cast<uint32_t>((row.inner + BLOCK - 1) / BLOCK);
    const int64_t position = block / across;
    const int64_t column = static_cast<int64_t>(block % across) * BLOCK + threadIdx.x * SIZE;
    const int64_t neuron = neuron_at(row, position);
    compact = position * row.inner + column;
    place = neuron == NOWHERE ? NOWHERE : neuron * row.row_stride + column;
    left = row.inner - column;
  }

  __device__ bool there(int p) const { return p * STEP < left; }
};

// Calls use(T{}) with the layer's dtype.
template <class F>
__device__ inline void with_kind(Kind kind, const F& use) {
  if (kind == FLOAT)
    use(float{});
  else if (kind == BFLOAT16)
    use(__nv_bfloat16{});
  else if (kind == HALF)
    use(__half{});
  else
    use(double{});
}

}  // namespace shapo::cuda
