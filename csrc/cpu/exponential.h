// exp(x) for x <= 0 on a register of lanes, the same bits on every instruction set.
//
//     x = n log 2 + r,  |r| <= log(2) / 2,      exp(x) = 2^n P(r)
//
// P is the polynomial of least absolute error on that interval: 2e-9 for float32, 4e-24 for float64, so that what
// remains is the rounding of the arithmetic, one unit in the last place. Results below the smallest normal number are
// 0.

#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "vectors.h"

namespace shapo::cpu {

// What a compute dtype's exponential is made of.
template <class C>
struct Exponential;

template <>
struct Exponential<float> {
  using Word = uint32_t;
  static constexpr float LOWEST = -87.0f, LOG2E = 1.44269504f;
  static constexpr float LN2_HIGH = 0.693359375f, LN2_LOW = -2.12194440e-4f;  // n * LN2_HIGH is exact
  static constexpr float TO_INTEGER = 0x1.8p23f;  // the sum with it has the integer in its last bits
  static constexpr int MANTISSA = 23, BIAS = 127;
  static constexpr float COEFFICIENTS[] = {1.394116075382547e-3f,
                                           8.375168288954201e-3f,
                                           4.1666352268082525e-2f,
                                           1.666641501129006e-1f,
                                           5.000000047259399e-1f,
                                           1.0000000378296146f,
                                           1.0f};
};

template <>
struct Exponential<double> {
  using Word = uint64_t;
  static constexpr double LOWEST = -708.0, LOG2E = 1.442695040888963407;
  static constexpr double LN2_HIGH = 6.93147180369123816490e-01, LN2_LOW = 1.90821492927058770002e-10;
  static constexpr double TO_INTEGER = 0x1.8p52;
  static constexpr int MANTISSA = 52, BIAS = 1023;
  static constexpr double COEFFICIENTS[] = {2.0921624844065777558e-9,
                                            2.5114932377394758629e-8,
                                            2.755725176934478662e-7,
                                            2.7557224769576780538e-6,
                                            2.4801587350256620263e-5,
                                            1.9841269909421313462e-4,
                                            1.3888888888871820072e-3,
                                            8.3333333333094316448e-3,
                                            4.1666666666666692321e-2,
                                            1.6666666666666702591e-1,
                                            4.9999999999999999989e-1,
                                            1.0,
                                            1.0};
};

// A register's worth of a compute dtype.
template <class C, class Registers>
struct Wide {
  static constexpr int64_t LANES = Registers::bytes / sizeof(C);
  using Vector [[gnu::vector_size(Registers::bytes)]] = C;
  using Bits [[gnu::vector_size(Registers::bytes)]] = typename Exponential<C>::Word;

  static SHAPO_INLINE Vector load(const C* from) {
    Vector vector;
    std::memcpy(&vector, from, sizeof(vector));
    return vector;
  }

  static SHAPO_INLINE void store(C* to, Vector vector) { std::memcpy(to, &vector, sizeof(vector)); }

  // NaN gives NaN, -infinity gives 0.
  static SHAPO_INLINE Vector exp_below_zero(Vector x) {
    using E = Exponential<C>;
    const Vector lowest = Vector{} + E::LOWEST;
    const Vector y = x < lowest ? lowest : x;
    const Vector shifted = y * E::LOG2E + E::TO_INTEGER;
    const Vector n = shifted - E::TO_INTEGER;
    const Vector r = (y - n * E::LN2_HIGH) - n * E::LN2_LOW;
    Vector p = Vector{} + E::COEFFICIENTS[0];
    for (size_t i = 1; i < sizeof(E::COEFFICIENTS) / sizeof(C); ++i) p = p * r + E::COEFFICIENTS[i];
    const Bits power = (bit_cast<Bits>(shifted) + E::BIAS) << E::MANTISSA;
    const Vector result = p * bit_cast<Vector>(power);
    return x < lowest ? Vector{} : result;
  }
};

}  // namespace shapo::cpu
