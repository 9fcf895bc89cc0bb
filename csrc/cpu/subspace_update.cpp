// The subspace update on the CPU: gather with squared norms, scale, perturb in place, restore.
//
// Each operator takes every layer in one call. A block of a layer (blocks.h) is moved between the layer and compact
// memory as bits (access.h), a span at a time through a buffer in the first-level cache, and the arithmetic runs over
// that buffer (vectors.h): what is scattered is never computed on, what is computed on is never scattered.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>
#include <optional>
#include <string>
#include <type_traits>
#include <vector>

#include "../layers.h"
#include "access.h"
#include "blocks.h"
#include "vectors.h"

namespace shapo::cpu {
namespace {

constexpr int64_t SPAN = 512;
// With rows a power of two apart the same column of different rows competes for one set of the first-level cache: more
// rows evict one another before they are written. With fewer, arithmetic waits for the stores in front of it.
constexpr int64_t ROWS_IN_SPAN = 12;

// Calls use(part, offset) for the parts of a block that are contiguous in compact memory and at most SPAN elements
// long; `offset` is the first element's place in the compact form.
template <class F>
void each_span(const Block& block, int64_t inner, const F& use) {
  const int64_t width = block.inner_end - block.inner_begin;
  const int64_t rows = width == inner ? std::clamp<int64_t>(SPAN / width, 1, ROWS_IN_SPAN) : 1;
  const int64_t step = std::min(width, SPAN);
  Block part = block;
  for (int64_t a = block.outer_begin; a < block.outer_end; a += rows) {
    part.outer_begin = a;
    part.outer_end = std::min(a + rows, block.outer_end);
    for (int64_t b = block.inner_begin; b < block.inner_end; b += step) {
      part.inner_begin = b;
      part.inner_end = std::min(b + step, block.inner_end);
      use(part, a * inner + b);
    }
  }
}

int64_t elements_of(const Block& part) {
  return (part.outer_end - part.outer_begin) * (part.inner_end - part.inner_begin);
}

template <class T>
using ComputeOf = typename Numeric<T>::Compute;

// sums += the squares of n values, which are also written to `to` in the compute dtype.
template <class T, class Write, class>
SHAPO_INLINE void widen_and_square(const void* from, void* to, int64_t n, double* sums) {
  const T* in = static_cast<const T*>(from);
  auto* out = static_cast<ComputeOf<T>*>(to);
  Double8 squares = load_bits<Double8>(sums);
  int64_t i = 0;
  for (; i + LANES <= n; i += LANES) {
    const auto x = Numeric<T>::load(in + i);
    if (Write::value) store_bits(out + i, x);
    squares += to_double(x) * to_double(x);
  }
  if (i < n) {
    const auto x = load_some(in + i, n - i);
    if (Write::value) store_some<ComputeOf<T>>(out + i, x, n - i);
    squares += to_double(x) * to_double(x);
  }
  store_bits(sums, squares);
}
SHAPO_VERSIONS(widen_and_square, void, (const void* from, void* to, int64_t n, double* sums), (from, to, n, sums))

// fresh = round(old + scale * direction); sums += ||realised||^2, <realised, step>, ||old||^2 in three times eight
// lanes. The product and the sum are rounded one by one to the compute dtype, then the result once to T.
template <class T, class R, class>
SHAPO_INLINE void step_span(const void* old, const void* direction, double scale, void* fresh, int64_t n,
                            double* sums) {
  using C = ComputeOf<T>;
  using Vector = typename Numeric<T>::Vector;
  const T* w = static_cast<const T*>(old);
  const C* d = static_cast<const C*>(direction);
  T* out = static_cast<T*>(fresh);
  const C s = static_cast<C>(scale);
  Double8 moved_squares = load_bits<Double8>(sums);
  Double8 moved_steps = load_bits<Double8>(sums + LANES);
  Double8 old_squares = load_bits<Double8>(sums + 2 * LANES);
  int64_t i = 0;
  for (; i + LANES <= n; i += LANES) {
    const Vector before = Numeric<T>::load(w + i);
    const Vector step = load_bits<Vector>(d + i) * s;
    Numeric<T>::store(out + i, before + step);
    const Double8 moved = rounded_to<R>(Numeric<T>::load(out + i)) - rounded_to<R>(before);
    moved_squares += moved * moved;
    moved_steps += moved * to_double(step);
    old_squares += to_double(before) * to_double(before);
  }
  if (i < n) {
    const int64_t rest = n - i;
    const Vector before = load_some(w + i, rest);
    const Vector step = load_some(d + i, rest) * s;
    T after[LANES];
    Numeric<T>::store(after, before + step);
    std::memcpy(out + i, after, rest * sizeof(T));
    const Double8 moved = rounded_to<R>(Numeric<T>::load(after)) - rounded_to<R>(before);
    moved_squares += keep_first(moved * moved, rest);
    moved_steps += keep_first(moved * to_double(step), rest);
    old_squares += to_double(before) * to_double(before);
  }
  store_bits(sums, moved_squares);
  store_bits(sums + LANES, moved_steps);
  store_bits(sums + 2 * LANES, old_squares);
}
SHAPO_VERSIONS(step_span, void,
               (const void* old, const void* direction, double scale, void* fresh, int64_t n, double* sums),
               (old, direction, scale, fresh, n, sums))

using WidenAndSquare = void (*)(const void*, void*, int64_t, double*);
using StepSpan = void (*)(const void*, const void*, double, void*, int64_t, double*);

WidenAndSquare widen_and_square_for(ScalarType dtype, bool write) {
  return with_type(dtype, [&](auto value) {
    using T = decltype(value);
    return write ? widen_and_square_for_cpu<T, std::true_type>() : widen_and_square_for_cpu<T, std::false_type>();
  });
}

// R is double where rounding to the compute dtype changes no value of the weight's dtype.
StepSpan step_span_for(ScalarType weight, ScalarType compute) {
  return with_type(weight, [&](auto value) -> StepSpan {
    using T = decltype(value);
    if (compute == weight || compute == ScalarType::Double) return step_span_for_cpu<T, double>();
    if (compute == ScalarType::BFloat16) return step_span_for_cpu<T, BFloat16>();
    if (compute == ScalarType::Half) return step_span_for_cpu<T, Half>();
    return step_span_for_cpu<T, std::conditional_t<std::is_same_v<T, double>, float, double>>();
  });
}

double total(const double* lanes) { return add_lanes(load_bits<Double8>(lanes)); }

// to[l * columns + c] = the sum of what the blocks of layer l stored, in the order of the blocks.
void add_blocks(const Blocks& blocks, size_t layers, const std::vector<double>& partial, int64_t columns, double* to) {
  std::fill(to, to + layers * columns, 0.0);
  for (size_t l = 0; l < layers; ++l)
    for (int64_t number = blocks.begin(l); number < blocks.end(l); ++number)
      for (int64_t c = 0; c < columns; ++c) to[l * columns + c] += partial[number * columns + c];
}

// Squares of the selected elements of each layer, added into squares[l]; the elements go to values[l] unless that is
// null.
void square_selected(const char* name, const std::vector<Layer>& layers, const std::vector<void*>* values,
                     double* squares) {
  const std::vector<Access> accesses = describe_access(name, layers);
  const Blocks blocks(layers);
  std::vector<double> partial(blocks.count());
  blocks.for_each([&](const Block& block) {
    const Layer& layer = layers[block.layer];
    const Access& access = accesses[block.layer];
    const int64_t value_bytes = layer.dtype == ScalarType::Double ? sizeof(double) : sizeof(float);
    const WidenAndSquare kernel = widen_and_square_for(layer.dtype, values != nullptr);
    alignas(CACHE_LINE) double staged[SPAN];
    alignas(CACHE_LINE) double sums[LANES] = {};
    access.prefetch_first(block);
    each_span(block, layer.inner(), [&](const Block& part, int64_t offset) {
      void* value = values ? static_cast<char*>((*values)[block.layer]) + offset * value_bytes : nullptr;
      access.load(part, block.outer_end, staged);
      kernel(staged, value, elements_of(part), sums);
    });
    partial[block.number] = total(sums);
  });
  add_blocks(blocks, layers.size(), partial, 1, squares);
}

Tensor new_sums(const Tensor& like, std::initializer_list<int64_t> shape) {
  return torch::stable::new_empty(like, shape, ScalarType::Double);
}

double* doubles(const Tensor& tensor) { return static_cast<double*>(tensor.data_ptr()); }

void gather_into(std::vector<Tensor> sources, std::vector<Tensor> indices, std::vector<int64_t> axes,
                 std::vector<Tensor> values, Tensor squared_norms) {
  const std::vector<Layer> layers = describe_layers("sources", sources, indices, axes);
  const std::vector<void*> compact = describe_compact("values", values, layers, true);
  check_float64_vector("squared_norms", squared_norms, layers.size(), layers.empty() ? squared_norms : sources[0]);
  square_selected("sources", layers, &compact, doubles(squared_norms));
}

Tensor selected_squared_norms(std::vector<Tensor> sources, std::vector<Tensor> indices, std::vector<int64_t> axes) {
  const std::vector<Layer> layers = describe_layers("sources", sources, indices, axes);
  Tensor result = new_sums(sources.at(0), {static_cast<int64_t>(layers.size())});
  square_selected("sources", layers, nullptr, doubles(result));
  return result;
}

Tensor squared_norms(std::vector<Tensor> values) {
  std::vector<Layer> layers;
  for (size_t l = 0; l < values.size(); ++l) {
    const ScalarType dtype = values[l].scalar_type();
    STD_TORCH_CHECK(is_floating(dtype), "values[", l, "] is ", dtype, ": expected a floating-point dtype");
    check_same_device("values", l, values[l], values[0]);
    if (!values[l].is_contiguous()) values[l] = torch::stable::contiguous(values[l]);
    layers.push_back(whole(values[l]));
  }
  const Blocks blocks(layers);
  std::vector<double> partial(blocks.count());
  blocks.for_each([&](const Block& block) {
    const Layer& layer = layers[block.layer];
    alignas(CACHE_LINE) double sums[LANES] = {};
    const char* first = static_cast<const char*>(layer.data) + block.inner_begin * bytes_of(layer.dtype);
    widen_and_square_for(layer.dtype, false)(first, nullptr, elements_of(block), sums);
    partial[block.number] = total(sums);
  });
  Tensor result = new_sums(values.at(0), {static_cast<int64_t>(layers.size())});
  add_blocks(blocks, layers.size(), partial, 1, doubles(result));
  return result;
}

Tensor perturbation_scale(Tensor squared_norms, Tensor rho, std::optional<Tensor> weight_squared_norms,
                          std::string norm, double eta) {
  STD_TORCH_CHECK(norm == "global" || norm == "layer" || norm == "none", "norm is \"", norm,
                  "\": expected \"global\", \"layer\" or \"none\"");
  const int64_t n = squared_norms.numel();
  check_float64_vector("squared_norms", squared_norms, n, squared_norms);
  check_float64_vector("rho", rho, n, squared_norms);
  if (weight_squared_norms) check_float64_vector("weight_squared_norms", *weight_squared_norms, n, squared_norms);
  const double* squares = doubles(squared_norms);
  const double* radii = doubles(rho);
  const double* weights = weight_squared_norms ? doubles(*weight_squared_norms) : nullptr;
  const double all = std::accumulate(squares, squares + n, 0.0);
  const double all_weights = weights ? std::accumulate(weights, weights + n, 0.0) : 0.0;
  Tensor scale = new_sums(squared_norms, {n});
  double* out = doubles(scale);
  for (int64_t l = 0; l < n; ++l) {
    if (norm == "none") {
      out[l] = std::isfinite(all) ? radii[l] : 0.0;
      continue;
    }
    const bool own = norm == "layer";
    const double square = own ? squares[l] : all;
    const double radius = weights ? radii[l] * std::sqrt(own ? weights[l] : all_weights) : radii[l];
    out[l] = std::isfinite(square) && square > 0.0 && std::isfinite(radius) ? radius / (std::sqrt(square) + eta) : 0.0;
  }
  return scale;
}

Tensor perturb_(std::vector<Tensor> weights, std::vector<Tensor> indices, std::vector<int64_t> axes,
                std::vector<Tensor> directions, Tensor scale, std::vector<Tensor> backups,
                std::optional<ScalarType> compute_dtype) {
  const std::vector<Layer> layers = describe_layers("weights", weights, indices, axes);
  const std::vector<void*> steps = describe_compact("directions", directions, layers, true);
  const std::vector<void*> kept = describe_compact("backups", backups, layers, false);
  check_float64_vector("scale", scale, layers.size(), layers.empty() ? scale : weights[0]);
  STD_TORCH_CHECK(!compute_dtype || is_floating(*compute_dtype), "compute_dtype is ", *compute_dtype,
                  ": expected float32, bfloat16, float16 or float64");
  const std::vector<Access> accesses = describe_access("weights", layers);
  const Blocks blocks(layers);
  std::vector<double> partial(3 * blocks.count());
  blocks.for_each([&](const Block& block) {
    const Layer& layer = layers[block.layer];
    const Access& access = accesses[block.layer];
    const double s = doubles(scale)[block.layer];
    const StepSpan step = step_span_for(layer.dtype, compute_dtype.value_or(layer.dtype));
    const WidenAndSquare square = widen_and_square_for(layer.dtype, false);
    const int64_t weight_bytes = access.element_bytes(), step_bytes = bytes_of(compute_dtype_of(layer.dtype));
    alignas(CACHE_LINE) double old[SPAN], fresh[SPAN];
    alignas(CACHE_LINE) double sums[3 * LANES] = {};
    access.prefetch_first(block);
    each_span(block, layer.inner(), [&](const Block& part, int64_t offset) {
      access.load(part, block.outer_end, old);
      std::memcpy(static_cast<char*>(kept[block.layer]) + offset * weight_bytes, old, elements_of(part) * weight_bytes);
      if (s == 0.0) {  // the weights keep every bit, whatever the direction holds
        square(old, nullptr, elements_of(part), sums + 2 * LANES);
        return;
      }
      step(old, static_cast<char*>(steps[block.layer]) + offset * step_bytes, s, fresh, elements_of(part), sums);
      access.store(part, block.outer_begin, fresh);  // nothing to ask for ahead: the load has just touched these lines
    });
    for (int64_t c = 0; c < 3; ++c) partial[3 * block.number + c] = total(sums + c * LANES);
  });
  Tensor result = new_sums(scale, {static_cast<int64_t>(layers.size()), 3});
  add_blocks(blocks, layers.size(), partial, 3, doubles(result));
  return result;
}

void restore_(std::vector<Tensor> weights, std::vector<Tensor> indices, std::vector<int64_t> axes,
              std::vector<Tensor> backups) {
  const std::vector<Layer> layers = describe_layers("weights", weights, indices, axes);
  const std::vector<void*> kept = describe_compact("backups", backups, layers, false);
  const std::vector<Access> accesses = describe_access("weights", layers);
  const Blocks blocks(layers);
  blocks.for_each([&](const Block& block) {
    const Access& access = accesses[block.layer];
    access.prefetch_first(block);
    each_span(block, layers[block.layer].inner(), [&](const Block& part, int64_t offset) {
      access.store(part, block.outer_end, static_cast<char*>(kept[block.layer]) + offset * access.element_bytes());
    });
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(shapo_kernels, CPU, m) {
  m.impl("gather_into", TORCH_BOX(&gather_into));
  m.impl("squared_norms", TORCH_BOX(&squared_norms));
  m.impl("selected_squared_norms", TORCH_BOX(&selected_squared_norms));
  m.impl("perturbation_scale", TORCH_BOX(&perturbation_scale));
  m.impl("perturb_", TORCH_BOX(&perturb_));
  m.impl("restore_", TORCH_BOX(&restore_));
}

}  // namespace shapo::cpu
