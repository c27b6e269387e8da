// The integer product of AVX-VNNI: 8-bit codes on 256-bit vectors.
//
// Included once per encoding with MQ_TARGET, MQ_DPBUSD and MQ_KERNELS set: that of AVX-VNNI, for processors without
// AVX-512,
// and that of AVX-512, whose only use is to test this code where AVX-VNNI is missing.
#include "avx2_tiles.h"

namespace mq {
namespace {

// vpdpbusd: unsigned weights w + 128 by signed codes. Nothing saturates; the wrap-around of the sum is undone by
// the token's correction.
struct Bytes {
  static constexpr int kCodeSize = 1;
  static constexpr int64_t kStep = 32, kBytes = 32;
  MQ_TARGET static MQ_INLINE __m256i load(const int8_t* weight) {
    return _mm256_xor_si256(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(weight)), _mm256_set1_epi8(-128));
  }
  MQ_TARGET static MQ_INLINE __m256i add(__m256i acc, __m256i weights, __m256i codes) {
    return MQ_DPBUSD(acc, weights, codes);
  }
};

}  // namespace

const ProductKernels MQ_KERNELS = {
    1, 1, kPanel, kTileTokens, kDotTokens, 6, 32, 0, true, interleave<1>, tile<Bytes>, dot<Bytes>, group_tile<Bytes>,
    group_dot<Bytes>};

}  // namespace mq
