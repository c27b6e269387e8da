// Tokens to codes and integer sums to floats, on AVX2.
#include "common.h"

#ifdef MQ_X86
#include <limits>

#include "avx2_rows.h"

namespace mq {
namespace {

MQ_AVX2 MQ_INLINE int32_t total(__m256i v) {
  __m128i s = _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
  s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0x4e));
  s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0xb1));
  return _mm_cvtsi128_si32(s);
}

template <DType D>
MQ_AVX2 MQ_INLINE __m256i code8(const void* row, int64_t k, __m256 inverse) {
  return _mm256_cvtps_epi32(_mm256_mul_ps(load8<D>(row, k), inverse));
}

// Writes 32 codes and returns their sum, eight lanes of it.
template <DType D, typename Code>
MQ_AVX2 MQ_INLINE __m256i write32(const void* row, int64_t k, __m256 inverse, Code* codes) {
  const __m256i a = code8<D>(row, k, inverse), b = code8<D>(row, k + 8, inverse);
  const __m256i c = code8<D>(row, k + 16, inverse), d = code8<D>(row, k + 24, inverse);
  // The packs work on 128-bit halves; the permutations put the codes back in order.
  const __m256i ab = _mm256_packs_epi32(a, b), cd = _mm256_packs_epi32(c, d);
  __m256i* out = reinterpret_cast<__m256i*>(codes);
  if constexpr (sizeof(Code) == 2) {
    _mm256_storeu_si256(out, _mm256_permute4x64_epi64(ab, 0xd8));
    _mm256_storeu_si256(out + 1, _mm256_permute4x64_epi64(cd, 0xd8));
    return _mm256_setzero_si256();
  } else {
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    _mm256_storeu_si256(out, _mm256_permutevar8x32_epi32(_mm256_packs_epi16(ab, cd), order));
    return _mm256_add_epi32(_mm256_add_epi32(a, b), _mm256_add_epi32(c, d));
  }
}

template <DType D, typename Code>
MQ_AVX2 int32_t write_codes(const void* row, int64_t depth, int64_t padded, float scale, Code* codes) {
  const __m256 inverse = _mm256_set1_ps(scale);
  __m256i sum = _mm256_setzero_si256();
  int64_t k = 0;
  for (; k + kBlock <= depth; k += kBlock) sum = _mm256_add_epi32(sum, write32<D>(row, k, inverse, codes + k));
  if (k < depth) {
    const Tail<D> tail(row, k, depth);
    sum = _mm256_add_epi32(sum, write32<D>(tail.data, 0, inverse, codes + k));
    k += kBlock;
  }
  std::memset(codes + k, 0, (padded - k) * sizeof(Code));
  return total(sum);
}

template <DType D>
MQ_AVX2 Token quantize_part(const void* row, int64_t depth, int64_t padded, int qmax, int code_size, void* codes) {
  const uint32_t bits = absmax_bits<D>(row, depth);
  const float limit = static_cast<float>(qmax);
  float absmax;
  std::memcpy(&absmax, &bits, 4);
  const bool finite = bits < 0x7f800000u;
  // Below this the scale would be subnormal: the row counts as zero.
  if (!finite || absmax < limit * 0x1p-126f) {
    std::memset(codes, 0, padded * code_size);
    return {finite ? 0.0f : std::numeric_limits<float>::quiet_NaN(), 0};
  }
  const float inverse = limit / absmax;
  int32_t sum = 0;
  if (code_size == 1) {
    sum = write_codes<D>(row, depth, padded, inverse, static_cast<int8_t*>(codes));
  } else {
    write_codes<D>(row, depth, padded, inverse, static_cast<int16_t*>(codes));
  }
  return {absmax / limit, static_cast<int32_t>(-128 * static_cast<int64_t>(sum))};
}

template <DType D>
void quantize_row(const void* row, int64_t depth, int64_t padded, int64_t group, int qmax, int code_size, void* codes,
                  Token* token) {
  const int64_t step = group == 0 ? padded : group;
  for (int64_t k = 0; k == 0 || k < depth; k += step) {
    const bool last = k + step >= depth;
    *token++ = quantize_part<D>(static_cast<const char*>(row) + k * size_of(D), last ? depth - k : step,
                                last ? padded - k : step, qmax, code_size, static_cast<char*>(codes) + k * code_size);
  }
}

void quantize(const void* row, DType dtype, int64_t depth, int64_t padded, int64_t group, int qmax, int code_size,
              void* codes, Token* token) {
  switch (dtype) {
    case DType::f16:
      return quantize_row<DType::f16>(row, depth, padded, group, qmax, code_size, codes, token);
    case DType::bf16:
      return quantize_row<DType::bf16>(row, depth, padded, group, qmax, code_size, codes, token);
    default:
      return quantize_row<DType::f32>(row, depth, padded, group, qmax, code_size, codes, token);
  }
}

template <bool Totals>
MQ_AVX2 MQ_INLINE __m256 finish8(const int32_t* sums, const float* weight_scale, const float* bias, __m256i correction,
                                 __m256 scale) {
  const __m256i sum = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(sums));
  const __m256 value = Totals ? _mm256_castsi256_ps(sum) : _mm256_cvtepi32_ps(_mm256_add_epi32(sum, correction));
  const __m256 by = _mm256_loadu_ps(weight_scale);
  const __m256 scaled = _mm256_mul_ps(value, Totals ? by : _mm256_mul_ps(scale, by));
  return bias == nullptr ? scaled : _mm256_add_ps(scaled, _mm256_loadu_ps(bias));
}

template <DType D, bool Totals>
MQ_AVX2 void finish_row(const Tile& tile, int64_t t) {
  const int32_t* sums = tile.sums + t * tile.sums_stride;
  const __m256i correction = _mm256_set1_epi32(tile.token[t].correction);
  const __m256 scale = _mm256_set1_ps(tile.token[t].scale);
  char* out = tile.out_row(t);
  int64_t n = 0;
  for (; n + 8 <= tile.columns; n += 8) {
    const float* bias = tile.bias == nullptr ? nullptr : tile.bias + n;
    store8<D>(finish8<Totals>(sums + n, tile.weight_scale + n, bias, correction, scale), out, n);
  }
  if (n == tile.columns) return;
  int32_t rest_sums[8] = {};
  float weight_scale[8] = {}, bias[8] = {}, result[8];
  const int64_t rest = tile.columns - n;
  std::memcpy(rest_sums, sums + n, rest * 4);
  std::memcpy(weight_scale, tile.weight_scale + n, rest * 4);
  if (tile.bias != nullptr) std::memcpy(bias, tile.bias + n, rest * 4);
  store8<D>(finish8<Totals>(rest_sums, weight_scale, tile.bias == nullptr ? nullptr : bias, correction, scale), result, 0);
  std::memcpy(out + n * size_of(D), result, rest * size_of(D));
}

template <DType D, bool Totals>
MQ_AVX2 void finish_rows(const Tile& tile) {
  for (int64_t t = 0; t < tile.tokens; ++t) finish_row<D, Totals>(tile, t);
}

template <bool Totals>
void finish(const Tile& tile) {
  switch (tile.dtype) {
    case DType::f16:
      return finish_rows<DType::f16, Totals>(tile);
    case DType::bf16:
      return finish_rows<DType::bf16, Totals>(tile);
    default:
      return finish_rows<DType::f32, Totals>(tile);
  }
}

template <DType D>
MQ_AVX2 void widen_row(const void* row, int64_t depth, float* out) {
  int64_t k = 0;
  for (; k + 8 <= depth; k += 8) _mm256_storeu_ps(out + k, load8<D>(row, k));
  to_floats(static_cast<const char*>(row) + k * size_of(D), D, depth - k, out + k);
}

// Float activations are their own codes.
void widen(const void* row, DType dtype, int64_t depth, int64_t padded, int64_t, int, int, void* codes,
           Token* token) {
  float* out = static_cast<float*>(codes);
  if (dtype == DType::f16) {
    widen_row<DType::f16>(row, depth, out);
  } else if (dtype == DType::bf16) {
    widen_row<DType::bf16>(row, depth, out);
  } else {
    std::memcpy(out, row, depth * sizeof(float));
  }
  std::memset(out + depth, 0, (padded - depth) * sizeof(float));
  *token = {1, 0};
}

template <DType D>
MQ_AVX2 void add_bias(const Tile& tile) {
  for (int64_t t = 0; t < tile.tokens; ++t) {
    const float* sums = reinterpret_cast<const float*>(tile.sums) + t * tile.sums_stride;
    char* out = tile.out_row(t);
    int64_t n = 0;
    for (; n + 8 <= tile.columns; n += 8) {
      const __m256 sum = _mm256_loadu_ps(sums + n);
      store8<D>(tile.bias == nullptr ? sum : _mm256_add_ps(sum, _mm256_loadu_ps(tile.bias + n)), out, n);
    }
    for (; n < tile.columns; ++n) {
      from_float(tile.bias == nullptr ? sums[n] : sums[n] + tile.bias[n], out + n * size_of(D), D);
    }
  }
}

void finish_float(const Tile& tile) {
  switch (tile.dtype) {
    case DType::f16:
      return add_bias<DType::f16>(tile);
    case DType::bf16:
      return add_bias<DType::bf16>(tile);
    default:
      return add_bias<DType::f32>(tile);
  }
}

}  // namespace

const RowKernels kRowsAvx2 = {quantize, finish<false>, finish<true>};
const RowKernels kRowsFloat = {widen, finish_float, nullptr};

}  // namespace mq
#endif
