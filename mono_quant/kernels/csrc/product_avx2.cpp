// Products on AVX2: int8 weights widened to int16 and `vpmaddwd`, exact for every code; float16 weights widened to
// float.
#include "common.h"

#ifdef MQ_X86
#define MQ_TARGET MQ_AVX2
#include "avx2_tiles.h"

namespace mq {
namespace {

struct Pairs {
  static constexpr int kCodeSize = 2;
  static constexpr int64_t kStep = 16, kBytes = 16;
  MQ_AVX2 static MQ_INLINE __m256i load(const int8_t* weight) {
    return _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(weight)));
  }
  MQ_AVX2 static MQ_INLINE __m256i add(__m256i acc, __m256i weights, __m256i codes) {
    return _mm256_add_epi32(acc, _mm256_madd_epi16(weights, codes));
  }
};

struct Floats {
  static constexpr int kCodeSize = 4;
  static constexpr int64_t kStep = 8, kBytes = 16;
  MQ_AVX2 static MQ_INLINE __m256i load(const int8_t* weight) {
    return _mm256_castps_si256(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(weight))));
  }
  MQ_AVX2 static MQ_INLINE __m256i add(__m256i acc, __m256i weights, __m256i codes) {
    return _mm256_castps_si256(
        _mm256_fmadd_ps(_mm256_castsi256_ps(weights), _mm256_castsi256_ps(codes), _mm256_castsi256_ps(acc)));
  }
};

MQ_AVX2 void interleave_halves8(const int8_t* weight, int64_t stride, int rows, int64_t depth, int32_t* panel) {
  for (int64_t k = 0; k < depth; k += kLanes) {
    __m256i r[8];
    for (int i = 0; i < 8; ++i) {
      alignas(16) int8_t rest[16] = {};
      const int8_t* place = weight + i * stride + 2 * k;
      if (i < rows && k + kLanes > depth) std::memcpy(rest, place, 2 * (depth - k));
      r[i] = Floats::load(i < rows && k + kLanes <= depth ? place : rest);
    }
    transpose_words(r);
    for (int i = 0; i < 8; ++i, panel += kPanel) _mm256_store_si256(reinterpret_cast<__m256i*>(panel), r[i]);
  }
}

void interleave_halves(const int8_t* weight, int64_t stride, int rows, int64_t depth, int32_t* panel) {
  interleave_halves8(weight, stride, rows < kLanes ? rows : kLanes, depth, panel);
  interleave_halves8(weight + kLanes * stride, stride, rows - kLanes, depth, panel + kLanes);
}

}  // namespace

const ProductKernels kProductAvx2 = {
    2, 1, kPanel, kTileTokens, kDotTokens, 16, 24, 3, false, interleave<2>, tile<Pairs>, dot<Pairs>,
    group_tile<Pairs>, group_dot<Pairs>};
const ProductKernels kProductHalfAvx2 = {
    4, 2, kPanel, kTileTokens, kDotTokens, 12, 16, 0, false, interleave_halves, tile<Floats>, dot<Floats>,
    nullptr, nullptr};

}  // namespace mq
#endif
