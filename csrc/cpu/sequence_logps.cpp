// Log-probabilities of labels under a softmax, and their gradient; each reads the logits from memory once.
//
//     log p = x_y - m - log S,   m = max_v x_v,   S = sum_v exp(x_v - m)
//     d log p / d x_v = [v = y] - exp(x_v - m) / S
//
// A row is walked in blocks that stay in the first-level cache: a block's maximum is taken, the sum so far is scaled to
// it where it is a new one, and the block's exponentials are added. Sums over a block are kept for each of 64
// positions in the compute dtype, sums over blocks in float64. A row belongs to one thread, so that the number of
// threads changes no bit.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <tuple>
#include <type_traits>

#include "../tokens.h"
#include "blocks.h"
#include "exponential.h"
#include "vectors.h"

namespace shapo::cpu {
namespace {

constexpr int64_t BLOCK = 2048;
// Elements that are added side by side, whatever the registers' width: one sum would wait for itself at every addition.
template <class C>
constexpr int64_t STEP = 256 / sizeof(C);

// A block of a row in the compute dtype, -infinity behind it up to a whole step: where it lies if that serves, else in
// `buffer`.
template <class T, class C>
SHAPO_INLINE const C* read_block(const T* from, int64_t stride, int64_t count, C* buffer) {
  if (std::is_same_v<T, C> && stride == 1 && count % STEP<C> == 0) return reinterpret_cast<const C*>(from);
  T packed[BLOCK];
  if (stride != 1) {
    for (int64_t i = 0; i < count; ++i) packed[i] = from[i * stride];
    from = packed;
  }
  int64_t i = 0;
  for (; i + LANES <= count; i += LANES) store_bits(buffer + i, Numeric<T>::load(from + i));
  if (i < count) store_bits(buffer + i, load_some(from + i, count - i));
  for (i = count; i % STEP<C> != 0; ++i) buffer[i] = -std::numeric_limits<C>::infinity();
  return buffer;
}

template <class T, class C>
SHAPO_INLINE void write_block(T* to, int64_t stride, int64_t count, const C* buffer) {
  T packed[BLOCK];
  T* at = stride == 1 ? to : packed;
  int64_t i = 0;
  for (; i + LANES <= count; i += LANES) Numeric<T>::store(at + i, load_bits<typename Numeric<T>::Vector>(buffer + i));
  if (i < count) store_some(at + i, load_bits<typename Numeric<T>::Vector>(buffer + i), count - i);
  if (stride != 1)
    for (i = 0; i < count; ++i) to[i * stride] = packed[i];
}

template <class W, class C>
SHAPO_INLINE C highest_of(const C* x, int64_t count) {
  using Vector = typename W::Vector;
  constexpr int64_t UNROLL = STEP<C> / W::LANES;
  Vector highest[UNROLL];
  for (Vector& h : highest) h = Vector{} - std::numeric_limits<C>::infinity();
  for (int64_t i = 0; i < count; i += STEP<C>) {
    for (int64_t u = 0; u < UNROLL; ++u) {
      const Vector v = W::load(x + i + u * W::LANES);
      highest[u] = v > highest[u] ? v : highest[u];
    }
  }
  C result = -std::numeric_limits<C>::infinity();
  for (const Vector& h : highest)
    for (int64_t lane = 0; lane < W::LANES; ++lane) result = h[lane] > result ? h[lane] : result;
  return result;
}

struct Normalizer {
  double highest = -std::numeric_limits<double>::infinity();
  double sum = 0.0;
  double weighted = 0.0;  // sum of exp(x - m) (x - m), for the entropy
};

template <class W, bool ENTROPY, class C>
SHAPO_INLINE void add_block(const C* x, int64_t count, Normalizer& total) {
  using Vector = typename W::Vector;
  constexpr int64_t UNROLL = STEP<C> / W::LANES;
  const double highest = std::max<double>(total.highest, highest_of<W>(x, count));
  if (highest > total.highest && total.sum != 0.0) {
    const double rise = highest - total.highest, scale = std::exp(-rise);
    if (ENTROPY) total.weighted = scale * (total.weighted - rise * total.sum);
    total.sum *= scale;
  }
  total.highest = highest;
  // Nothing but -infinity so far: exp(-inf - 0) is 0 where exp(-inf - -inf) would be NaN.
  const C shift = highest == -std::numeric_limits<double>::infinity() ? C(0) : static_cast<C>(highest);
  Vector sums[UNROLL] = {}, weighted[UNROLL] = {};
  for (int64_t i = 0; i < count; i += STEP<C>) {
    for (int64_t u = 0; u < UNROLL; ++u) {
      const Vector below = W::load(x + i + u * W::LANES) - shift;
      const Vector e = W::exp_below_zero(below);
      sums[u] += e;
      if (ENTROPY) weighted[u] += e == 0 ? Vector{} : e * below;  // not 0 * -infinity
    }
  }
  for (int64_t u = 0; u < UNROLL; ++u) {
    for (int64_t lane = 0; lane < W::LANES; ++lane) {
      total.sum += sums[u][lane];
      if (ENTROPY) total.weighted += weighted[u][lane];
    }
  }
}

template <class T, class Entropy, class Registers>
SHAPO_INLINE void normalize(const void* row, int64_t stride, int64_t vocabulary, Normalizer& total) {
  using C = typename Numeric<T>::Compute;
  const T* x = static_cast<const T*>(row);
  alignas(64) C buffer[BLOCK];
  for (int64_t begin = 0; begin < vocabulary; begin += BLOCK) {
    const int64_t count = std::min(BLOCK, vocabulary - begin);
    const C* block = read_block<T, C>(x + begin * stride, stride, count, buffer);
    add_block<Wide<C, Registers>, Entropy::value>(block, ceil_div(count, STEP<C>) * STEP<C>, total);
  }
}
SHAPO_VERSIONS(normalize, void, (const void* row, int64_t stride, int64_t vocabulary, Normalizer& total),
               (row, stride, vocabulary, total))

// to[v] = factor * exp(from[v] - highest); `to` may be `from`.
template <class T, class Registers>
SHAPO_INLINE void scale_softmax(const void* from, int64_t from_stride, void* to, int64_t to_stride, int64_t vocabulary,
                                double highest, double factor) {
  using C = typename Numeric<T>::Compute;
  using W = Wide<C, Registers>;
  const T* x = static_cast<const T*>(from);
  T* result = static_cast<T*>(to);
  alignas(64) C buffer[BLOCK];
  for (int64_t begin = 0; begin < vocabulary; begin += BLOCK) {
    const int64_t count = std::min(BLOCK, vocabulary - begin);
    const C* block = read_block<T, C>(x + begin * from_stride, from_stride, count, buffer);
    const bool direct = block != buffer && to_stride == 1;
    C* written = direct ? reinterpret_cast<C*>(result + begin) : buffer;
    for (int64_t i = 0; i < count; i += W::LANES) {
      const auto e = W::exp_below_zero(W::load(block + i) - static_cast<C>(highest));
      W::store(written + i, e * static_cast<C>(factor));
    }
    if (!direct) write_block(result + begin * to_stride, to_stride, count, buffer);
  }
}
SHAPO_VERSIONS(scale_softmax, void,
               (const void* from, int64_t from_stride, void* to, int64_t to_stride, int64_t vocabulary, double highest,
                double factor),
               (from, from_stride, to, to_stride, vocabulary, highest, factor))

// Calls work(token) for each, a few at a time where they are small.
template <class F>
void share_tokens(const Tokens& tokens, const F& work) {
  const int64_t together = std::max<int64_t>(1, BLOCK_ELEMENTS / std::max<int64_t>(1, tokens.vocabulary));
  share(ceil_div(tokens.count(), together), tokens.count() * tokens.vocabulary, [&](int64_t task) {
    const int64_t end = std::min((task + 1) * together, tokens.count());
    for (int64_t token = task * together; token < end; ++token) work(token);
  });
}

double value_at(const void* data, ScalarType dtype, int64_t element) {
  return with_type(dtype, [&](auto type) {
    using T = decltype(type);
    return to_double(load_some(static_cast<const T*>(data) + element, 1))[0];
  });
}

void set_at(void* data, ScalarType dtype, int64_t element, double value) {
  with_type(dtype, [&](auto type) {
    using T = decltype(type);
    using C = typename Numeric<T>::Compute;
    store_some(static_cast<T*>(data) + element, typename Numeric<T>::Vector{} + static_cast<C>(value), 1);
  });
}

using Normalize = void (*)(const void*, int64_t, int64_t, Normalizer&);
using ScaleSoftmax = void (*)(const void*, int64_t, void*, int64_t, int64_t, double, double);

std::tuple<Tensor, Tensor, Tensor> token_logps(Tensor logits, Tensor labels, int64_t ignore_index, int64_t shift,
                                               int64_t first, int64_t vocabulary, bool entropy) {
  const Tokens tokens = describe_tokens(logits, labels, ignore_index, shift, first);
  int64_t label = 0;
  for (int64_t token = 0; token < tokens.count(); ++token) {
    STD_TORCH_CHECK(!tokens.labelled(token, &label) || (label + first >= 0 && label + first < vocabulary),
                    "labels contains ", label + first, ": expected ", ignore_index, " (ignored) or a token in [0, ",
                    vocabulary, ")");
  }
  const ScalarType dtype = compute_dtype_of(tokens.dtype);
  Tensor logps = torch::stable::new_empty(logits, {tokens.rows, tokens.length}, dtype);
  Tensor normalizers = torch::stable::new_empty(logits, {2, tokens.rows, tokens.length}, dtype);
  Tensor entropies = torch::stable::new_empty(logits, {entropy ? tokens.rows : 0, tokens.length}, dtype);
  const Normalize sum_up = with_type(tokens.dtype, [&](auto type) -> Normalize {
    using T = decltype(type);
    return entropy ? normalize_for_cpu<T, std::true_type>() : normalize_for_cpu<T, std::false_type>();
  });
  void *logp_data = logps.data_ptr(), *normalizer_data = normalizers.data_ptr(), *entropy_data = entropies.data_ptr();
  share_tokens(tokens, [&](int64_t token) {
    int64_t own = 0;
    Normalizer total;
    double logp = 0.0, spread = 0.0;
    if (tokens.labelled(token, &own)) {
      const void* row = tokens.at(token);
      sum_up(row, tokens.stride, tokens.vocabulary, total);
      const double log_sum = std::log(total.sum);
      if (tokens.holds(own)) logp = value_at(row, tokens.dtype, own * tokens.stride) - total.highest - log_sum;
      spread = log_sum - total.weighted / total.sum;
    } else {
      total = Normalizer{0.0, 1.0, 0.0};
    }
    set_at(logp_data, dtype, token, logp);
    set_at(normalizer_data, dtype, token, total.highest);
    set_at(normalizer_data, dtype, tokens.count() + token, total.sum);
    if (entropy) set_at(entropy_data, dtype, token, spread);
  });
  return {logps, normalizers, entropies};
}

// Writes the gradient of sum(grad * logps) with respect to the logits to `to`, which may be their own memory.
void write_gradient(const Tensor& logits, const Tensor& to, const Tensor& labels, const Tensor& logps,
                    const Tensor& normalizers, const Tensor& grad, int64_t ignore_index, int64_t shift, int64_t first) {
  const Tokens tokens = describe_tokens(logits, labels, ignore_index, shift, first);
  const Tokens written = describe_tokens(to, labels, ignore_index, shift, first);
  const ScalarType dtype = compute_dtype_of(tokens.dtype);
  check_per_token("logps", logps, tokens, 1);
  check_per_token("normalizers", normalizers, tokens, 2);
  check_per_token("grad", grad, tokens, 1);
  const ScaleSoftmax scale =
      with_type(tokens.dtype, [](auto type) -> ScaleSoftmax { return scale_softmax_for_cpu<decltype(type)>(); });
  const void *logp_data = logps.data_ptr(), *normalizer_data = normalizers.data_ptr(), *grad_data = grad.data_ptr();
  share_tokens(tokens, [&](int64_t token) {
    char* row = written.at(token);
    int64_t label = 0;
    if (!tokens.labelled(token, &label)) {
      if (written.stride == 1)
        std::memset(row, 0, tokens.vocabulary * bytes_of(tokens.dtype));
      else
        for (int64_t v = 0; v < tokens.vocabulary; ++v) set_at(row, tokens.dtype, v * written.stride, 0.0);
      return;
    }
    const double slope = value_at(grad_data, dtype, token);
    const double sum = value_at(normalizer_data, dtype, tokens.count() + token);
    scale(tokens.at(token), tokens.stride, row, written.stride, tokens.vocabulary,
          value_at(normalizer_data, dtype, token), -slope / sum);
    // 1 - p without cancellation where p is close to 1.
    if (tokens.holds(label))
      set_at(row, tokens.dtype, label * written.stride, -slope * std::expm1(value_at(logp_data, dtype, token)));
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

STABLE_TORCH_LIBRARY_IMPL(shapo_kernels, CPU, m) {
  m.impl("token_logps", TORCH_BOX(&token_logps));
  m.impl("token_logps_gradient", TORCH_BOX(&token_logps_gradient));
  m.impl("token_logps_gradient_", TORCH_BOX(&token_logps_gradient_));
}

}  // namespace shapo::cpu
