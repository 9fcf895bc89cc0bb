// Eight lanes of arithmetic that give the same bits on every instruction set, and how a kernel is compiled for several.
//
// Lane i always sums the elements i, i + 8, ... in float64, so that a sum does not depend on the machine. Sources are
// compiled with -ffp-contract=off: a product is rounded before it is added, as in the PyTorch reference.
//
// No vector is wider than a register of the version that it is compiled for, where that version is meant to be fast:
// GCC keeps wider ones in memory and moves them word by word (column_cosine took twice as long under AVX2).

#pragma once

#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <string_view>
#include <type_traits>

namespace shapo::cpu {

constexpr int64_t LANES = 8;

using Float8 [[gnu::vector_size(32)]] = float;
using Double4 [[gnu::vector_size(32)]] = double;
using Mask4 [[gnu::vector_size(32)]] = int64_t;
using Word8 [[gnu::vector_size(32)]] = uint32_t;
using Short8 [[gnu::vector_size(16)]] = uint16_t;

struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

#define SHAPO_INLINE __attribute__((always_inline)) inline

struct Double8 {
  Double4 low, high;

  SHAPO_INLINE double operator[](int64_t lane) const { return lane < 4 ? low[lane] : high[lane - 4]; }
  SHAPO_INLINE Double8& operator+=(Double8 x) { return *this = {low + x.low, high + x.high}; }
};
SHAPO_INLINE Double8 operator+(Double8 x, Double8 y) { return {x.low + y.low, x.high + y.high}; }
SHAPO_INLINE Double8 operator-(Double8 x, Double8 y) { return {x.low - y.low, x.high - y.high}; }
SHAPO_INLINE Double8 operator*(Double8 x, Double8 y) { return {x.low * y.low, x.high * y.high}; }
SHAPO_INLINE Double8 operator*(Double8 x, double y) { return {x.low * y, x.high * y}; }
SHAPO_INLINE Double8 operator+(Double8 x, double y) { return {x.low + y, x.high + y}; }

template <class To, class From>
SHAPO_INLINE To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

template <class Vector, class T>
SHAPO_INLINE Vector load_bits(const T* from) {
  static_assert(sizeof(Vector) == LANES * sizeof(T));
  Vector vector;
  if constexpr (std::is_same_v<Vector, Double8>) {  // a copy of the whole would go through memory
    std::memcpy(&vector.low, from, sizeof(vector.low));
    std::memcpy(&vector.high, from + LANES / 2, sizeof(vector.high));
  } else {
    std::memcpy(&vector, from, sizeof(vector));
  }
  return vector;
}

template <class Vector, class T>
SHAPO_INLINE void store_bits(T* to, Vector vector) {
  static_assert(sizeof(Vector) == LANES * sizeof(T));
  if constexpr (std::is_same_v<Vector, Double8>) {
    std::memcpy(to, &vector.low, sizeof(vector.low));
    std::memcpy(to + LANES / 2, &vector.high, sizeof(vector.high));
  } else {
    std::memcpy(to, &vector, sizeof(vector));
  }
}

// How a dtype enters and leaves arithmetic: `Vector` holds eight values in the compute dtype.
template <class T>
struct Numeric;

template <>
struct Numeric<float> {
  using Compute = float;
  using Vector = Float8;
  static SHAPO_INLINE Float8 load(const float* from) { return load_bits<Float8>(from); }
  static SHAPO_INLINE void store(float* to, Float8 x) { store_bits(to, x); }
  static SHAPO_INLINE Float8 round(Float8 x) { return x; }
};

template <>
struct Numeric<double> {
  using Compute = double;
  using Vector = Double8;
  static SHAPO_INLINE Double8 load(const double* from) { return load_bits<Double8>(from); }
  static SHAPO_INLINE void store(double* to, Double8 x) { store_bits(to, x); }
};

template <>
struct Numeric<BFloat16> {
  using Compute = float;
  using Vector = Float8;
  // Each value's bits above sixteen zeros: two unpackings instead of two conversions, and no shift.
  static SHAPO_INLINE Float8 widen(Short8 bits) {
    return bit_cast<Float8>(
        __builtin_shufflevector(Short8{}, bits, 0, 8, 1, 9, 2, 10, 3, 11, 4, 12, 5, 13, 6, 14, 7, 15));
  }
  static SHAPO_INLINE Short8 narrow(Float8 x) {
    const Word8 bits = bit_cast<Word8>(x);
    const Word8 rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    const Word8 result = (bits & 0x7fffffffu) > 0x7f800000u ? Word8{} + 0x7fc0u : rounded;
    return __builtin_convertvector(result, Short8);
  }
  static SHAPO_INLINE Float8 load(const BFloat16* from) { return widen(load_bits<Short8>(from)); }
  static SHAPO_INLINE void store(BFloat16* to, Float8 x) { store_bits(to, narrow(x)); }
  static SHAPO_INLINE Float8 round(Float8 x) { return widen(narrow(x)); }
};

template <>
struct Numeric<Half> {
  using Compute = float;
  using Vector = Float8;
  static SHAPO_INLINE Float8 widen(Short8 half) {
    const Word8 bits = __builtin_convertvector(half, Word8);
    const Word8 magnitude = bits & 0x7fffu;
    const Word8 rebias = Word8{} + (112u << 23);
    const Word8 normal = (magnitude << 13) + rebias;
    const Word8 special = normal + rebias;  // infinity and NaN: the exponent becomes 255
    // A subnormal is a multiple of 2^-24, exact in float.
    const Word8 subnormal = bit_cast<Word8>(__builtin_convertvector(magnitude, Float8) * 0x1p-24f);
    const Word8 finite = magnitude < 0x400u ? subnormal : normal;
    return bit_cast<Float8>((magnitude >= 0x7c00u ? special : finite) | ((bits & 0x8000u) << 16));
  }
  static SHAPO_INLINE Short8 narrow(Float8 x) {
    const Word8 bits = bit_cast<Word8>(x);
    const Word8 magnitude = bits & 0x7fffffffu;
    const Word8 rebiased = magnitude - (112u << 23);
    const Word8 normal = (rebiased + 0xfffu + ((rebiased >> 13) & 1u)) >> 13;
    // Below 2^-14 the spacing of halves is that of floats next to 0.5: the addition rounds to it.
    const Word8 subnormal = bit_cast<Word8>(bit_cast<Float8>(magnitude) + 0.5f) - 0x3f000000u;
    const Word8 special = magnitude > 0x7f800000u ? Word8{} + 0x7e00u : Word8{} + 0x7c00u;
    const Word8 finite = magnitude < 0x38800000u ? subnormal : normal;
    const Word8 result = (magnitude >= 0x47800000u ? special : finite) | ((bits >> 16) & 0x8000u);
    return __builtin_convertvector(result, Short8);
  }
  static SHAPO_INLINE Float8 load(const Half* from) { return widen(load_bits<Short8>(from)); }
  static SHAPO_INLINE void store(Half* to, Float8 x) { store_bits(to, narrow(x)); }
  static SHAPO_INLINE Float8 round(Float8 x) { return widen(narrow(x)); }
};

// Between eight lanes at once and halves: GCC 12 makes a conversion of each half from conversions of two lanes.
using Wide8 [[gnu::vector_size(64)]] = double;
SHAPO_INLINE Double8 to_double(Float8 x) {
  const Wide8 wide = __builtin_convertvector(x, Wide8);
  return {__builtin_shufflevector(wide, wide, 0, 1, 2, 3), __builtin_shufflevector(wide, wide, 4, 5, 6, 7)};
}
SHAPO_INLINE Double8 to_double(Double8 x) { return x; }
SHAPO_INLINE Float8 to_float(Double8 x) {
  return __builtin_convertvector(__builtin_shufflevector(x.low, x.high, 0, 1, 2, 3, 4, 5, 6, 7), Float8);
}

// Rounds a vector of a compute dtype to the values that R can hold; float64 goes through float32, as in PyTorch.
template <class R>
SHAPO_INLINE Double8 rounded_to(Float8 x) {
  return to_double(Numeric<R>::round(x));
}
template <class R>
SHAPO_INLINE Double8 rounded_to(Double8 x) {
  return to_double(Numeric<R>::round(to_float(x)));
}
template <>
SHAPO_INLINE Double8 rounded_to<double>(Float8 x) {
  return to_double(x);
}
template <>
SHAPO_INLINE Double8 rounded_to<double>(Double8 x) {
  return x;
}

SHAPO_INLINE double add_lanes(Double8 x) { return ((x[0] + x[1]) + (x[2] + x[3])) + ((x[4] + x[5]) + (x[6] + x[7])); }

// The first `count` of eight elements, zeros behind them: how the end of an array enters eight lanes.
template <class T>
SHAPO_INLINE typename Numeric<T>::Vector load_some(const T* from, int64_t count) {
  T padded[LANES] = {};
  std::memcpy(padded, from, count * sizeof(T));
  return Numeric<T>::load(padded);
}

template <class T>
SHAPO_INLINE void store_some(T* to, typename Numeric<T>::Vector x, int64_t count) {
  T padded[LANES];
  Numeric<T>::store(padded, x);
  std::memcpy(to, padded, count * sizeof(T));
}

SHAPO_INLINE Double8 keep_first(Double8 x, int64_t count) {
  const Mask4 places = {0, 1, 2, 3}, end = Mask4{} + count;
  return {places < end ? x.low : Double4{}, places + 4 < end ? x.high : Double4{}};
}

// Calls use(T{}) with the C++ type of a floating-point dtype.
template <class F>
auto with_type(torch::headeronly::ScalarType dtype, const F& use) {
  using torch::headeronly::ScalarType;
  switch (dtype) {
    case ScalarType::Double:
      return use(double{});
    case ScalarType::BFloat16:
      return use(BFloat16{});
    case ScalarType::Half:
      return use(Half{});
    default:
      return use(float{});
  }
}

// SHAPO_VERSIONS(name, result, (parameters), (arguments)) defines name_for_cpu<Args...>(), which returns
// name<Args..., Registers<bytes>> compiled for the best instruction set of this machine. `name` must be a SHAPO_INLINE
// function template: it is inlined into each version.
template <int64_t BYTES>
struct Registers {
  static constexpr int64_t bytes = BYTES;
};

enum class Isa { BASELINE, AVX2, AVX512 };

// SHAPO_CPU_CAPABILITY=baseline|avx2 keeps to less than the machine has, so that one machine can test every version.
inline Isa detect_isa() {
#if defined(__x86_64__)
  const char* wanted = std::getenv("SHAPO_CPU_CAPABILITY");
  const std::string_view most = wanted ? wanted : "";
  __builtin_cpu_init();
  if (most == "baseline" || !__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return Isa::BASELINE;
  if (most == "avx2" || !__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
      !__builtin_cpu_supports("avx512dq") || !__builtin_cpu_supports("avx512vl")) {
    return Isa::AVX2;
  }
  return Isa::AVX512;
#else
  return Isa::BASELINE;
#endif
}

inline Isa isa() {
  static const Isa found = detect_isa();
  return found;
}

#if defined(__x86_64__)
#define SHAPO_VERSIONS(name, result, parameters, arguments)                                                 \
  template <class... Args>                                                                                  \
  static result name##_baseline parameters {                                                                \
    return name<Args..., Registers<16>> arguments;                                                          \
  }                                                                                                         \
  template <class... Args>                                                                                  \
  [[gnu::target("avx2,fma")]] static result name##_avx2 parameters {                                        \
    return name<Args..., Registers<32>> arguments;                                                          \
  }                                                                                                         \
  template <class... Args>                                                                                  \
  [[gnu::target("fma,avx512f,avx512bw,avx512dq,avx512vl")]] static result name##_avx512 parameters {        \
    return name<Args..., Registers<64>> arguments;                                                          \
  }                                                                                                         \
  template <class... Args>                                                                                  \
  static auto name##_for_cpu() {                                                                            \
    return isa() == Isa::AVX512 ? &name##_avx512<Args...>                                                   \
                                : (isa() == Isa::AVX2 ? &name##_avx2<Args...> : &name##_baseline<Args...>); \
  }
#else
#define SHAPO_VERSIONS(name, result, parameters, arguments) \
  template <class... Args>                                  \
  static result name##_baseline parameters {                \
    return name<Args..., Registers<16>> arguments;          \
  }                                                         \
  template <class... Args>                                  \
  static auto name##_for_cpu() {                            \
    return &name##_baseline<Args...>;                       \
  }
#endif

}  // namespace shapo::cpu
