// Stands for CUDA's mma.h: a warp's first lane holds the whole fragment and multiplies alone.

#pragma once

#include "cuda_emulation.h"

namespace nvcuda::wmma {

struct row_major {};
struct col_major {};
struct matrix_a {};
struct matrix_b {};
struct accumulator {};
enum layout_t { mem_row_major, mem_col_major };

template <class Use, int M, int N, int K, class T, class Layout = row_major>
struct fragment {
  T x[16][16];  // [row][column]
};

inline bool first_lane() { return threadIdx.x % 32 == 0; }

template <int M, int N, int K>
void fill_fragment(fragment<accumulator, M, N, K, float>& to, float value) {
  for (auto& row : to.x) std::fill_n(row, 16, value);
}

template <class Use, int M, int N, int K, class T, class Layout>
void load_matrix_sync(fragment<Use, M, N, K, T, Layout>& to, const T* from, unsigned stride) {
  if (reinterpret_cast<uintptr_t>(from) % 32 || stride * sizeof(T) % 16) {
    std::fputs("a fragment's address must be a multiple of 32 bytes and its stride one of 16\n", stderr);
    std::abort();
  }
  if (!first_lane()) return;
  for (int r = 0; r < 16; ++r)
    for (int c = 0; c < 16; ++c)
      to.x[r][c] = std::is_same_v<Layout, row_major> ? from[r * stride + c] : from[c * stride + r];
}

template <class A, class B, class C>
void mma_sync(C& to, const A& a, const B& b, const C& add) {
  if (!first_lane()) return;
  for (int r = 0; r < 16; ++r)
    for (int c = 0; c < 16; ++c) {
      float sum = add.x[r][c];
      for (int k = 0; k < 16; ++k) sum += static_cast<float>(a.x[r][k]) * static_cast<float>(b.x[k][c]);
      to.x[r][c] = sum;
    }
}

template <int M, int N, int K>
void store_matrix_sync(float* to, const fragment<accumulator, M, N, K, float>& from, unsigned stride, layout_t) {
  if (!first_lane()) return;
  for (int r = 0; r < 16; ++r) std::copy_n(from.x[r], 16, to + r * stride);
}

}  // namespace nvcuda::wmma
