// The neuron update y + x[..., S] D^T and its gradient dy^T x[..., S] on NVIDIA GPUs.
//
// Both read the selected columns of the input where they lie: x[..., S] is never written. A scattered column costs a
// 32-byte sector for every token, so that a block gathers a tile of tokens once, into shared memory, and meets as many
// output features as it can with it. bfloat16 and float16 run on tensor cores, float32 and float64 on ordinary ones, so
// that they are exact; sums are float32 (float64 for float64). A gradient is summed over parts of the tokens that
// depend on the shapes alone, and the parts are added in order.

#include <mma.h>
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <optional>
#include <type_traits>

#include "../layers.h"
#include "launch.h"
#include "numeric.cuh"

namespace shapo::cuda {
namespace {

namespace wmma = nvcuda::wmma;

constexpr int THREADS = 128;
constexpr int FRAGMENT = 16;
constexpr int TOKENS = 64;  // of a tile
constexpr int FEATURES = 64;
constexpr int NEURONS = 128;
constexpr int PAD = 8;  // elements between rows in shared memory, so that a fragment's rows lie in different banks
constexpr int TOKENS_IN_PART = 512;
constexpr int WANTED_BLOCKS = 512;  // about four for each multiprocessor of a large GPU

struct Problem {
  const void* x;
  const int64_t* index;  // null: all columns of x
  int64_t tokens, features, neurons;
  int64_t x_stride, index_stride;
};

template <class X>
__device__ const X* selected(const Problem& problem, int64_t token, int64_t k) {
  const int64_t column = problem.index ? problem.index[k * problem.index_stride] : k;
  return static_cast<const X*>(problem.x) + token * problem.x_stride + column;
}

// x[first_token + t, S[first_k + k]] -> tile[t][k], rounded to the output's dtype; 0 outside.
template <class T, class X, int ROWS, int WIDTH>
__device__ void load_selected(const Problem& problem, int64_t first_token, int64_t first_k, T (&tile)[ROWS][WIDTH]) {
  constexpr int COLUMNS = WIDTH - PAD;
  const int lane = threadIdx.x % COLUMNS;
  const int64_t k = first_k + lane;
  const bool there = k < problem.neurons;
  const X* at = there ? selected<X>(problem, first_token, k) : nullptr;
#pragma unroll 8
  for (int t = threadIdx.x / COLUMNS; t < ROWS; t += THREADS / COLUMNS) {
    const bool inside = there && first_token + t < problem.tokens;
    tile[t][lane] = inside ? narrow<T>(widen(at[t * problem.x_stride])) : narrow<T>(0.0f);
  }
}

// matrix[first_row + r, first_column + c] -> tile[r][c]; 0 outside.
template <class T, int ROWS, int WIDTH>
__device__ void load_tile(const T* matrix, int64_t stride, int64_t rows, int64_t columns, int64_t first_row,
                          int64_t first_column, T (&tile)[ROWS][WIDTH]) {
  constexpr int COLUMNS = WIDTH - PAD;
  constexpr int SIZE = Packet<T>::SIZE;
  const bool wide = reinterpret_cast<uintptr_t>(matrix) % 16 == 0 && stride % SIZE == 0 && columns % SIZE == 0;
#pragma unroll 4
  for (int i = threadIdx.x; i < ROWS * COLUMNS / SIZE; i += THREADS) {
    const int r = i / (COLUMNS / SIZE), c = i % (COLUMNS / SIZE) * SIZE;
    const int64_t row = first_row + r, column = first_column + c;
    T values[SIZE];
    if (wide && row < rows && column < columns) {
      load_neighbours(matrix + row * stride + column, values);
    } else {
#pragma unroll
      for (int j = 0; j < SIZE; ++j)
        values[j] = row < rows && column + j < columns ? matrix[row * stride + column + j] : narrow<T>(0.0f);
    }
    store_neighbours(&tile[r][c], values);
  }
}

// result = output + x[:, S] direction^T. A block holds a tile of tokens and every gridDim.y-th tile of features.
template <class T, class X>
__global__ void __launch_bounds__(THREADS)
    update_kernel(Problem problem, const T* __restrict__ output, const T* __restrict__ direction,
                  int64_t direction_stride, T* __restrict__ result) {
  alignas(32) __shared__ T held[TOKENS][NEURONS + PAD];
  // The features' directions, and then, in the same place, the products that wait to be added.
  alignas(32) __shared__ T met[FEATURES][NEURONS + PAD];
  constexpr int PRODUCT_STRIDE = FEATURES + 4;
  static_assert(TOKENS * PRODUCT_STRIDE * sizeof(float) <= sizeof(met), "products fit where the directions were");
  auto* products = reinterpret_cast<float*>(&met[0][0]);

  const int64_t first_token = static_cast<int64_t>(blockIdx.x) * TOKENS;
  const int warp = threadIdx.x / 32, token_half = warp / 2 * 32, feature_half = warp % 2 * 32;
  const bool once = problem.neurons <= NEURONS;
  if (once) load_selected<T, X>(problem, first_token, 0, held);
  for (int64_t first = static_cast<int64_t>(blockIdx.y) * FEATURES; first < problem.features;
       first += static_cast<int64_t>(gridDim.y) * FEATURES) {
    wmma::fragment<wmma::accumulator, FRAGMENT, FRAGMENT, FRAGMENT, float> sums[2][2];
#pragma unroll
    for (int i = 0; i < 4; ++i) wmma::fill_fragment(sums[i / 2][i % 2], 0.0f);
    for (int64_t k = 0; k < problem.neurons; k += NEURONS) {
      __syncthreads();  // the tile before has been read
      if (!once) load_selected<T, X>(problem, first_token, k, held);
      load_tile(direction, direction_stride, problem.features, problem.neurons, first, k, met);
      __syncthreads();
      const int depth = static_cast<int>(min(static_cast<int64_t>(NEURONS), problem.neurons - k));
      for (int d = 0; d < depth; d += FRAGMENT) {
        wmma::fragment<wmma::matrix_a, FRAGMENT, FRAGMENT, FRAGMENT, T, wmma::row_major> a[2];
        wmma::fragment<wmma::matrix_b, FRAGMENT, FRAGMENT, FRAGMENT, T, wmma::col_major> b[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          wmma::load_matrix_sync(a[i], &held[token_half + i * FRAGMENT][d], NEURONS + PAD);
          wmma::load_matrix_sync(b[i], &met[feature_half + i * FRAGMENT][d], NEURONS + PAD);
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) wmma::mma_sync(sums[i / 2][i % 2], a[i / 2], b[i % 2], sums[i / 2][i % 2]);
      }
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < 4; ++i)
      wmma::store_matrix_sync(
          products + (token_half + i / 2 * FRAGMENT) * PRODUCT_STRIDE + feature_half + i % 2 * FRAGMENT,
          sums[i / 2][i % 2], PRODUCT_STRIDE, wmma::mem_row_major);
    __syncthreads();

    constexpr int SIZE = Packet<T>::SIZE;
    const bool wide = problem.features % SIZE == 0 && reinterpret_cast<uintptr_t>(output) % 16 == 0;
#pragma unroll 2
    for (int i = threadIdx.x; i < TOKENS * FEATURES / SIZE; i += THREADS) {
      const int t = i / (FEATURES / SIZE), f = i % (FEATURES / SIZE) * SIZE;
      if (first_token + t >= problem.tokens || first + f >= problem.features) continue;
      const int64_t at = (first_token + t) * problem.features + first + f;
      const float* product = products + t * PRODUCT_STRIDE + f;
      const int count = static_cast<int>(min(static_cast<int64_t>(SIZE), problem.features - first - f));
      T values[SIZE];
      if (wide) load_neighbours(output + at, values);
#pragma unroll
      for (int j = 0; j < SIZE; ++j) {
        if (j >= count) continue;
        // The product is rounded to the output's dtype before it is added, as eager PyTorch does.
        const float y = widen(wide ? values[j] : output[at + j]);
        values[j] = narrow<T>(y + widen(narrow<T>(product[j])));
        if (!wide) result[at + j] = values[j];
      }
      if (wide) store_neighbours(result + at, values);
    }
  }
}

// partials[part, f, k] = sum over the part's tokens of grad[t, f] x[t, S[k]].
template <class T, class X>
__global__ void __launch_bounds__(THREADS)
    gradient_kernel(Problem problem, const T* __restrict__ grad, float* __restrict__ partials) {
  constexpr int STEP = 32;  // tokens at a time
  alignas(32) __shared__ T grads[STEP][FEATURES + PAD];
  alignas(32) __shared__ T inputs[STEP][NEURONS + PAD];
  alignas(32) __shared__ float corner[THREADS / 32][FRAGMENT][FRAGMENT + 4];
  const int64_t first_feature = static_cast<int64_t>(blockIdx.y) * FEATURES;
  const int64_t first_k = static_cast<int64_t>(blockIdx.z) * NEURONS;
  const int64_t first_token = static_cast<int64_t>(blockIdx.x) * TOKENS_IN_PART;
  const int64_t last_token = min(first_token + TOKENS_IN_PART, problem.tokens);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int feature_half = warp / 2 * 32, neuron_half = warp % 2 * 64;
  wmma::fragment<wmma::accumulator, FRAGMENT, FRAGMENT, FRAGMENT, float> sums[2][4];
#pragma unroll
  for (int i = 0; i < 8; ++i) wmma::fill_fragment(sums[i / 4][i % 4], 0.0f);
  for (int64_t token = first_token; token < last_token; token += STEP) {
    __syncthreads();
    load_tile(grad, problem.features, problem.tokens, problem.features, token, first_feature, grads);
    load_selected<T, X>(problem, token, first_k, inputs);
    __syncthreads();
#pragma unroll
    for (int d = 0; d < STEP; d += FRAGMENT) {
      wmma::fragment<wmma::matrix_a, FRAGMENT, FRAGMENT, FRAGMENT, T, wmma::col_major> a[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) wmma::load_matrix_sync(a[i], &grads[d][feature_half + i * FRAGMENT], FEATURES + PAD);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        wmma::fragment<wmma::matrix_b, FRAGMENT, FRAGMENT, FRAGMENT, T, wmma::row_major> b;
        wmma::load_matrix_sync(b, &inputs[d][neuron_half + j * FRAGMENT], NEURONS + PAD);
#pragma unroll
        for (int i = 0; i < 2; ++i) wmma::mma_sync(sums[i][j], a[i], b, sums[i][j]);
      }
    }
  }
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const int64_t f = first_feature + feature_half + i / 4 * FRAGMENT;
    const int64_t k = first_k + neuron_half + i % 4 * FRAGMENT;
    __syncwarp();
    wmma::store_matrix_sync(&corner[warp][0][0], sums[i / 4][i % 4], FRAGMENT + 4, wmma::mem_row_major);
    __syncwarp();
#pragma unroll
    for (int e = lane; e < FRAGMENT * FRAGMENT; e += 32) {
      const int64_t row = f + e / FRAGMENT, column = k + e % FRAGMENT;
      if (row < problem.features && column < problem.neurons)
        partials[(blockIdx.x * problem.features + row) * problem.neurons + column] =
            corner[warp][e / FRAGMENT][e % FRAGMENT];
    }
  }
}

// Outer products on ordinary cores: a block sums a SIDE x SIDE tile of out[m, n] = sum_d a[d][m] b[d][n], DEPTH at a
// time.
constexpr int SIDE = 64;
constexpr int DEPTH = 16;
constexpr int EXACT_THREADS = 256;  // 16 x 16, each with 4 x 4 elements

// GRADIENT: m features, n neurons, d the tokens of part blockIdx.x. Else m tokens, n features, d neurons.
template <class T, bool GRADIENT>
__global__ void __launch_bounds__(EXACT_THREADS)
    exact_kernel(Problem problem,
                 const T* __restrict__ output,  // grad for the gradient
                 const T* __restrict__ direction, int64_t direction_stride, T* __restrict__ result) {
  __shared__ T a[DEPTH][SIDE + 1];
  __shared__ T b[DEPTH][SIDE + 1];
  const int64_t first_m = static_cast<int64_t>(GRADIENT ? blockIdx.y : blockIdx.x) * SIDE;
  const int64_t first_n = static_cast<int64_t>(GRADIENT ? blockIdx.z : blockIdx.y) * SIDE;
  const int64_t begin = GRADIENT ? static_cast<int64_t>(blockIdx.x) * TOKENS_IN_PART : 0;
  const int64_t end = GRADIENT ? min(begin + TOKENS_IN_PART, problem.tokens) : problem.neurons;
  const int64_t rows = GRADIENT ? problem.features : problem.tokens;
  const int64_t columns = GRADIENT ? problem.neurons : problem.features;
  const int x = threadIdx.x % 16, y = threadIdx.x / 16;
  T sums[4][4] = {};
  for (int64_t d = begin; d < end; d += DEPTH) {
    __syncthreads();
#pragma unroll
    for (int i = threadIdx.x; i < DEPTH * SIDE; i += EXACT_THREADS) {
      // Neighbouring threads take what lies side by side in memory.
      const int along = i % SIDE, across = i / SIDE;
      if constexpr (GRADIENT) {
        const bool there = d + across < end;
        a[across][along] =
            there && first_m + along < rows ? output[(d + across) * problem.features + first_m + along] : T(0);
        b[across][along] =
            there && first_n + along < columns ? *selected<T>(problem, d + across, first_n + along) : T(0);
      } else {
        const int deep = i % DEPTH, wide = i / DEPTH;
        const bool there = d + deep < end;
        a[deep][wide] = there && first_m + wide < rows ? *selected<T>(problem, first_m + wide, d + deep) : T(0);
        b[deep][wide] =
            there && first_n + wide < columns ? direction[(first_n + wide) * direction_stride + d + deep] : T(0);
      }
    }
    __syncthreads();
#pragma unroll
    for (int deep = 0; deep < DEPTH; ++deep)
#pragma unroll
      for (int i = 0; i < 4; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j) sums[i][j] += a[deep][y + 16 * i] * b[deep][x + 16 * j];
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int64_t m = first_m + y + 16 * i, n = first_n + x + 16 * j;
      if (m >= rows || n >= columns) continue;
      if constexpr (GRADIENT)
        result[(blockIdx.x * rows + m) * columns + n] = sums[i][j];
      else
        result[m * columns + n] = output[m * columns + n] + sums[i][j];
    }
  }
}

// sums[i] = the sum over parts of partials[part, i], in their order.
template <class C>
__global__ void __launch_bounds__(THREADS)
    add_parts_kernel(const C* __restrict__ partials, int64_t elements, int64_t parts, C* __restrict__ sums) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x;
  if (i >= elements) return;
  C sum = 0;
#pragma unroll 4
  for (int64_t part = 0; part < parts; ++part) sum += partials[part * elements + i];
  sums[i] = sum;
}

// [..., n] as [tokens, n] with neighbours side by side; a copy only where there is no such view.
Tensor as_rows(Tensor tensor) {
  STD_TORCH_CHECK(tensor.dim() > 0, "a tensor without dimensions: expected [..., features]");
  const int64_t last = tensor.size(tensor.dim() - 1);
  Tensor flat = torch::stable::reshape(tensor, {last ? tensor.numel() / last : 0, last});
  return flat.stride(1) == 1 || last == 1 ? flat : torch::stable::contiguous(flat);
}

bool is_half(ScalarType dtype) { return dtype == ScalarType::BFloat16 || dtype == ScalarType::Half; }

// The input as the kernels for `dtype` take it: as it is, or in float32 beside half precision (autocast), or converted.
Tensor input_for(ScalarType dtype, const Tensor& input) {
  const ScalarType own = input.scalar_type();
  const bool served = own == dtype || (is_half(dtype) && own == ScalarType::Float);
  return as_rows(served ? input : torch::stable::to(input, dtype));
}

Problem describe(const Tensor& x, const std::optional<Tensor>& index, int64_t tokens, int64_t features) {
  STD_TORCH_CHECK(x.size(0) == tokens, "input has ", x.size(0), " tokens, the output ", tokens,
                  ": expected as many of each");
  if (!index) return Problem{x.data_ptr(), nullptr, tokens, features, x.size(1), x.stride(0), 0};
  STD_TORCH_CHECK(index->scalar_type() == ScalarType::Long && index->dim() == 1, "index is ", index->scalar_type(), " ",
                  describe_shape(*index), ": expected int64 [neurons]");
  check_same_device("index", 0, *index, x);
  return Problem{
      x.data_ptr(),    static_cast<const int64_t*>(index->data_ptr()), tokens, features, index->numel(), x.stride(0),
      index->stride(0)};
}

// Calls use(T{}, X{}) with the dtypes of output and input.
template <class F>
void with_dtypes(ScalarType dtype, ScalarType input, const F& use) {
  const bool wider = dtype != input;
  if (dtype == ScalarType::BFloat16)
    wider ? use(__nv_bfloat16{}, float{}) : use(__nv_bfloat16{}, __nv_bfloat16{});
  else if (dtype == ScalarType::Half)
    wider ? use(__half{}, float{}) : use(__half{}, __half{});
  else if (dtype == ScalarType::Float)
    use(float{}, float{});
  else
    use(double{}, double{});
}

Tensor neuron_update(Tensor output, Tensor input, Tensor direction, std::optional<Tensor> index) {
  const ScalarType dtype = output.scalar_type();
  STD_TORCH_CHECK(is_floating(dtype), "output is ", dtype, ": expected a floating-point dtype");
  check_same_device("input", 0, input, output);
  check_same_device("direction", 0, direction, output);
  const OnDeviceOf device(output);
  const Tensor y = torch::stable::contiguous(output), x = input_for(dtype, input);
  if (direction.scalar_type() != dtype) direction = torch::stable::to(direction, dtype);
  direction = as_rows(direction);
  const int64_t features = y.size(y.dim() - 1);
  const Problem problem = describe(x, index, features ? y.numel() / features : x.size(0), features);
  STD_TORCH_CHECK(direction.dim() == 2 && direction.size(0) == features && direction.size(1) == problem.neurons,
                  "direction has shape ", describe_shape(direction), ": expected [", features, ", ", problem.neurons,
                  "]");
  Tensor result = torch::stable::empty_like(y);
  if (result.numel() == 0) return result;
  const int64_t strips = ceil_div<int64_t>(problem.tokens, TOKENS), tiles = ceil_div<int64_t>(features, FEATURES);
  with_dtypes(dtype, x.scalar_type(), [&](auto value, auto input_value) {
    using T = decltype(value);
    using X = decltype(input_value);
    const auto* from = static_cast<const T*>(y.data_ptr());
    const auto* step = static_cast<const T*>(direction.data_ptr());
    auto* to = static_cast<T*>(result.data_ptr());
    if constexpr (std::is_same_v<T, float> || std::is_same_v<T, double>) {
      const dim3 grid(grid_size(strips), static_cast<unsigned int>(tiles));
      exact_kernel<T, false><<<grid, EXACT_THREADS, 0, device.stream()>>>(problem, from, step, direction.stride(0), to);
    } else {
      const int64_t groups = std::clamp<int64_t>(ceil_div<int64_t>(WANTED_BLOCKS, strips), 1, tiles);
      const dim3 grid(grid_size(strips), static_cast<unsigned int>(groups));
      update_kernel<T, X><<<grid, THREADS, 0, device.stream()>>>(problem, from, step, direction.stride(0), to);
    }
  });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return result;
}

Tensor neuron_gradient(Tensor grad_output, Tensor input, std::optional<Tensor> index) {
  const ScalarType dtype = grad_output.scalar_type(), compute = compute_dtype_of(dtype);
  STD_TORCH_CHECK(is_floating(dtype), "grad_output is ", dtype, ": expected a floating-point dtype");
  check_same_device("input", 0, input, grad_output);
  const OnDeviceOf device(grad_output);
  const Tensor grad = torch::stable::contiguous(grad_output), x = input_for(dtype, input);
  const int64_t features = grad.size(grad.dim() - 1);
  const Problem problem = describe(x, index, features ? grad.numel() / features : x.size(0), features);
  const int64_t parts = ceil_div<int64_t>(problem.tokens, TOKENS_IN_PART);
  Tensor result = torch::stable::new_empty(grad, {features, problem.neurons}, compute);
  if (result.numel() == 0) return result;
  if (parts == 0) return torch::stable::zero_(result);
  const Tensor partials =
      parts == 1 ? result : torch::stable::new_empty(grad, {parts, features, problem.neurons}, compute);
  const auto tiles = [](int64_t size, int tile) { return static_cast<unsigned int>(ceil_div<int64_t>(size, tile)); };
  with_dtypes(dtype, x.scalar_type(), [&](auto value, auto input_value) {
    using T = decltype(value);
    using X = decltype(input_value);
    using C = Compute<T>;
    const auto* from = static_cast<const T*>(grad.data_ptr());
    auto* to = static_cast<C*>(partials.data_ptr());
    if constexpr (std::is_same_v<T, float> || std::is_same_v<T, double>) {
      const dim3 grid(grid_size(parts), tiles(features, SIDE), tiles(problem.neurons, SIDE));
      exact_kernel<T, true><<<grid, EXACT_THREADS, 0, device.stream()>>>(problem, from, nullptr, 0, to);
    } else {
      const dim3 grid(grid_size(parts), tiles(features, FEATURES), tiles(problem.neurons, NEURONS));
      gradient_kernel<T, X><<<grid, THREADS, 0, device.stream()>>>(problem, from, to);
    }
    STD_CUDA_KERNEL_LAUNCH_CHECK();
    if (parts == 1) return;
    const unsigned int blocks = grid_size(ceil_div<int64_t>(result.numel(), THREADS));
    add_parts_kernel<C>
        <<<blocks, THREADS, 0, device.stream()>>>(to, result.numel(), parts, static_cast<C*>(result.data_ptr()));
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return result;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(shapo_kernels, CUDA, m) {
  m.impl("neuron_update", TORCH_BOX(&neuron_update));
  m.impl("neuron_gradient", TORCH_BOX(&neuron_gradient));
}

}  // namespace shapo::cuda
