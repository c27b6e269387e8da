// Products on AVX-512 without VNNI: int8 weights widened to int16, and float16 weights widened to float.
#include "common.h"

#ifdef MQ_X86
#define MQ_TARGET MQ_AVX512
#include "avx512_tiles.h"

namespace mq {
namespace {

// vpmaddwd and an addition: AVX-512 without VNNI.
struct Pairs {
  static constexpr int kCodeSize = 2;
  // Widened to int16.
  MQ_AVX512 static MQ_INLINE __m512i load(const int8_t* weight, __mmask64 mask) {
    return _mm512_cvtepi8_epi16(_mm256_maskz_loadu_epi8(static_cast<__mmask32>(mask), weight));
  }
  MQ_AVX512 static MQ_INLINE __m512i add(__m512i acc, __m512i weights, __m512i codes) {
    return _mm512_add_epi32(acc, _mm512_madd_epi16(weights, codes));
  }
};

// Float activations and float16 weights.
struct Floats {
  static constexpr int kCodeSize = 4;
  MQ_AVX512 static MQ_INLINE __m512i load(const int8_t* weight, __mmask64 mask) {
    return _mm512_castps_si512(_mm512_cvtph_ps(_mm256_maskz_loadu_epi8(static_cast<__mmask32>(mask), weight)));
  }
  MQ_AVX512 static MQ_INLINE __m512i add(__m512i acc, __m512i weights, __m512i codes) {
    return _mm512_castps_si512(
        _mm512_fmadd_ps(_mm512_castsi512_ps(weights), _mm512_castsi512_ps(codes), _mm512_castsi512_ps(acc)));
  }
};

}  // namespace

const ProductKernels kProductAvx512 = make<Pairs>();
const ProductKernels kProductHalfAvx512 = make<Floats>();

}  // namespace mq
#endif
