// Sixteen floats and what may be done with them: the same bits on every instruction set.
//
// Written three times, for one 512-bit vector, two of 256 bits, and an array; the including file defines MQ_TARGET and
// one of MQ_LANES_512, MQ_LANES_256 and MQ_LANES_ARRAY. What is built on it is written once. Only operations that IEEE 754
// defines are here, so there are no approximate reciprocals; sums over lanes have one fixed tree.
#include <cmath>

#include "common.h"

#if defined(MQ_LANES_512)
#include "words512.h"
#elif defined(MQ_LANES_256)
#include "words256.h"
#endif

#define MQ_LANE MQ_TARGET MQ_INLINE

namespace mq {
namespace {

constexpr int kLaneCount = 16;

#if defined(MQ_LANES_512)

struct Lanes {
  __m512 v;
};
struct Ints {
  __m512i v;
};
struct Mask {
  __mmask16 m;
};

MQ_LANE Mask first_lanes(int64_t n) {
  return {static_cast<__mmask16>(n >= kLaneCount ? 0xffff : n <= 0 ? 0 : (1u << n) - 1)};
}
MQ_LANE Lanes all(float x) { return {_mm512_set1_ps(x)}; }
MQ_LANE Ints all_ints(int32_t x) { return {_mm512_set1_epi32(x)}; }
MQ_LANE Lanes load(const float* p) { return {_mm512_loadu_ps(p)}; }
// Lanes beyond the first n are zero; n may be more than sixteen, or nothing. Memory beyond them is not touched.
MQ_LANE Lanes load_first(const float* p, int64_t n) { return {_mm512_maskz_loadu_ps(first_lanes(n).m, p)}; }
MQ_LANE void store(float* p, Lanes x) { _mm512_storeu_ps(p, x.v); }
MQ_LANE void store_first(float* p, Lanes x, int64_t n) { _mm512_mask_storeu_ps(p, first_lanes(n).m, x.v); }
MQ_LANE Ints load_ints(const int32_t* p) { return {_mm512_loadu_si512(p)}; }
MQ_LANE Ints load_first_ints(const int32_t* p, int64_t n) { return {_mm512_maskz_loadu_epi32(first_lanes(n).m, p)}; }
MQ_LANE void store_ints(int32_t* p, Ints x) { _mm512_storeu_si512(p, x.v); }

MQ_LANE Lanes add(Lanes a, Lanes b) { return {_mm512_add_ps(a.v, b.v)}; }
MQ_LANE Lanes sub(Lanes a, Lanes b) { return {_mm512_sub_ps(a.v, b.v)}; }
MQ_LANE Lanes mul(Lanes a, Lanes b) { return {_mm512_mul_ps(a.v, b.v)}; }
MQ_LANE Lanes divide(Lanes a, Lanes b) { return {_mm512_div_ps(a.v, b.v)}; }
// a * b + c, rounded once.
MQ_LANE Lanes fma(Lanes a, Lanes b, Lanes c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
// c - a * b, rounded once.
MQ_LANE Lanes fnma(Lanes a, Lanes b, Lanes c) { return {_mm512_fnmadd_ps(a.v, b.v, c.v)}; }
// b where either is NaN, or both are zeros.
MQ_LANE Lanes maximum(Lanes a, Lanes b) { return {_mm512_max_ps(a.v, b.v)}; }
MQ_LANE Lanes minimum(Lanes a, Lanes b) { return {_mm512_min_ps(a.v, b.v)}; }
MQ_LANE Lanes square_root(Lanes a) { return {_mm512_sqrt_ps(a.v)}; }
// To the nearest whole number, even ones at ties.
MQ_LANE Lanes nearest(Lanes a) { return {_mm512_roundscale_ps(a.v, 8)}; }
MQ_LANE Mask less(Lanes a, Lanes b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ)}; }
MQ_LANE Mask both(Mask a, Mask b) { return {static_cast<__mmask16>(a.m & b.m)}; }
// a where the mask is set, else b.
MQ_LANE Lanes choose(Mask m, Lanes a, Lanes b) { return {_mm512_mask_mov_ps(b.v, m.m, a.v)}; }
// Sets the mask where a byte is not zero; reads `n` bytes at most.
MQ_LANE Mask nonzero_bytes(const void* p, int64_t n) {
  return {_mm_test_epi8_mask(_mm_maskz_loadu_epi8(first_lanes(n).m, p), _mm_set1_epi8(-1))};
}

MQ_LANE Ints bits_of(Lanes a) { return {_mm512_castps_si512(a.v)}; }
MQ_LANE Lanes lanes_of(Ints a) { return {_mm512_castsi512_ps(a.v)}; }
// Rounded to the nearest even; the smallest integer for what does not fit.
MQ_LANE Ints to_ints(Lanes a) { return {_mm512_cvtps_epi32(a.v)}; }
MQ_LANE Lanes to_lanes(Ints a) { return {_mm512_cvtepi32_ps(a.v)}; }
MQ_LANE Ints add_ints(Ints a, Ints b) { return {_mm512_add_epi32(a.v, b.v)}; }
MQ_LANE Ints and_ints(Ints a, Ints b) { return {_mm512_and_si512(a.v, b.v)}; }
MQ_LANE Ints max_unsigned(Ints a, Ints b) { return {_mm512_max_epu32(a.v, b.v)}; }
template <int N>
MQ_LANE Ints shift_left(Ints a) {
  return {_mm512_slli_epi32(a.v, N)};
}

MQ_LANE __m256 lower_half(Lanes a) { return _mm512_castps512_ps256(a.v); }
MQ_LANE __m256 upper_half(Lanes a) { return _mm512_extractf32x8_ps(a.v, 1); }
MQ_LANE __m256i lower_half(Ints a) { return _mm512_castsi512_si256(a.v); }
MQ_LANE __m256i upper_half(Ints a) { return _mm512_extracti64x4_epi64(a.v, 1); }

template <DType D>
MQ_LANE Lanes load_as(const void* row, int64_t k) {
  if constexpr (D == DType::f32) return load(static_cast<const float*>(row) + k);
  const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(static_cast<const uint16_t*>(row) + k));
  if constexpr (D == DType::f16) return {_mm512_cvtph_ps(half)};
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16))};
}

// Sixteen rows of sixteen words become columns.
MQ_LANE void transpose(Lanes lanes[16]) {
  __m512i words[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) words[i] = _mm512_castps_si512(lanes[i].v);
  transpose_words(words);
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) lanes[i].v = _mm512_castsi512_ps(words[i]);
}

#elif defined(MQ_LANES_256)

struct Lanes {
  __m256 low, high;
};
struct Ints {
  __m256i low, high;
};
struct Mask {
  __m256i low, high;
};

MQ_LANE Mask first_lanes(int64_t n) {
  const __m256i count = _mm256_set1_epi32(static_cast<int>(n > kLaneCount ? kLaneCount : n < 0 ? 0 : n));
  return {_mm256_cmpgt_epi32(count, _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7)),
          _mm256_cmpgt_epi32(count, _mm256_setr_epi32(8, 9, 10, 11, 12, 13, 14, 15))};
}
MQ_LANE Lanes all(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
MQ_LANE Ints all_ints(int32_t x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
MQ_LANE Lanes load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
MQ_LANE Lanes load_first(const float* p, int64_t n) {
  if (n >= kLaneCount) return load(p);
  const Mask m = first_lanes(n);
  return {_mm256_maskload_ps(p, m.low), _mm256_maskload_ps(p + 8, m.high)};
}
MQ_LANE void store(float* p, Lanes x) {
  _mm256_storeu_ps(p, x.low);
  _mm256_storeu_ps(p + 8, x.high);
}
MQ_LANE void store_first(float* p, Lanes x, int64_t n) {
  if (n >= kLaneCount) return store(p, x);
  const Mask m = first_lanes(n);
  _mm256_maskstore_ps(p, m.low, x.low);
  _mm256_maskstore_ps(p + 8, m.high, x.high);
}
MQ_LANE Ints load_ints(const int32_t* p) {
  const __m256i* v = reinterpret_cast<const __m256i*>(p);
  return {_mm256_loadu_si256(v), _mm256_loadu_si256(v + 1)};
}
MQ_LANE Ints load_first_ints(const int32_t* p, int64_t n) {
  if (n >= kLaneCount) return load_ints(p);
  const Mask m = first_lanes(n);
  return {_mm256_maskload_epi32(p, m.low), _mm256_maskload_epi32(p + 8, m.high)};
}
MQ_LANE void store_ints(int32_t* p, Ints x) {
  __m256i* v = reinterpret_cast<__m256i*>(p);
  _mm256_storeu_si256(v, x.low);
  _mm256_storeu_si256(v + 1, x.high);
}

MQ_LANE Lanes add(Lanes a, Lanes b) { return {_mm256_add_ps(a.low, b.low), _mm256_add_ps(a.high, b.high)}; }
MQ_LANE Lanes sub(Lanes a, Lanes b) { return {_mm256_sub_ps(a.low, b.low), _mm256_sub_ps(a.high, b.high)}; }
MQ_LANE Lanes mul(Lanes a, Lanes b) { return {_mm256_mul_ps(a.low, b.low), _mm256_mul_ps(a.high, b.high)}; }
MQ_LANE Lanes divide(Lanes a, Lanes b) { return {_mm256_div_ps(a.low, b.low), _mm256_div_ps(a.high, b.high)}; }
MQ_LANE Lanes fma(Lanes a, Lanes b, Lanes c) {
  return {_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high)};
}
MQ_LANE Lanes fnma(Lanes a, Lanes b, Lanes c) {
  return {_mm256_fnmadd_ps(a.low, b.low, c.low), _mm256_fnmadd_ps(a.high, b.high, c.high)};
}
MQ_LANE Lanes maximum(Lanes a, Lanes b) { return {_mm256_max_ps(a.low, b.low), _mm256_max_ps(a.high, b.high)}; }
MQ_LANE Lanes minimum(Lanes a, Lanes b) { return {_mm256_min_ps(a.low, b.low), _mm256_min_ps(a.high, b.high)}; }
MQ_LANE Lanes square_root(Lanes a) { return {_mm256_sqrt_ps(a.low), _mm256_sqrt_ps(a.high)}; }
MQ_LANE Lanes nearest(Lanes a) { return {_mm256_round_ps(a.low, 8), _mm256_round_ps(a.high, 8)}; }
MQ_LANE Mask less(Lanes a, Lanes b) {
  return {_mm256_castps_si256(_mm256_cmp_ps(a.low, b.low, _CMP_LT_OQ)),
          _mm256_castps_si256(_mm256_cmp_ps(a.high, b.high, _CMP_LT_OQ))};
}
MQ_LANE Mask both(Mask a, Mask b) { return {_mm256_and_si256(a.low, b.low), _mm256_and_si256(a.high, b.high)}; }
MQ_LANE Lanes choose(Mask m, Lanes a, Lanes b) {
  return {_mm256_blendv_ps(b.low, a.low, _mm256_castsi256_ps(m.low)),
          _mm256_blendv_ps(b.high, a.high, _mm256_castsi256_ps(m.high))};
}
MQ_LANE Mask nonzero_bytes(const void* p, int64_t n) {
  alignas(16) char bytes[kLaneCount] = {};
  // a copy of a size that is not known is a call
  if (n < kLaneCount) std::memcpy(bytes, p, n < 0 ? 0 : n);
  const void* source = n < kLaneCount ? bytes : p;
  const __m128i v = _mm_loadu_si128(static_cast<const __m128i*>(source)), zero = _mm_setzero_si128();
  // all ones where the byte is zero, then turned over
  const __m128i set = _mm_xor_si128(_mm_cmpeq_epi8(v, zero), _mm_set1_epi8(-1));
  return {_mm256_cvtepi8_epi32(set), _mm256_cvtepi8_epi32(_mm_srli_si128(set, 8))};
}

MQ_LANE Ints bits_of(Lanes a) { return {_mm256_castps_si256(a.low), _mm256_castps_si256(a.high)}; }
MQ_LANE Lanes lanes_of(Ints a) { return {_mm256_castsi256_ps(a.low), _mm256_castsi256_ps(a.high)}; }
MQ_LANE Ints to_ints(Lanes a) { return {_mm256_cvtps_epi32(a.low), _mm256_cvtps_epi32(a.high)}; }
MQ_LANE Lanes to_lanes(Ints a) { return {_mm256_cvtepi32_ps(a.low), _mm256_cvtepi32_ps(a.high)}; }
MQ_LANE Ints add_ints(Ints a, Ints b) { return {_mm256_add_epi32(a.low, b.low), _mm256_add_epi32(a.high, b.high)}; }
MQ_LANE Ints and_ints(Ints a, Ints b) { return {_mm256_and_si256(a.low, b.low), _mm256_and_si256(a.high, b.high)}; }
MQ_LANE Ints max_unsigned(Ints a, Ints b) {
  return {_mm256_max_epu32(a.low, b.low), _mm256_max_epu32(a.high, b.high)};
}
template <int N>
MQ_LANE Ints shift_left(Ints a) {
  return {_mm256_slli_epi32(a.low, N), _mm256_slli_epi32(a.high, N)};
}

MQ_LANE __m256 lower_half(Lanes a) { return a.low; }
MQ_LANE __m256 upper_half(Lanes a) { return a.high; }
MQ_LANE __m256i lower_half(Ints a) { return a.low; }
MQ_LANE __m256i upper_half(Ints a) { return a.high; }

template <DType D>
MQ_LANE Lanes load_as(const void* row, int64_t k) {
  if constexpr (D == DType::f32) return load(static_cast<const float*>(row) + k);
  const __m128i* half = reinterpret_cast<const __m128i*>(static_cast<const uint16_t*>(row) + k);
  const __m128i low = _mm_loadu_si128(half), high = _mm_loadu_si128(half + 1);
  if constexpr (D == DType::f16) return {_mm256_cvtph_ps(low), _mm256_cvtph_ps(high)};
  return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(low), 16)),
          _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(high), 16))};
}

MQ_LANE void transpose(Lanes lanes[16]) {
  // the four quarters, of which two change places
  __m256i a[8], b[8], c[8], d[8];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    a[i] = _mm256_castps_si256(lanes[i].low), b[i] = _mm256_castps_si256(lanes[i].high);
    c[i] = _mm256_castps_si256(lanes[i + 8].low), d[i] = _mm256_castps_si256(lanes[i + 8].high);
  }
  transpose_words(a);
  transpose_words(b);
  transpose_words(c);
  transpose_words(d);
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    lanes[i] = {_mm256_castsi256_ps(a[i]), _mm256_castsi256_ps(c[i])};
    lanes[i + 8] = {_mm256_castsi256_ps(b[i]), _mm256_castsi256_ps(d[i])};
  }
}

#elif defined(MQ_LANES_ARRAY)

struct Lanes {
  float v[kLaneCount];
};
struct Ints {
  int32_t v[kLaneCount];
};
struct Mask {
  bool m[kLaneCount];
};

#define MQ_EACH for (int i = 0; i < kLaneCount; ++i)

MQ_LANE Mask first_lanes(int64_t n) {
  Mask r;
  MQ_EACH r.m[i] = i < n;
  return r;
}
MQ_LANE Lanes all(float x) {
  Lanes r;
  MQ_EACH r.v[i] = x;
  return r;
}
MQ_LANE Ints all_ints(int32_t x) {
  Ints r;
  MQ_EACH r.v[i] = x;
  return r;
}
MQ_LANE Lanes load(const float* p) {
  Lanes r;
  MQ_EACH r.v[i] = p[i];
  return r;
}
MQ_LANE Lanes load_first(const float* p, int64_t n) {
  Lanes r;
  MQ_EACH r.v[i] = i < n ? p[i] : 0.0f;
  return r;
}
MQ_LANE void store(float* p, Lanes x) { MQ_EACH p[i] = x.v[i]; }
MQ_LANE void store_first(float* p, Lanes x, int64_t n) {
  MQ_EACH if (i < n) p[i] = x.v[i];
}
MQ_LANE Ints load_ints(const int32_t* p) {
  Ints r;
  MQ_EACH r.v[i] = p[i];
  return r;
}
MQ_LANE Ints load_first_ints(const int32_t* p, int64_t n) {
  Ints r;
  MQ_EACH r.v[i] = i < n ? p[i] : 0;
  return r;
}
MQ_LANE void store_ints(int32_t* p, Ints x) { MQ_EACH p[i] = x.v[i]; }

#define MQ_BINARY(NAME, EXPRESSION)      \
  MQ_LANE Lanes NAME(Lanes a, Lanes b) { \
    Lanes r;                             \
    MQ_EACH r.v[i] = EXPRESSION;         \
    return r;                            \
  }
MQ_BINARY(add, a.v[i] + b.v[i])
MQ_BINARY(sub, a.v[i] - b.v[i])
MQ_BINARY(mul, a.v[i] * b.v[i])
MQ_BINARY(divide, a.v[i] / b.v[i])
MQ_BINARY(maximum, a.v[i] > b.v[i] ? a.v[i] : b.v[i])
MQ_BINARY(minimum, a.v[i] < b.v[i] ? a.v[i] : b.v[i])
#undef MQ_BINARY

MQ_LANE Lanes fma(Lanes a, Lanes b, Lanes c) {
  Lanes r;
  MQ_EACH r.v[i] = __builtin_fmaf(a.v[i], b.v[i], c.v[i]);
  return r;
}
MQ_LANE Lanes fnma(Lanes a, Lanes b, Lanes c) {
  Lanes r;
  MQ_EACH r.v[i] = __builtin_fmaf(-a.v[i], b.v[i], c.v[i]);
  return r;
}
MQ_LANE Lanes square_root(Lanes a) {
  MQ_EACH a.v[i] = __builtin_sqrtf(a.v[i]);
  return a;
}
MQ_LANE Lanes nearest(Lanes a) {
  MQ_EACH a.v[i] = __builtin_nearbyintf(a.v[i]);
  return a;
}
MQ_LANE Mask less(Lanes a, Lanes b) {
  Mask r;
  MQ_EACH r.m[i] = a.v[i] < b.v[i];
  return r;
}
MQ_LANE Mask both(Mask a, Mask b) {
  MQ_EACH a.m[i] = a.m[i] && b.m[i];
  return a;
}
MQ_LANE Lanes choose(Mask m, Lanes a, Lanes b) {
  MQ_EACH if (!m.m[i]) a.v[i] = b.v[i];
  return a;
}
MQ_LANE Mask nonzero_bytes(const void* p, int64_t n) {
  Mask r;
  MQ_EACH r.m[i] = i < n && static_cast<const char*>(p)[i] != 0;
  return r;
}
MQ_LANE Ints bits_of(Lanes a) {
  Ints r;
  std::memcpy(&r, &a, sizeof(r));
  return r;
}
MQ_LANE Lanes lanes_of(Ints a) {
  Lanes r;
  std::memcpy(&r, &a, sizeof(r));
  return r;
}
MQ_LANE Ints to_ints(Lanes a) {
  Ints r;
  MQ_EACH {
    const bool fits = a.v[i] >= -2147483648.0f && a.v[i] < 2147483648.0f;
    r.v[i] = fits ? static_cast<int32_t>(__builtin_nearbyintf(a.v[i])) : INT32_MIN;
  }
  return r;
}
MQ_LANE Lanes to_lanes(Ints a) {
  Lanes r;
  MQ_EACH r.v[i] = static_cast<float>(a.v[i]);
  return r;
}
MQ_LANE Ints add_ints(Ints a, Ints b) {
  MQ_EACH a.v[i] = static_cast<int32_t>(static_cast<uint32_t>(a.v[i]) + static_cast<uint32_t>(b.v[i]));
  return a;
}
MQ_LANE Ints and_ints(Ints a, Ints b) {
  MQ_EACH a.v[i] &= b.v[i];
  return a;
}
MQ_LANE Ints max_unsigned(Ints a, Ints b) {
  MQ_EACH if (static_cast<uint32_t>(b.v[i]) > static_cast<uint32_t>(a.v[i])) a.v[i] = b.v[i];
  return a;
}
template <int N>
MQ_LANE Ints shift_left(Ints a) {
  MQ_EACH a.v[i] = static_cast<int32_t>(static_cast<uint32_t>(a.v[i]) << N);
  return a;
}
template <DType D>
MQ_LANE Lanes load_as(const void* row, int64_t k) {
  Lanes r;
  to_floats(static_cast<const char*>(row) + k * size_of(D), D, kLaneCount, r.v);
  return r;
}
MQ_LANE void transpose(Lanes lanes[16]) {
  MQ_EACH for (int j = 0; j < i; ++j) {
    const float held = lanes[i].v[j];
    lanes[i].v[j] = lanes[j].v[i];
    lanes[j].v[i] = held;
  }
}
#undef MQ_EACH

#endif

// Sums and the like over all lanes: lane i meets i + 8, then i + 4, i + 2 and i + 1.
#if defined(MQ_LANES_ARRAY)

MQ_LANE float total(Lanes a) {
  for (int width = kLaneCount / 2; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) a.v[i] = a.v[i] + a.v[i + width];
  }
  return a.v[0];
}
MQ_LANE float largest(Lanes a) {
  for (int width = kLaneCount / 2; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) a.v[i] = a.v[i] > a.v[i + width] ? a.v[i] : a.v[i + width];
  }
  return a.v[0];
}
MQ_LANE uint32_t largest_unsigned(Ints a) {
  uint32_t best = 0;
  for (int i = 0; i < kLaneCount; ++i) {
    if (static_cast<uint32_t>(a.v[i]) > best) best = static_cast<uint32_t>(a.v[i]);
  }
  return best;
}
MQ_LANE int32_t total_ints(Ints a) {
  uint32_t sum = 0;
  for (int i = 0; i < kLaneCount; ++i) sum += static_cast<uint32_t>(a.v[i]);
  return static_cast<int32_t>(sum);
}

#else

MQ_LANE float total(Lanes a) {
  const __m256 e = _mm256_add_ps(lower_half(a), upper_half(a));
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(e), _mm256_extractf128_ps(e, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_shuffle_ps(s, s, 1)));
}
MQ_LANE float largest(Lanes a) {
  const __m256 e = _mm256_max_ps(lower_half(a), upper_half(a));
  __m128 s = _mm_max_ps(_mm256_castps256_ps128(e), _mm256_extractf128_ps(e, 1));
  s = _mm_max_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_max_ss(s, _mm_shuffle_ps(s, s, 1)));
}
MQ_LANE uint32_t largest_unsigned(Ints a) {
  const __m256i e = _mm256_max_epu32(lower_half(a), upper_half(a));
  __m128i m = _mm_max_epu32(_mm256_castsi256_si128(e), _mm256_extracti128_si256(e, 1));
  m = _mm_max_epu32(m, _mm_shuffle_epi32(m, 0x4e));
  m = _mm_max_epu32(m, _mm_shuffle_epi32(m, 0xb1));
  return static_cast<uint32_t>(_mm_cvtsi128_si32(m));
}
MQ_LANE int32_t total_ints(Ints a) {
  const __m256i e = _mm256_add_epi32(lower_half(a), upper_half(a));
  __m128i s = _mm_add_epi32(_mm256_castsi256_si128(e), _mm256_extracti128_si256(e, 1));
  s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0x4e));
  s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0xb1));
  return _mm_cvtsi128_si32(s);
}

#endif

#if defined(MQ_LANES_512)

// Rows whose sums over lanes are taken together, in fewer steps and by the same tree.
constexpr int kRowsAtOnce = 4;

struct Sum {
  static MQ_LANE Lanes of(Lanes a, Lanes b) { return add(a, b); }
};
struct Largest {
  static MQ_LANE Lanes of(Lanes a, Lanes b) { return maximum(a, b); }
};

template <typename Join, int N>
MQ_LANE __m512 join_within(__m512 v) {
  return Join::of({v}, {_mm512_permute_ps(v, N)}).v;
}

template <typename Join>
MQ_LANE void join_each(const Lanes a[4], float* out) {
  const __m512 v[4] = {a[0].v, a[1].v, a[2].v, a[3].v};
  const Lanes low = Join::of({_mm512_shuffle_f32x4(v[0], v[1], 0x44)}, {_mm512_shuffle_f32x4(v[0], v[1], 0xee)});
  const Lanes high = Join::of({_mm512_shuffle_f32x4(v[2], v[3], 0x44)}, {_mm512_shuffle_f32x4(v[2], v[3], 0xee)});
  const Lanes four = Join::of({_mm512_shuffle_f32x4(low.v, high.v, 0x88)}, {_mm512_shuffle_f32x4(low.v, high.v, 0xdd)});
  const __m512 one = join_within<Join, 0xb1>(join_within<Join, 0x4e>(four.v));
  const __m512i firsts = _mm512_setr_epi32(0, 4, 8, 12, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0);
  _mm_storeu_ps(out, _mm512_castps512_ps128(_mm512_permutexvar_ps(firsts, one)));
}

#else

constexpr int kRowsAtOnce = 1;

#endif

template <int R>
MQ_LANE void total_of_each(const Lanes* a, float* out) {
#if defined(MQ_LANES_512)
  if constexpr (R == 4) return join_each<Sum>(a, out);
#endif
  for (int i = 0; i < R; ++i) out[i] = total(a[i]);
}
template <int R>
MQ_LANE void largest_of_each(const Lanes* a, float* out) {
#if defined(MQ_LANES_512)
  if constexpr (R == 4) return join_each<Largest>(a, out);
#endif
  for (int i = 0; i < R; ++i) out[i] = largest(a[i]);
}

MQ_LANE Lanes zeros() { return all(0.0f); }
MQ_LANE Lanes magnitude(Lanes a) { return lanes_of(and_ints(bits_of(a), all_ints(0x7fffffff))); }

}  // namespace
}  // namespace mq
