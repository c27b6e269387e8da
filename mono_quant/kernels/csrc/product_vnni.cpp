// The integer product on AVX512-VNNI: int16 pairs, and int8 quads with unsigned weights.
#include "common.h"

#ifdef MQ_X86
#define MQ_TARGET MQ_VNNI
#include "avx512_tiles.h"

namespace mq {
namespace {

// vpdpwssd: int16 pairs, multiplied and added in one instruction.
struct VnniPairs {
  static constexpr int kCodeSize = 2;
  // Widened to int16.
  MQ_VNNI static MQ_INLINE __m512i load(const int8_t* weight, __mmask64 mask) {
    return _mm512_cvtepi8_epi16(_mm256_maskz_loadu_epi8(static_cast<__mmask32>(mask), weight));
  }
  MQ_VNNI static MQ_INLINE __m512i add(__m512i acc, __m512i weights, __m512i codes) {
    return _mm512_dpwssd_epi32(acc, weights, codes);
  }
};

// vpdpbusd: unsigned weights w + 128 by signed codes. Nothing saturates; the wrap-around of the sum is undone by
// the token's correction.
struct VnniBytes {
  static constexpr int kCodeSize = 1;
  MQ_VNNI static MQ_INLINE __m512i load(const int8_t* weight, __mmask64 mask) {
    return _mm512_xor_si512(_mm512_maskz_loadu_epi8(mask, weight), _mm512_set1_epi8(-128));
  }
  MQ_VNNI static MQ_INLINE __m512i add(__m512i acc, __m512i weights, __m512i codes) {
    return _mm512_dpbusd_epi32(acc, weights, codes);
  }
};

}  // namespace

const ProductKernels kProductVnniWide = make<VnniPairs>();
const ProductKernels kProductVnniBytes = make<VnniBytes>();

}  // namespace mq
#endif
