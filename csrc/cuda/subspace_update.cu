// The subspace update on NVIDIA GPUs: gather with squared norms, scale, perturb in place, restore.
//
// Every operator takes all layers and dtypes in one launch (table.h), and one more for its sums. What a block sums is
// written out under its number and a second kernel adds those numbers in their order: atomics would make a norm, and
// through it every weight, differ from run to run. Nothing waits for the device.

#include <torch/csrc/stable/library.h>

#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "../layers.h"
#include "elements.cuh"
#include "launch.h"
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
// Where scales is given, scales[layer] too: every block then adds all partials, which is cheaper than another launch.
template <int CAPACITY>
__global__ void __launch_bounds__(SUM_THREADS)
    add_kernel(const __grid_constant__ Table<CAPACITY> table, const double* __restrict__ all_partials,
               int64_t all_blocks, int64_t done_blocks, int64_t done_layers, int columns, double* __restrict__ sums,
               ScaleOf scale_of, double* __restrict__ scales) {
  const uint32_t l = blockIdx.x;
  const int64_t first = table.rows[l].first_block;
  const int64_t last = l + 1 < table.layers ? table.rows[l + 1].first_block : table.blocks;
  const int64_t layer = done_layers + l;
  double sum = 0.0;
  for (int c = 0; c < columns; ++c) {
    sum = add_values(all_partials + c * all_blocks + done_blocks + first, last - first);
    if (threadIdx.x == 0) sums[layer * columns + c] = sum;
  }
  if (!scales) return;
  const double scale = scale_of(layer, sum, scale_of.norm == 1 ? 0.0 : add_values(all_partials, all_blocks));
  if (threadIdx.x == 0) scales[layer] = scale;
}

// scales[layer] from squared norms that are there already (a collective may have added them up).
__global__ void __launch_bounds__(SUM_THREADS)
    scale_kernel(const double* __restrict__ squares, ScaleOf scale_of, double* __restrict__ scales) {
  const double everything = scale_of.norm == 1 ? 0.0 : add_values(squares, scale_of.layers);
  const double scale = scale_of(blockIdx.x, squares[blockIdx.x], everything);
  if (threadIdx.x == 0) scales[blockIdx.x] = scale;
}

// The sums of a kernel that has written its partials: sums[layer, c], and the scales where they are asked for.
void add_partials(std::vector<Row>& rows, const Tensor& partials, int columns, double* sums, cudaStream_t stream,
                  const ScaleOf& scale_of = {}, double* scales = nullptr) {
  const int64_t all_blocks = count_blocks(rows);
  for_each_table(rows, [&](const auto& table, size_t layer, int64_t block) {
    add_kernel<<<table.layers, SUM_THREADS, 0, stream>>>(table, doubles(partials), all_blocks, block,
                                                         static_cast<int64_t>(layer), columns, sums, scale_of, scales);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  });
}

Tensor gather_partials(std::vector<Row>& rows, const Tensor& like, cudaStream_t stream) {
  Tensor partials = new_doubles(like, count_blocks(rows));
  for_each_table(rows, [&](const auto& table, size_t, int64_t block) {
    if (table.blocks == 0) return;
    gather_kernel<<<table.blocks, THREADS, 0, stream>>>(table, doubles(partials) + block);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return partials;
}

void gather_into(std::vector<Tensor> sources, std::vector<Tensor> indices, std::vector<int64_t> axes,
                 std::vector<Tensor> values, Tensor squared_norms) {
  const std::vector<Layer> layers = describe_layers("sources", sources, indices, axes);
  const std::vector<void*> compact = describe_compact("values", values, layers, true);
  check_float64_vector("squared_norms", squared_norms, layers.size());
  if (layers.empty()) return;
  const OnDeviceOf device(sources[0]);
  std::vector<Row> rows = describe_rows(layers, &compact, nullptr);
  const Tensor partials = gather_partials(rows, squared_norms, device.stream());
  add_partials(rows, partials, 1, doubles(squared_norms), device.stream());
}

Tensor selected_squared_norms(std::vector<Tensor> sources, std::vector<Tensor> indices, std::vector<int64_t> axes) {
  const std::vector<Layer> layers = describe_layers("sources", sources, indices, axes);
  const OnDeviceOf device(sources.at(0));
  std::vector<Row> rows = describe_rows(layers, nullptr, nullptr);
  Tensor result = new_doubles(sources[0], static_cast<int64_t>(layers.size()));
  add_partials(rows, gather_partials(rows, result, device.stream()), 1, doubles(result), device.stream());
  return result;
}

// Rows of whole tensors; those that are not contiguous are replaced by copies.
std::vector<Row> describe_whole(std::vector<Tensor>& values) {
  std::vector<Row> rows;
  for (size_t l = 0; l < values.size(); ++l) {
    const ScalarType dtype = values[l].scalar_type();
    STD_TORCH_CHECK(is_floating(dtype), "values[", l, "] is ", dtype, ": expected a floating-point dtype");
    check_same_device("values", l, values[l], values[0]);
    if (!values[l].is_contiguous()) values[l] = torch::stable::contiguous(values[l]);
    Row row{};
    row.data = values[l].data_ptr();
    row.inner = values[l].numel();
    row.kind = kind_of(dtype);
    row.path = WHOLE;
    rows.push_back(row);
  }
  return rows;
}

Tensor squared_norms(std::vector<Tensor> values) {
  const OnDeviceOf device(values.at(0));
  std::vector<Row> rows = describe_whole(values);
  Tensor result = new_doubles(values[0], static_cast<int64_t>(values.size()));
  add_partials(rows, gather_partials(rows, result, device.stream()), 1, doubles(result), device.stream());
  return result;
}

ScaleOf describe_scale(Tensor& rho, std::optional<Tensor>& weight_squared_norms, const std::string& norm, double eta,
                       size_t layers) {
  STD_TORCH_CHECK(norm == "global" || norm == "layer" || norm == "none", "norm is \"", norm,
                  "\": expected \"global\", \"layer\" or \"none\"");
  check_float64_vector("rho", rho, layers);
  if (weight_squared_norms) check_float64_vector("weight_squared_norms", *weight_squared_norms, layers);
  return ScaleOf{doubles(rho), weight_squared_norms ? doubles(*weight_squared_norms) : nullptr, eta,
                 static_cast<int64_t>(layers),
                 norm == "global"  ? 0
                 : norm == "layer" ? 1
                                   : 2};
}

Tensor perturbation_scale(Tensor squared_norms, Tensor rho, std::optional<Tensor> weight_squared_norms,
                          std::string norm, double eta) {
  const int64_t layers = squared_norms.numel();
  check_float64_vector("squared_norms", squared_norms, static_cast<size_t>(layers));
  const ScaleOf scale_of = describe_scale(rho, weight_squared_norms, norm, eta, static_cast<size_t>(layers));
  const OnDeviceOf device(squared_norms);
  Tensor scale = new_doubles(squared_norms, layers);
  if (layers == 0) return scale;
  scale_kernel<<<grid_size(layers), SUM_THREADS, 0, device.stream()>>>(doubles(squared_norms), scale_of,
                                                                       doubles(scale));
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return scale;
}

std::tuple<Tensor, Tensor> norms_and_scale(std::vector<Tensor> values, Tensor rho,
                                           std::optional<Tensor> weight_squared_norms, std::string norm, double eta) {
  const ScaleOf scale_of = describe_scale(rho, weight_squared_norms, norm, eta, values.size());
  const OnDeviceOf device(values.at(0));
  std::vector<Row> rows = describe_whole(values);
  const auto layers = static_cast<int64_t>(values.size());
  Tensor squares = new_doubles(values[0], layers), scale = new_doubles(values[0], layers);
  const Tensor partials = gather_partials(rows, squares, device.stream());
  add_partials(rows, partials, 1, doubles(squares), device.stream(), scale_of, doubles(scale));
  return {squares, scale};
}

Tensor perturb_(std::vector<Tensor> weights, std::vector<Tensor> indices, std::vector<int64_t> axes,
                std::vector<Tensor> directions, Tensor scale, std::vector<Tensor> backups,
                std::optional<ScalarType> compute_dtype) {
  const std::vector<Layer> layers = describe_layers("weights", weights, indices, axes);
  const std::vector<void*> steps = describe_compact("directions", directions, layers, true);
  const std::vector<void*> kept = describe_compact("backups", backups, layers, false);
  check_float64_vector("scale", scale, layers.size());
  STD_TORCH_CHECK(!compute_dtype || is_floating(*compute_dtype), "compute_dtype is ", *compute_dtype,
                  ": expected float32, bfloat16, float16 or float64");
  const OnDeviceOf device(scale);
  std::vector<Row> rows = describe_rows(layers, &steps, &kept);
  const int64_t blocks = count_blocks(rows);
  const int rounding = compute_dtype && *compute_dtype != ScalarType::Double ? kind_of(*compute_dtype) : KEEP;
  Tensor partials = new_doubles(scale, 3 * blocks);
  for_each_table(rows, [&](const auto& table, size_t layer, int64_t block) {
    if (table.blocks == 0) return;
    perturb_kernel<<<table.blocks, THREADS, 0, device.stream()>>>(table, doubles(scale) + layer, rounding,
                                                                  doubles(partials) + block, blocks);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  });
  const auto count = static_cast<int64_t>(layers.size());
  Tensor result = torch::stable::new_empty(scale, {count, 3}, ScalarType::Double);
  add_partials(rows, partials, 3, doubles(result), device.stream());
  return result;
}

void restore_(std::vector<Tensor> weights, std::vector<Tensor> indices, std::vector<int64_t> axes,
              std::vector<Tensor> backups) {
  const std::vector<Layer> layers = describe_layers("weights", weights, indices, axes);
  const std::vector<void*> kept = describe_compact("backups", backups, layers, false);
  if (layers.empty()) return;
  const OnDeviceOf device(weights[0]);
  std::vector<Row> rows = describe_rows(layers, nullptr, &kept);
  for_each_table(rows, [&](const auto& table, size_t, int64_t) {
    if (table.blocks == 0) return;
    restore_kernel<<<table.blocks, THREADS, 0, device.stream()>>>(table);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(shapo_kernels, CUDA, m) {
  m.impl("gather_into", TORCH_BOX(&gather_into));
  m.impl("squared_norms", TORCH_BOX(&squared_norms));
  m.impl("selected_squared_norms", TORCH_BOX(&selected_squared_norms));
  m.impl("perturbation_scale", TORCH_BOX(&perturbation_scale));
  m.impl("norms_and_scale", TORCH_BOX(&norms_and_scale));
  m.impl("perturb_", TORCH_BOX(&perturb_));
  m.impl("restore_", TORCH_BOX(&restore_));
}

}  // namespace shapo::cuda
