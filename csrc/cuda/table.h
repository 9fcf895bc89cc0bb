// The table that tells one launch about every layer. It travels as the kernel's argument: there is nothing to keep on
// the device, to copy or to go stale, and a captured graph holds its own.

#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "../layers.h"
#include "launch.h"

namespace shapo::cuda {

constexpr int THREADS = 128;
constexpr int PER_THREAD = 8;
constexpr int BLOCK = THREADS * PER_THREAD;  // elements

// How a block finds its elements: SCATTERED serves every layout, the others move 16 bytes at once.
enum Path : uint8_t { SCATTERED, ROWS, WHOLE };
enum Kind : uint8_t { FLOAT, BFLOAT16, HALF, DOUBLE };

struct Row {
  void* data;
  const int64_t* index;
  void* computed;  // compact, in the compute dtype; may be null
  void* kept;      // compact, in the layer's dtype
  int64_t row_stride, column_stride;
  int64_t inner, outer, neurons;
  uint32_t index_stride;
  uint32_t first_block;
  Kind kind;
  Path path;
  uint8_t axis;
};

// Kernel arguments end at 4 KiB, or at 32,764 bytes from CUDA 12.1 on.
constexpr int FEW_LAYERS = 44;
#if CUDART_VERSION >= 12010
constexpr int MANY_LAYERS = 360;
#else
constexpr int MANY_LAYERS = FEW_LAYERS;
#endif

template <int CAPACITY>
struct Table {
  uint32_t layers;
  uint32_t blocks;
  Row rows[CAPACITY];
};
static_assert(sizeof(Table<FEW_LAYERS>) + 64 <= 4096 && sizeof(Table<MANY_LAYERS>) + 64 <= 32764,
              "a kernel's arguments");

inline Kind kind_of(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float:
      return FLOAT;
    case ScalarType::BFloat16:
      return BFLOAT16;
    case ScalarType::Half:
      return HALF;
    default:
      return DOUBLE;
  }
}

inline int64_t blocks_of(const Row& row) {
  if (row.path == ROWS) return row.outer * ceil_div<int64_t>(row.inner, BLOCK);
  return ceil_div<int64_t>(row.path == WHOLE ? row.inner : row.outer * row.inner, BLOCK);
}

inline bool on_16_bytes(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

inline std::vector<Row> describe_rows(const std::vector<Layer>& layers, const std::vector<void*>* computed,
                                      const std::vector<void*>* kept) {
  std::vector<Row> rows;
  for (size_t l = 0; l < layers.size(); ++l) {
    const Layer& layer = layers[l];
    Row row{layer.data,
            layer.index,
            computed ? (*computed)[l] : nullptr,
            kept ? (*kept)[l] : nullptr,
            layer.row_stride,
            layer.column_stride,
            layer.inner(),
            layer.outer(),
            layer.neurons(),
            static_cast<uint32_t>(layer.index_stride),
            0,
            kind_of(layer.dtype),
            SCATTERED,
            static_cast<uint8_t>(layer.axis)};
    STD_TORCH_CHECK(row.inner < (int64_t{1} << 31) - BLOCK && layer.index_stride < (int64_t{1} << 31), "layer ", l,
                    " is ", row.inner, " elements wide: the CUDA kernels take fewer than 2^31");
    if (layer.axis == 0 && row.column_stride == 1 && row.row_stride % 16 == 0 && row.inner % 16 == 0 &&
        on_16_bytes(row.data) && on_16_bytes(row.computed) && on_16_bytes(row.kept))
      row.path = ROWS;
    rows.push_back(row);
  }
  return rows;
}

// Numbers the blocks of all rows and calls launch(table, first layer, first block) for as many layers as fit one table.
// Returns the number of blocks.
template <class F>
int64_t for_each_table(std::vector<Row>& rows, const F& launch) {
  int64_t done_blocks = 0;
  for (size_t begin = 0; begin < rows.size();) {
    const size_t count = std::min<size_t>(rows.size() - begin, MANY_LAYERS);
    const auto fill = [&](auto& table) {
      int64_t blocks = 0;
      for (size_t i = 0; i < count; ++i) {
        table.rows[i] = rows[begin + i];
        table.rows[i].first_block = grid_size(blocks);
        blocks += blocks_of(rows[begin + i]);
      }
      table.layers = static_cast<uint32_t>(count);
      table.blocks = grid_size(blocks);
      launch(table, begin, done_blocks);
      done_blocks += blocks;
    };
    if (count <= FEW_LAYERS) {
      Table<FEW_LAYERS> table;
      fill(table);
    } else {
      Table<MANY_LAYERS> table;
      fill(table);
    }
    begin += count;
  }
  return done_blocks;
}

inline int64_t count_blocks(const std::vector<Row>& rows) {
  int64_t blocks = 0;
  for (const Row& row : rows) blocks += blocks_of(row);
  return blocks;
}

}  // namespace shapo::cuda
