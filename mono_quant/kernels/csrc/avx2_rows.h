// Rows of floats on AVX2: loads that widen, stores that round, the largest magnitude.
#pragma once

#include <immintrin.h>

#include "common.h"

namespace mq {
namespace {

// Codes written at once.
constexpr int64_t kBlock = 32;

template <DType D>
MQ_AVX2 MQ_INLINE __m256 load8(const void* row, int64_t k) {
  if constexpr (D == DType::f32) {
    return _mm256_loadu_ps(static_cast<const float*>(row) + k);
  } else {
    const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(static_cast<const uint16_t*>(row) + k));
    if constexpr (D == DType::f16) return _mm256_cvtph_ps(half);
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
  }
}

// Magnitudes compare like integers, and NaN and infinity compare above every finite value.
template <DType D>
MQ_AVX2 MQ_INLINE __m256i magnitude8(const void* row, int64_t k) {
  return _mm256_and_si256(_mm256_castps_si256(load8<D>(row, k)), _mm256_set1_epi32(0x7fffffff));
}

// The last block of a row, padded with zeros.
template <DType D>
struct Tail {
  alignas(32) char data[kBlock * 4];

  Tail(const void* row, int64_t start, int64_t depth) {
    const int64_t size = size_of(D);
    std::memset(data, 0, sizeof(data));
    std::memcpy(data, static_cast<const char*>(row) + start * size, (depth - start) * size);
  }
};

MQ_AVX2 MQ_INLINE uint32_t largest(__m256i v) {
  __m128i m = _mm_max_epu32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
  m = _mm_max_epu32(m, _mm_shuffle_epi32(m, 0x4e));
  m = _mm_max_epu32(m, _mm_shuffle_epi32(m, 0xb1));
  return static_cast<uint32_t>(_mm_cvtsi128_si32(m));
}

template <DType D>
MQ_AVX2 uint32_t absmax_bits(const void* row, int64_t depth) {
  __m256i m0 = _mm256_setzero_si256(), m1 = m0, m2 = m0, m3 = m0;
  int64_t k = 0;
  for (; k + kBlock <= depth; k += kBlock) {
    m0 = _mm256_max_epu32(m0, magnitude8<D>(row, k));
    m1 = _mm256_max_epu32(m1, magnitude8<D>(row, k + 8));
    m2 = _mm256_max_epu32(m2, magnitude8<D>(row, k + 16));
    m3 = _mm256_max_epu32(m3, magnitude8<D>(row, k + 24));
  }
  if (k < depth) {
    const Tail<D> tail(row, k, depth);
    for (int64_t i = 0; i < kBlock; i += 8) m0 = _mm256_max_epu32(m0, magnitude8<D>(tail.data, i));
  }
  return largest(_mm256_max_epu32(_mm256_max_epu32(m0, m1), _mm256_max_epu32(m2, m3)));
}

// Rounds to the nearest even bfloat16; NaN stays NaN.
MQ_AVX2 MQ_INLINE __m128i to_bfloat(__m256 value) {
  const __m256i bits = _mm256_castps_si256(value);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(value, value, _CMP_UNORD_Q));
  rounded = _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc00000), nan);
  const __m256i high = _mm256_srli_epi32(rounded, 16);
  return _mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1));
}

template <DType D>
MQ_AVX2 MQ_INLINE void store8(__m256 value, void* out, int64_t n) {
  if constexpr (D == DType::f32) {
    _mm256_storeu_ps(static_cast<float*>(out) + n, value);
  } else {
    const __m128i half = D == DType::f16 ? _mm256_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT) : to_bfloat(value);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(static_cast<uint16_t*>(out) + n), half);
  }
}

}  // namespace
}  // namespace mq
