// What a convolution does with floats, over sixteen lanes; see lanes.h for why all paths give its bits.
//
// Included once per instruction set, with MQ_TARGET and the lanes chosen.
#include <limits>

#include "fused_conv.h"
#include "lanes.h"

namespace mq {
namespace {

#if defined(MQ_LANES_512)

MQ_LANE void store_codes(int8_t* p, Ints a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtsepi32_epi8(a.v));
}
MQ_LANE void store_codes(int16_t* p, Ints a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtsepi32_epi16(a.v));
}

#else

// The pack works on 128-bit halves; the permutation puts the codes back in order.
MQ_LANE __m256i shorts_of(Ints a) { return _mm256_permute4x64_epi64(_mm256_packs_epi32(a.low, a.high), 0xd8); }
MQ_LANE void store_codes(int16_t* p, Ints a) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), shorts_of(a)); }
MQ_LANE void store_codes(int8_t* p, Ints a) {
  const __m256i s = shorts_of(a);
  const __m128i bytes = _mm_packs_epi16(_mm256_castsi256_si128(s), _mm256_extracti128_si256(s, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), bytes);
}

#endif

MQ_LANE uint32_t absmax_bits(const float* x, int64_t n) {
  const Ints mask = all_ints(0x7fffffff);
  Ints a = all_ints(0), b = a;
  int64_t k = 0;
  for (; k + 2 * kLaneCount <= n; k += 2 * kLaneCount) {
    a = max_unsigned(a, and_ints(bits_of(load(x + k)), mask));
    b = max_unsigned(b, and_ints(bits_of(load(x + k + kLaneCount)), mask));
  }
  for (; k < n; k += kLaneCount) a = max_unsigned(a, and_ints(bits_of(load_first(x + k, n - k)), mask));
  return largest_unsigned(max_unsigned(a, b));
}

// Returns the sum of the codes.
template <typename Code>
MQ_LANE int32_t write_codes(const float* x, int64_t n, float inverse, Code* codes) {
  const Lanes factor = all(inverse);
  Ints sum = all_ints(0);
  int64_t k = 0;
  for (; k + kLaneCount <= n; k += kLaneCount) {
    const Ints code = to_ints(mul(load(x + k), factor));
    store_codes(codes + k, code);
    sum = add_ints(sum, code);
  }
  if (k < n) {
    const Ints code = to_ints(mul(load_first(x + k, n - k), factor));
    alignas(16) Code last[kLaneCount];
    store_codes(last, code);
    std::memcpy(codes + k, last, ((n - k + 3) & ~int64_t{3}) * sizeof(Code));
    sum = add_ints(sum, code);
  }
  return total_ints(sum);
}

MQ_TARGET Token quantize(const float* x, int64_t n, int qmax, int code_size, bool corrected, void* codes) {
  const uint32_t bits = absmax_bits(x, n);
  const float limit = static_cast<float>(qmax);
  float absmax;
  std::memcpy(&absmax, &bits, 4);
  const bool finite = bits < 0x7f800000u;
  // Below this the scale would be subnormal: the group counts as zero.
  if (!finite || absmax < limit * 0x1p-126f) {
    std::memset(codes, 0, round_up(n, 4) * code_size);
    return {finite ? 0.0f : std::numeric_limits<float>::quiet_NaN(), 0};
  }
  const float inverse = limit / absmax;
  const int32_t sum = code_size == 1 ? write_codes(x, n, inverse, static_cast<int8_t*>(codes))
                                     : write_codes(x, n, inverse, static_cast<int16_t*>(codes));
  return {absmax / limit, corrected ? static_cast<int32_t>(-128 * static_cast<int64_t>(sum)) : 0};
}

MQ_LANE Lanes sums_at(const ConvTile& tile, int64_t t, int64_t n, Ints correction) {
  return to_lanes(add_ints(load_ints(tile.sums + t * tile.stride + n), correction));
}

// Sixteen outputs at most, of which the tile has `columns - n`.
template <bool Whole>
MQ_LANE void finish_lanes(const ConvTile& tile, int64_t t, int64_t n) {
  const int64_t left = tile.columns - n;
  const Token token = tile.token[t * tile.token_stride];
  const auto take = [left](const float* p) MQ_TARGET { return Whole ? load(p) : load_first(p, left); };
  const Lanes weight_scale = take(tile.weight_scale + n);
  Lanes value = tile.totals == nullptr ? mul(sums_at(tile, t, n, all_ints(token.correction)),
                                             mul(all(token.scale), weight_scale))
                                       : mul(load(tile.totals + t * tile.stride + n), weight_scale);
  if (tile.bias != nullptr) value = add(value, take(tile.bias + n));
  const int64_t place = t * tile.out_stride + n;
  if (tile.residual != nullptr) value = add(value, take(tile.residual + place));
  // NaN is the second operand and stays
  if (tile.relu) value = maximum(zeros(), value);
  if (Whole) {
    store(tile.out + place, value);
  } else {
    store_first(tile.out + place, value, left);
  }
}

MQ_TARGET void finish(const ConvTile& tile) {
  for (int64_t t = 0; t < tile.tokens; ++t) {
    int64_t n = 0;
    for (; n + kLaneCount <= tile.columns; n += kLaneCount) finish_lanes<true>(tile, t, n);
    if (n < tile.columns) finish_lanes<false>(tile, t, n);
  }
}

constexpr ConvKernels kKernels = {quantize, finish};

}  // namespace
}  // namespace mq
