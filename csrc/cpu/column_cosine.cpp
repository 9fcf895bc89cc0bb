// The cosine of every neuron's value vector with one direction, in one pass over the weight.
//
//     cosine_i = <W_i, v> / (||W_i|| ||v||),   0 where a norm is zero
//
// Dot products and squared norms are formed together, in float64, in which no square of a float32 number overflows; a
// float64 weight is the reference's. Neurons that lie next to one another in memory
// (columns of a contiguous weight) share a walk down the rows, eight rows at a time; neurons that are contiguous
// themselves are walked one by one; any other stride is first packed row by row. The walk down rows asks for nothing
// ahead: with rows a multiple of a page apart, lines of later rows would evict those of the rows at hand.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>
#include <vector>

#include "../layers.h"
#include "blocks.h"
#include "vectors.h"

namespace shapo::cpu {
namespace {

constexpr int64_t ROWS_TOGETHER = 8;
constexpr int64_t ROWS_IN_PART = 128;
constexpr int64_t MAX_PARTS = 32;
constexpr int64_t PANEL = 2048;
constexpr int64_t NEURONS_IN_BLOCK = 128;
// Contiguous neurons: every line is asked for a little ahead, and one line of each page far ahead, so that the page is
// found by then. The second takes 12 layers of 3072 x 768 float32 from 5.4 ms to 4.2 (two Zen 3 cores).
constexpr int64_t BYTES_AHEAD = 1024;
constexpr int64_t PAGE = 4096;
constexpr int64_t BYTES_TO_PAGE_AHEAD = 16384;

// dots[i] += sum_r rows[r][i] * v[r] and squares[i] += sum_r rows[r][i]^2 for n neighbouring neurons; both sums are
// padded to a multiple of LANES.
template <class T, class>
SHAPO_INLINE void add_rows(const void* first, int64_t row_elements, int64_t rows, const double* v, int64_t n,
                           double* dots, double* squares) {
  const T* weight = static_cast<const T*>(first);
  int64_t i = 0;
  for (; i + LANES <= n; i += LANES) {
    Double8 dot = load_bits<Double8>(dots + i);
    Double8 square = load_bits<Double8>(squares + i);
    for (int64_t r = 0; r < rows; ++r) {
      const Double8 x = to_double(Numeric<T>::load(weight + r * row_elements + i));
      dot += x * v[r];
      square += x * x;
    }
    store_bits(dots + i, dot);
    store_bits(squares + i, square);
  }
  if (i == n) return;
  Double8 dot = load_bits<Double8>(dots + i);
  Double8 square = load_bits<Double8>(squares + i);
  for (int64_t r = 0; r < rows; ++r) {
    const Double8 x = to_double(load_some(weight + r * row_elements + i, n - i));
    dot += x * v[r];
    square += x * x;
  }
  store_bits(dots + i, dot);
  store_bits(squares + i, square);
}
SHAPO_VERSIONS(add_rows, void,
               (const void* first, int64_t row_elements, int64_t rows, const double* v, int64_t n, double* dots,
                double* squares),
               (first, row_elements, rows, v, n, dots, squares))

// sums = <w, v> and <w, w> for one contiguous neuron of n elements. Two sums of eight lanes each: one would wait for
// itself at every addition.
template <class T, class>
SHAPO_INLINE void add_neuron(const void* neuron, const double* v, int64_t n, double* dot, double* square) {
  const T* w = static_cast<const T*>(neuron);
  Double8 even_dots = {}, odd_dots = {}, even_squares = {}, odd_squares = {};
  int64_t i = 0;
  while (i + 2 * LANES <= n) {
    __builtin_prefetch(reinterpret_cast<const char*>(w + i) + BYTES_TO_PAGE_AHEAD);
    const int64_t end = std::min<int64_t>(i + PAGE / sizeof(T), n);
    for (; i + 2 * LANES <= end; i += 2 * LANES) {
      __builtin_prefetch(reinterpret_cast<const char*>(w + i) + BYTES_AHEAD);
      const Double8 even = to_double(Numeric<T>::load(w + i)), odd = to_double(Numeric<T>::load(w + i + LANES));
      even_dots += even * load_bits<Double8>(v + i);
      odd_dots += odd * load_bits<Double8>(v + i + LANES);
      even_squares += even * even;
      odd_squares += odd * odd;
    }
  }
  for (; i < n; i += LANES) {
    const int64_t count = std::min(LANES, n - i);
    const Double8 x = to_double(load_some(w + i, count));
    even_dots += x * load_some(v + i, count);
    even_squares += x * x;
  }
  *dot = add_lanes(even_dots + odd_dots);
  *square = add_lanes(even_squares + odd_squares);
}
SHAPO_VERSIONS(add_neuron, void, (const void* neuron, const double* v, int64_t n, double* dot, double* square),
               (neuron, v, n, dot, square))

using AddRows = void (*)(const void*, int64_t, int64_t, const double*, int64_t, double*, double*);
using AddNeuron = void (*)(const void*, const double*, int64_t, double*, double*);

struct Weight {
  const char* data;
  ScalarType dtype;
  int64_t bytes;  // of an element
  int64_t neurons, components;
  int64_t neuron_stride, component_stride;  // in elements
};

struct Cosines {
  float* data;
  double direction_norm;

  void write(int64_t neuron, double dot, double square) const {
    const double norms = std::sqrt(square) * direction_norm;
    data[neuron] = norms == 0.0 ? 0.0f : static_cast<float>(dot / norms);
  }
};

// Calls use(T{}) with the C++ type of a dtype of at most 32 bits.
template <class F>
auto with_narrow_type(ScalarType dtype, const F& use) {
  if (dtype == ScalarType::BFloat16) return use(BFloat16{});
  return dtype == ScalarType::Half ? use(Half{}) : use(float{});
}

// Neurons that are not contiguous: parts of the components and panels of neurons are shared among threads, the parts'
// sums are added in order.
void walk_rows(const Weight& weight, const std::vector<double>& v, const Cosines& cosines) {
  const AddRows add =
      with_narrow_type(weight.dtype, [](auto value) -> AddRows { return add_rows_for_cpu<decltype(value)>(); });
  const int64_t parts = std::clamp<int64_t>(ceil_div(weight.components, ROWS_IN_PART), 1, MAX_PARTS);
  const int64_t panels = ceil_div(weight.neurons, PANEL), padded = panels * PANEL;
  const int64_t rows_in_part = ceil_div(weight.components, parts);
  std::vector<double> all_dots(parts * padded), all_squares(parts * padded);
  const bool packed = weight.neuron_stride != 1;
  share(parts * panels, weight.neurons * weight.components, [&](int64_t task) {
    const int64_t part = task / panels, begin = task % panels * PANEL;
    const int64_t n = std::min(PANEL, weight.neurons - begin);
    const int64_t last = std::min((part + 1) * rows_in_part, weight.components);
    double* dots = all_dots.data() + part * padded + begin;
    double* squares = all_squares.data() + part * padded + begin;
    std::vector<char> row(packed ? n * weight.bytes : 0);
    for (int64_t r = part * rows_in_part; r < last; r += packed ? 1 : ROWS_TOGETHER) {
      const char* at = weight.data + (r * weight.component_stride + begin * weight.neuron_stride) * weight.bytes;
      if (packed) {
        for (int64_t i = 0; i < n; ++i)
          std::memcpy(row.data() + i * weight.bytes, at + i * weight.neuron_stride * weight.bytes, weight.bytes);
        add(row.data(), 0, 1, v.data() + r, n, dots, squares);
      } else {
        add(at, weight.component_stride, std::min(ROWS_TOGETHER, last - r), v.data() + r, n, dots, squares);
      }
    }
  });
  share(ceil_div(weight.neurons, NEURONS_IN_BLOCK), parts * weight.neurons, [&](int64_t block) {
    const int64_t begin = block * NEURONS_IN_BLOCK, end = std::min(begin + NEURONS_IN_BLOCK, weight.neurons);
    for (int64_t part = 1; part < parts; ++part) {
      for (int64_t i = begin; i < end; ++i) {
        all_dots[i] += all_dots[part * padded + i];
        all_squares[i] += all_squares[part * padded + i];
      }
    }
    for (int64_t i = begin; i < end; ++i) cosines.write(i, all_dots[i], all_squares[i]);
  });
}

void walk_neurons(const Weight& weight, const std::vector<double>& v, const Cosines& cosines) {
  const AddNeuron add =
      with_narrow_type(weight.dtype, [](auto value) -> AddNeuron { return add_neuron_for_cpu<decltype(value)>(); });
  share(ceil_div(weight.neurons, NEURONS_IN_BLOCK), weight.neurons * weight.components, [&](int64_t block) {
    const int64_t end = std::min((block + 1) * NEURONS_IN_BLOCK, weight.neurons);
    for (int64_t i = block * NEURONS_IN_BLOCK; i < end; ++i) {
      double dot, square;
      add(weight.data + i * weight.neuron_stride * weight.bytes, v.data(), weight.components, &dot, &square);
      cosines.write(i, dot, square);
    }
  });
}

Tensor column_cosine(Tensor weight, Tensor direction, int64_t axis) {
  STD_TORCH_CHECK(axis == 0 || axis == 1, "axis is ", axis, ": expected 0 (neurons are rows) or 1 (columns)");
  STD_TORCH_CHECK(weight.dim() == 2 && is_floating(weight.scalar_type()) && weight.scalar_type() != ScalarType::Double,
                  "weight is ", weight.scalar_type(), " ", describe_shape(weight),
                  ": expected two dimensions of float32, bfloat16 or float16");
  const Weight w{static_cast<const char*>(weight.data_ptr()),
                 weight.scalar_type(),
                 bytes_of(weight.scalar_type()),
                 weight.size(axis),
                 weight.size(1 - axis),
                 weight.stride(axis),
                 weight.stride(1 - axis)};
  STD_TORCH_CHECK(
      direction.dim() == 1 && direction.size(0) == w.components && direction.scalar_type() == ScalarType::Float,
      "direction is ", direction.scalar_type(), " ", describe_shape(direction), ": expected float32 [", w.components,
      "]");
  check_same_device("direction", 0, direction, weight);

  std::vector<double> v(w.components);
  const float* from = static_cast<const float*>(direction.data_ptr());
  for (int64_t r = 0; r < w.components; ++r) v[r] = from[r * direction.stride(0)];
  Tensor result = torch::stable::new_empty(weight, {w.neurons}, ScalarType::Float);
  const Cosines cosines{static_cast<float*>(result.data_ptr()),
                        std::sqrt(std::inner_product(v.begin(), v.end(), v.begin(), 0.0))};
  if (w.component_stride == 1 && w.neuron_stride != 1)
    walk_neurons(w, v, cosines);
  else
    walk_rows(w, v, cosines);
  return result;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(shapo_kernels, CPU, m) { m.impl("column_cosine", TORCH_BOX(&column_cosine)); }

}  // namespace shapo::cpu
