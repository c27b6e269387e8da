// Products on AVX2: int8 weights widened to int16 and `vpmaddwd`, exact for every code; float16 weights widened to
// float.
#include "common.h"

#ifdef MQ_X86
#include <immintrin.h>

namespace mq {
namespace {

constexpr int kLanes = 8;
constexpr int kPanel = 16;
constexpr int kTileTokens = 6;
constexpr int kDotTokens = 4;

struct Pairs {
  static constexpr int kCodeSize = 2;
  static constexpr int64_t kStep = 16;
  MQ_AVX2 static MQ_INLINE __m256i load(const int8_t* weight) {
    return _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(weight)));
  }
  MQ_AVX2 static MQ_INLINE __m256i add(__m256i acc, __m256i weights, __m256i codes) {
    return _mm256_add_epi32(acc, _mm256_madd_epi16(weights, codes));
  }
};

struct Floats {
  static constexpr int kCodeSize = 4;
  static constexpr int64_t kStep = 8;
  MQ_AVX2 static MQ_INLINE __m256i load(const int8_t* weight) {
    return _mm256_castps_si256(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(weight))));
  }
  MQ_AVX2 static MQ_INLINE __m256i add(__m256i acc, __m256i weights, __m256i codes) {
    return _mm256_castps_si256(
        _mm256_fmadd_ps(_mm256_castsi256_ps(weights), _mm256_castsi256_ps(codes), _mm256_castsi256_ps(acc)));
  }
};

// Both take sixteen bytes of weights at a time; a cache line of each row is one turn of the loop.
constexpr int64_t kDotBytes = 16;
constexpr int64_t kLineBytes = 64;

MQ_AVX2 MQ_INLINE void transpose_words(__m256i r[8]) {
  __m256i t[8];
  for (int i = 0; i < 4; ++i) {
    t[2 * i] = _mm256_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm256_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
  }
  __m256i u[8];
  for (int i = 0; i < 2; ++i) {
    u[4 * i] = _mm256_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
    u[4 * i + 1] = _mm256_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
    u[4 * i + 2] = _mm256_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
    u[4 * i + 3] = _mm256_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    r[i] = _mm256_permute2x128_si256(u[i], u[i + 4], 0x20);
    r[i + 4] = _mm256_permute2x128_si256(u[i], u[i + 4], 0x31);
  }
}

// 32 weights, zeros from `depth` on.
MQ_AVX2 MQ_INLINE __m256i load_weights(const int8_t* weight, int64_t k, int64_t depth) {
  if (k + 32 <= depth) return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(weight + k));
  alignas(32) int8_t rest[32] = {};
  std::memcpy(rest, weight + k, depth - k);
  return _mm256_load_si256(reinterpret_cast<const __m256i*>(rest));
}

// Eight rows, `vectors` * 8 words apart in the panel for each pair of codes.
MQ_AVX2 void interleave8(const int8_t* weight, int64_t stride, int rows, int64_t depth, int vectors, int32_t* panel) {
  // Bytes 0 2 1 3 of each word: its even bytes then hold the first pair and its odd bytes the second.
  const __m256i order = _mm256_set_epi8(15, 13, 14, 12, 11, 9, 10, 8, 7, 5, 6, 4, 3, 1, 2, 0, 15, 13, 14, 12, 11, 9, 10,
                                        8, 7, 5, 6, 4, 3, 1, 2, 0);
  const int64_t step = vectors * kLanes;
  for (int64_t k = 0; k < depth; k += 32) {
    __m256i r[8];
    for (int i = 0; i < 8; ++i) {
      r[i] = i < rows ? _mm256_shuffle_epi8(load_weights(weight + i * stride, k, depth), order) : _mm256_setzero_si256();
    }
    transpose_words(r);
    for (int i = 0; i < 8; ++i) {
      const __m256i first = _mm256_srai_epi16(_mm256_slli_epi16(r[i], 8), 8);
      const __m256i second = _mm256_srai_epi16(r[i], 8);
      _mm256_store_si256(reinterpret_cast<__m256i*>(panel), first);
      _mm256_store_si256(reinterpret_cast<__m256i*>(panel + step), second);
      panel += 2 * step;
    }
  }
}

void interleave(const int8_t* weight, int64_t stride, int rows, int64_t depth, int32_t* panel) {
  interleave8(weight, stride, rows < kLanes ? rows : kLanes, depth, 2, panel);
  interleave8(weight + kLanes * stride, stride, rows - kLanes, depth, 2, panel + kLanes);
}

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

template <class Op, int T>
MQ_AVX2 MQ_INLINE void add_words(__m256i acc[T][2], const int32_t* codes, int64_t stride, const int32_t* panel,
                                 int64_t words) {
  const __m256i* b = reinterpret_cast<const __m256i*>(panel);
  for (int64_t i = 0; i < words; ++i, b += 2) {
    const __m256i b0 = _mm256_load_si256(b), b1 = _mm256_load_si256(b + 1);
#pragma GCC unroll 6
    for (int t = 0; t < T; ++t) {
      const __m256i a = _mm256_set1_epi32(codes[t * stride + i]);
      acc[t][0] = Op::add(acc[t][0], b0, a);
      acc[t][1] = Op::add(acc[t][1], b1, a);
    }
  }
}

template <class Op, int T>
MQ_AVX2 void tile_of(const int32_t* codes, int64_t stride, const int32_t* panel, int64_t words, int32_t* sums,
                     bool accumulate) {
  __m256i acc[T][2];
  __m256i* out = reinterpret_cast<__m256i*>(sums);
#pragma GCC unroll 6
  for (int t = 0; t < T; ++t) {
    for (int v = 0; v < 2; ++v) acc[t][v] = accumulate ? _mm256_loadu_si256(out + 2 * t + v) : _mm256_setzero_si256();
  }
  add_words<Op, T>(acc, codes, stride, panel, words);
#pragma GCC unroll 6
  for (int t = 0; t < T; ++t) {
    for (int v = 0; v < 2; ++v) _mm256_storeu_si256(out + 2 * t + v, acc[t][v]);
  }
}

template <class Op>
void tile(const int32_t* codes, int64_t stride, int tokens, const int32_t* panel, int, int64_t words, int32_t* sums,
          bool accumulate) {
  switch (tokens) {
    case 1: return tile_of<Op, 1>(codes, stride, panel, words, sums, accumulate);
    case 2: return tile_of<Op, 2>(codes, stride, panel, words, sums, accumulate);
    case 3: return tile_of<Op, 3>(codes, stride, panel, words, sums, accumulate);
    case 4: return tile_of<Op, 4>(codes, stride, panel, words, sums, accumulate);
    case 5: return tile_of<Op, 5>(codes, stride, panel, words, sums, accumulate);
    default: return tile_of<Op, 6>(codes, stride, panel, words, sums, accumulate);
  }
}

template <class Op, int T>
MQ_AVX2 void group_tile_of(const int32_t* codes, int64_t stride, const int32_t* panel, int64_t words,
                           const Token* token, int64_t token_stride, float* totals, bool accumulate) {
  __m256i acc[T][2];
#pragma GCC unroll 6
  for (int t = 0; t < T; ++t) acc[t][0] = acc[t][1] = _mm256_set1_epi32(token[t * token_stride].correction);
  add_words<Op, T>(acc, codes, stride, panel, words);
#pragma GCC unroll 6
  for (int t = 0; t < T; ++t) {
    const __m256 scale = _mm256_set1_ps(token[t * token_stride].scale);
#pragma GCC unroll 2
    for (int v = 0; v < 2; ++v) {
      float* place = totals + t * kPanel + v * kLanes;
      const __m256 value = _mm256_mul_ps(_mm256_cvtepi32_ps(acc[t][v]), scale);
      _mm256_storeu_ps(place, accumulate ? _mm256_add_ps(_mm256_loadu_ps(place), value) : value);
    }
  }
}

template <class Op>
void group_tile(const int32_t* codes, int64_t stride, int tokens, const int32_t* panel, int, int64_t words,
                const Token* token, int64_t token_stride, float* totals, bool accumulate) {
  switch (tokens) {
    case 1: return group_tile_of<Op, 1>(codes, stride, panel, words, token, token_stride, totals, accumulate);
    case 2: return group_tile_of<Op, 2>(codes, stride, panel, words, token, token_stride, totals, accumulate);
    case 3: return group_tile_of<Op, 3>(codes, stride, panel, words, token, token_stride, totals, accumulate);
    case 4: return group_tile_of<Op, 4>(codes, stride, panel, words, token, token_stride, totals, accumulate);
    case 5: return group_tile_of<Op, 5>(codes, stride, panel, words, token, token_stride, totals, accumulate);
    default: return group_tile_of<Op, 6>(codes, stride, panel, words, token, token_stride, totals, accumulate);
  }
}

// The sums over all lanes of four vectors.
template <bool Floats>
MQ_AVX2 MQ_INLINE __m128i four_totals(const __m256i v[4]) {
  if constexpr (Floats) {
    const __m256 s = _mm256_hadd_ps(_mm256_hadd_ps(_mm256_castsi256_ps(v[0]), _mm256_castsi256_ps(v[1])),
                                    _mm256_hadd_ps(_mm256_castsi256_ps(v[2]), _mm256_castsi256_ps(v[3])));
    return _mm_castps_si128(_mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1)));
  }
  const __m256i s = _mm256_hadd_epi32(_mm256_hadd_epi32(v[0], v[1]), _mm256_hadd_epi32(v[2], v[3]));
  return _mm_add_epi32(_mm256_castsi256_si128(s), _mm256_extracti128_si256(s, 1));
}

// R weight rows by T tokens: the accumulators, the tokens' codes and a weight fit the sixteen registers.
template <class Op, int T, int R>
MQ_AVX2 MQ_INLINE void dot_step(__m256i acc[T][R], const int8_t* const* weight, const char* codes, int64_t stride) {
  __m256i a[T];
#pragma GCC unroll 4
  for (int t = 0; t < T; ++t) {
    a[t] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes + t * stride * Op::kCodeSize));
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
    const __m256i w = Op::load(weight[r]);
#pragma GCC unroll 4
    for (int t = 0; t < T; ++t) acc[t][r] = Op::add(acc[t][r], w, a[t]);
  }
}

template <class Op, int T, int R>
MQ_AVX2 MQ_INLINE void store_totals(const __m256i acc[T][R], int32_t* sums, int64_t sums_stride) {
  if constexpr (R == 4) {
    for (int t = 0; t < T; ++t) {
      _mm_storeu_si128(reinterpret_cast<__m128i*>(sums + t * sums_stride), four_totals<Op::kCodeSize == 4>(acc[t]));
    }
  } else {
    for (int t = 0; t < T; t += 2) {
      const int u = t + 1 < T ? t + 1 : t;
      const __m256i both[4] = {acc[t][0], acc[t][1], acc[u][0], acc[u][1]};
      const __m128i totals = four_totals<Op::kCodeSize == 4>(both);
      _mm_storel_epi64(reinterpret_cast<__m128i*>(sums + t * sums_stride), totals);
      _mm_storel_epi64(reinterpret_cast<__m128i*>(sums + u * sums_stride), _mm_unpackhi_epi64(totals, totals));
    }
  }
}

template <class Op, int T, int R, bool Ahead>
MQ_AVX2 void dot_of(const int8_t* const* weight, int64_t depth, int64_t ahead, const void* codes, int64_t stride,
                    int32_t* sums, int64_t sums_stride) {
  __m256i acc[T][R];
#pragma GCC unroll 4
  for (int t = 0; t < T; ++t) {
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) acc[t][r] = _mm256_setzero_si256();
  }
  const char* place = static_cast<const char*>(codes);
  const int8_t* w[R];
  for (int r = 0; r < R; ++r) w[r] = weight[r];
  int64_t k = 0;
  for (; k + Op::kStep <= depth; k += Op::kStep, place += Op::kStep * Op::kCodeSize) {
    if (Ahead && k % (kLineBytes / kDotBytes * Op::kStep) == 0) {
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) _mm_prefetch(w[r] + ahead, _MM_HINT_T1);
    }
    dot_step<Op, T, R>(acc, w, place, stride);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) w[r] += kDotBytes;
  }
  if (k < depth) {
    int8_t rest[R][kDotBytes] = {};
    const int8_t* last[R];
    for (int r = 0; r < R; ++r) {
      std::memcpy(rest[r], w[r], (depth - k) * kDotBytes / Op::kStep);
      last[r] = rest[r];
    }
    dot_step<Op, T, R>(acc, last, place, stride);
  }
  store_totals<Op, T, R>(acc, sums, sums_stride);
}

// One token by four rows of codes, read one after another: the fewer streams, the faster these flow from memory.
template <bool Ahead>
MQ_AVX2 void dot_stream(const int8_t* const weight[4], int64_t depth, const void* codes, int32_t* sums) {
  __m256i total[4];
#pragma GCC unroll 4
  for (int r = 0; r < 4; ++r) {
    const int8_t* w = weight[r];
    const __m256i* c = static_cast<const __m256i*>(codes);
    __m256i acc[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) acc[i] = _mm256_setzero_si256();
    int64_t k = 0;
    for (; k + kLineBytes <= depth; k += kLineBytes, w += kLineBytes, c += 4) {
      if (Ahead) _mm_prefetch(w + kStreamAhead, _MM_HINT_T1);
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        acc[i] = Pairs::add(acc[i], Pairs::load(w + i * kDotBytes), _mm256_loadu_si256(c + i));
      }
    }
    for (; k + kDotBytes <= depth; k += kDotBytes, w += kDotBytes, ++c) {
      acc[0] = Pairs::add(acc[0], Pairs::load(w), _mm256_loadu_si256(c));
    }
    if (k < depth) {
      int8_t rest[kDotBytes] = {};
      std::memcpy(rest, w, depth - k);
      acc[1] = Pairs::add(acc[1], Pairs::load(rest), _mm256_loadu_si256(c));
    }
    total[r] = _mm256_add_epi32(_mm256_add_epi32(acc[0], acc[1]), _mm256_add_epi32(acc[2], acc[3]));
  }
  _mm_storeu_si128(reinterpret_cast<__m128i*>(sums), four_totals<false>(total));
}

template <class Op, bool Ahead>
void dot_ahead(const int8_t* const weight[4], int64_t depth, int64_t ahead, const void* codes, int64_t stride,
               int tokens, int32_t* sums, int64_t sums_stride) {
  switch (tokens) {
    case 1:
      if constexpr (Op::kCodeSize == 2) {
        return dot_stream<Ahead>(weight, depth, codes, sums);
      } else {
        return dot_of<Op, 1, 4, Ahead>(weight, depth, ahead, codes, stride, sums, sums_stride);
      }
    case 2: return dot_of<Op, 2, 4, Ahead>(weight, depth, ahead, codes, stride, sums, sums_stride);
    case 3:
      dot_of<Op, 3, 2, Ahead>(weight, depth, ahead, codes, stride, sums, sums_stride);
      return dot_of<Op, 3, 2, Ahead>(weight + 2, depth, ahead, codes, stride, sums + 2, sums_stride);
    default:
      dot_of<Op, 4, 2, Ahead>(weight, depth, ahead, codes, stride, sums, sums_stride);
      return dot_of<Op, 4, 2, Ahead>(weight + 2, depth, ahead, codes, stride, sums + 2, sums_stride);
  }
}

template <class Op>
void dot(const int8_t* const weight[4], int64_t depth, int64_t ahead, const void* codes, int64_t stride, int tokens,
         int32_t* sums, int64_t sums_stride) {
  const auto run = ahead != 0 ? dot_ahead<Op, true> : dot_ahead<Op, false>;
  run(weight, depth, ahead, codes, stride, tokens, sums, sums_stride);
}

template <class Op>
MQ_AVX2 void group_dot(const int8_t* const weight[4], int64_t depth, int64_t group, int64_t ahead, const void* codes,
                       int64_t stride, int tokens, const Token* token, int64_t token_stride, float* totals,
                       int64_t totals_stride) {
  __m128 total[kDotTokens];
  for (int64_t k = 0, g = 0; k < depth; k += group, ++g) {
    const int8_t* const part[4] = {weight[0] + k, weight[1] + k, weight[2] + k, weight[3] + k};
    alignas(16) int32_t sums[kDotTokens * 4];
    dot<Op>(part, group < depth - k ? group : depth - k, ahead, static_cast<const char*>(codes) + k * Op::kCodeSize,
            stride, tokens, sums, 4);
    for (int t = 0; t < tokens; ++t) {
      const Token& of = token[t * token_stride + g];
      const __m128i sum = _mm_add_epi32(_mm_load_si128(reinterpret_cast<const __m128i*>(sums + 4 * t)),
                                        _mm_set1_epi32(of.correction));
      const __m128 value = _mm_mul_ps(_mm_cvtepi32_ps(sum), _mm_set1_ps(of.scale));
      total[t] = g == 0 ? value : _mm_add_ps(total[t], value);
    }
  }
  for (int t = 0; t < tokens; ++t) _mm_storeu_ps(totals + t * totals_stride, total[t]);
}

}  // namespace

const ProductKernels kProductAvx2 = {
    2, 1, kPanel, kTileTokens, kDotTokens, 16, 24, false, interleave, tile<Pairs>, dot<Pairs>,
    group_tile<Pairs>, group_dot<Pairs>};
const ProductKernels kProductHalfAvx2 = {
    4, 2, kPanel, kTileTokens, kDotTokens, 12, 16, false, interleave_halves, tile<Floats>, dot<Floats>, nullptr, nullptr};

}  // namespace mq
#endif
