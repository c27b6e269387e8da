// Products on 256-bit vectors, for an operation `Op` that multiplies and adds.
//
// An Op names the size of a code (4: floats with float16 weights, 2: int16, 1: int8 with unsigned weights) and how many
// bytes of weights it loads at once (kBytes, for kStep values), loads them, and adds products of weights and codes.
//
// Included once per instruction set with MQ_TARGET set to it: a target attribute cannot depend on a template argument,
// and code compiled for VNNI must not run without it.
#include "words256.h"

namespace mq {
namespace {

constexpr int kLanes = 8;
constexpr int kPanel = 16;
constexpr int kTileTokens = 6;
constexpr int kDotTokens = 4;
// A cache line of each row is one turn of the loop.
constexpr int64_t kLineBytes = 64;

// 32 weights, zeros from `depth` on.
MQ_TARGET MQ_INLINE __m256i load_weights(const int8_t* weight, int64_t k, int64_t depth) {
  if (k + 32 <= depth) return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(weight + k));
  alignas(32) int8_t rest[32] = {};
  std::memcpy(rest, weight + k, depth - k);
  return _mm256_load_si256(reinterpret_cast<const __m256i*>(rest));
}

// Eight rows, `step` words from one word of the panel to the next.
template <int CodeSize>
MQ_TARGET void interleave8(const int8_t* weight, int64_t stride, int rows, int64_t depth, int64_t step,
                           int32_t* panel) {
  // Bytes 0 2 1 3 of each word: its even bytes then hold the first pair and its odd bytes the second.
  const __m256i order = _mm256_set_epi8(15, 13, 14, 12, 11, 9, 10, 8, 7, 5, 6, 4, 3, 1, 2, 0, 15, 13, 14, 12, 11, 9, 10,
                                        8, 7, 5, 6, 4, 3, 1, 2, 0);
  const __m256i offset = _mm256_set1_epi8(-128);
  for (int64_t k = 0; k < depth; k += 32) {
    __m256i r[8];
    for (int i = 0; i < 8; ++i) {
      r[i] = i < rows ? load_weights(weight + i * stride, k, depth) : _mm256_setzero_si256();
      r[i] = CodeSize == 1 ? _mm256_xor_si256(r[i], offset) : _mm256_shuffle_epi8(r[i], order);
    }
    transpose_words(r);
    for (int i = 0; i < 8; ++i, panel += step) {
      if (CodeSize == 1) {
        _mm256_store_si256(reinterpret_cast<__m256i*>(panel), r[i]);
        continue;
      }
      _mm256_store_si256(reinterpret_cast<__m256i*>(panel), _mm256_srai_epi16(_mm256_slli_epi16(r[i], 8), 8));
      panel += step;
      _mm256_store_si256(reinterpret_cast<__m256i*>(panel), _mm256_srai_epi16(r[i], 8));
    }
  }
}

template <int CodeSize>
void interleave(const int8_t* weight, int64_t stride, int rows, int64_t depth, int32_t* panel) {
  interleave8<CodeSize>(weight, stride, rows < kLanes ? rows : kLanes, depth, kPanel, panel);
  interleave8<CodeSize>(weight + kLanes * stride, stride, rows - kLanes, depth, kPanel, panel + kLanes);
}

template <class Op, int T>
MQ_TARGET MQ_INLINE void add_words(__m256i acc[T][2], const int32_t* codes, int64_t stride, const int32_t* panel,
                                 int64_t words) {
  const __m256i* b = reinterpret_cast<const __m256i*>(panel);
  int64_t i = 0;
  if constexpr (T == 1 && Op::kCodeSize != 4) {
    // Two chains of sums alone would wait for each other; floats may not take another order.
    __m256i more[3][2];
#pragma GCC unroll 3
    for (int u = 0; u < 3; ++u) more[u][0] = more[u][1] = _mm256_setzero_si256();
    for (; i + 4 <= words; i += 4, b += 8) {
#pragma GCC unroll 4
      for (int u = 0; u < 4; ++u) {
        const __m256i a = _mm256_set1_epi32(codes[i + u]);
        __m256i* sum = u == 3 ? acc[0] : more[u];
        sum[0] = Op::add(sum[0], _mm256_load_si256(b + 2 * u), a);
        sum[1] = Op::add(sum[1], _mm256_load_si256(b + 2 * u + 1), a);
      }
    }
#pragma GCC unroll 2
    for (int v = 0; v < 2; ++v) {
      acc[0][v] = _mm256_add_epi32(_mm256_add_epi32(acc[0][v], more[0][v]), _mm256_add_epi32(more[1][v], more[2][v]));
    }
  }
  for (; i < words; ++i, b += 2) {
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
MQ_TARGET void tile_of(const int32_t* codes, int64_t stride, const int32_t* panel, int64_t words, int32_t* sums,
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

// Ends the life of a sum as an accumulator. GCC 12 otherwise keeps a second copy of each for what comes after the
// loop, and
// moves both through memory in every turn.
MQ_TARGET MQ_INLINE void settle(__m256i& sum) { asm("" : "+x"(sum)); }

template <class Op, int T>
MQ_TARGET void group_tile_of(const int32_t* codes, int64_t stride, const int32_t* panel, int64_t words,
                           const Token* token, int64_t token_stride, float* totals, bool accumulate) {
  __m256i acc[T][2];
#pragma GCC unroll 6
  for (int t = 0; t < T; ++t) acc[t][0] = acc[t][1] = _mm256_set1_epi32(token[t * token_stride].correction);
  add_words<Op, T>(acc, codes, stride, panel, words);
#pragma GCC unroll 6
  for (int t = 0; t < T; ++t) {
    settle(acc[t][0]);
    settle(acc[t][1]);
  }
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
template <bool AreFloats>
MQ_TARGET MQ_INLINE __m128i four_totals(const __m256i v[4]) {
  if constexpr (AreFloats) {
    const __m256 s = _mm256_hadd_ps(_mm256_hadd_ps(_mm256_castsi256_ps(v[0]), _mm256_castsi256_ps(v[1])),
                                    _mm256_hadd_ps(_mm256_castsi256_ps(v[2]), _mm256_castsi256_ps(v[3])));
    return _mm_castps_si128(_mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1)));
  }
  const __m256i s = _mm256_hadd_epi32(_mm256_hadd_epi32(v[0], v[1]), _mm256_hadd_epi32(v[2], v[3]));
  return _mm_add_epi32(_mm256_castsi256_si128(s), _mm256_extracti128_si256(s, 1));
}

// R weight rows by T tokens: the accumulators, the tokens' codes and a weight fit the sixteen registers.
template <class Op, int T, int R>
MQ_TARGET MQ_INLINE void dot_step(__m256i acc[T][R], const int8_t* const* weight, const char* codes, int64_t stride) {
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
MQ_TARGET MQ_INLINE void store_totals(const __m256i acc[T][R], int32_t* sums, int64_t sums_stride) {
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
MQ_TARGET void dot_of(const int8_t* const* weight, int64_t depth, int64_t ahead, const void* codes, int64_t stride,
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
    if (Ahead && k % (kLineBytes / Op::kBytes * Op::kStep) == 0) {
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) _mm_prefetch(w[r] + ahead, _MM_HINT_T1);
    }
    dot_step<Op, T, R>(acc, w, place, stride);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) w[r] += Op::kBytes;
  }
  if (k < depth) {
    int8_t rest[R][Op::kBytes] = {};
    const int8_t* last[R];
    for (int r = 0; r < R; ++r) {
      std::memcpy(rest[r], w[r], (depth - k) * Op::kBytes / Op::kStep);
      last[r] = rest[r];
    }
    dot_step<Op, T, R>(acc, last, place, stride);
  }
  store_totals<Op, T, R>(acc, sums, sums_stride);
}

// One token by four rows of codes, read one after another: the fewer streams, the faster these flow from memory.
template <class Op, bool Ahead>
MQ_TARGET void dot_stream(const int8_t* const weight[4], int64_t depth, const void* codes, int32_t* sums) {
  constexpr int kParts = kLineBytes / Op::kBytes;
  __m256i total[4];
#pragma GCC unroll 4
  for (int r = 0; r < 4; ++r) {
    const int8_t* w = weight[r];
    const __m256i* c = static_cast<const __m256i*>(codes);
    __m256i acc[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) acc[i] = _mm256_setzero_si256();
    int64_t k = 0;
    for (; k + kLineBytes <= depth; k += kLineBytes, w += kLineBytes, c += kParts) {
      if (Ahead) _mm_prefetch(w + kStreamAhead, _MM_HINT_T1);
#pragma GCC unroll 4
      for (int i = 0; i < kParts; ++i) {
        acc[i] = Op::add(acc[i], Op::load(w + i * Op::kBytes), _mm256_loadu_si256(c + i));
      }
    }
    for (; k + Op::kBytes <= depth; k += Op::kBytes, w += Op::kBytes, ++c) {
      acc[0] = Op::add(acc[0], Op::load(w), _mm256_loadu_si256(c));
    }
    if (k < depth) {
      int8_t rest[Op::kBytes] = {};
      std::memcpy(rest, w, depth - k);
      acc[1] = Op::add(acc[1], Op::load(rest), _mm256_loadu_si256(c));
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
      if constexpr (Op::kCodeSize != 4) {
        return dot_stream<Op, Ahead>(weight, depth, codes, sums);
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

// The sums over all lanes of eight vectors, in their order.
MQ_TARGET MQ_INLINE __m256i eight_totals(const __m256i v[8]) {
  __m256i four[2];
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
    const __m256i *a = v + 4 * i, *c = a + 2;
    const __m256i ab = _mm256_add_epi32(_mm256_unpacklo_epi32(a[0], a[1]), _mm256_unpackhi_epi32(a[0], a[1]));
    const __m256i cd = _mm256_add_epi32(_mm256_unpacklo_epi32(c[0], c[1]), _mm256_unpackhi_epi32(c[0], c[1]));
    four[i] = _mm256_add_epi32(_mm256_unpacklo_epi64(ab, cd), _mm256_unpackhi_epi64(ab, cd));
  }
  return _mm256_add_epi32(_mm256_permute2x128_si256(four[0], four[1], 0x20),
                          _mm256_permute2x128_si256(four[0], four[1], 0x31));
}

// Four weight rows by one token and two groups from the one at `k` on, or by two tokens and one group: eight sums,
// added up together. Lanes hold the rows of the first, then those of the second.
template <class Op, int T, bool Whole>
MQ_TARGET MQ_INLINE __m256i group_sums(const int8_t* const weight[4], int64_t k, int64_t depth, int64_t group,
                                       int64_t ahead, const char* const codes[T]) {
  __m256i acc[8];
#pragma GCC unroll 2
  for (int g = 0; g < 2 / T; ++g) {
    const int64_t start = k + g * group, end = start + group < depth ? start + group : depth;
#pragma GCC unroll 8
    for (int i = 0; i < 4 * T; ++i) acc[g * 4 * T + i] = _mm256_setzero_si256();
    for (int64_t j = start; j < end; j += Op::kStep) {
#pragma GCC unroll 4
      for (int r = 0; r < 4; ++r) {
        const int8_t* place = weight[r] + j;
        int8_t rest[Op::kBytes] = {};
        if (!Whole && j + Op::kStep > end) std::memcpy(rest, place, end - j);
        if (Whole) _mm_prefetch(place + ahead, _MM_HINT_T1);
        const __m256i w = Op::load(!Whole && j + Op::kStep > end ? rest : place);
#pragma GCC unroll 2
        for (int t = 0; t < T; ++t) {
          __m256i& sum = acc[(g * T + t) * 4 + r];
          sum = Op::add(sum, w, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes[t] + j * Op::kCodeSize)));
        }
      }
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) settle(acc[i]);
  return eight_totals(acc);
}

// One or two tokens.
template <class Op, int T>
MQ_TARGET void group_dot_of(const int8_t* const weight[4], int64_t depth, int64_t group, int64_t ahead,
                            const void* codes, int64_t stride, const Token* token, int64_t token_stride, float* totals,
                            int64_t totals_stride) {
  constexpr int kGroups = 2 / T;
  const int64_t groups = (depth + group - 1) / group;
  const char* row[T];
  for (int t = 0; t < T; ++t) row[t] = static_cast<const char*>(codes) + t * stride * Op::kCodeSize;
  // "-0.0 + x" is x in every bit
  __m128 total[2] = {_mm_set1_ps(-0.0f), _mm_set1_ps(-0.0f)};
  for (int64_t g = 0; g < groups; g += kGroups) {
    const bool two = T == 2 || g + 1 < groups, whole = (g + kGroups) * group <= depth || depth % group == 0;
    const Token& a = token[g];
    const Token& b = T == 2 ? token[token_stride + g] : token[two ? g + 1 : g];
    const __m256i sums = whole ? group_sums<Op, T, true>(weight, g * group, depth, group, ahead, row)
                               : group_sums<Op, T, false>(weight, g * group, depth, group, 0, row);
    const __m256i corrections = _mm256_setr_m128i(_mm_set1_epi32(a.correction), _mm_set1_epi32(b.correction));
    const __m256 value = _mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_add_epi32(sums, corrections)),
                                       _mm256_setr_m128(_mm_set1_ps(a.scale), _mm_set1_ps(b.scale)));
    total[0] = _mm_add_ps(total[0], _mm256_castps256_ps128(value));
    if (two) total[T - 1] = _mm_add_ps(total[T - 1], _mm256_extractf128_ps(value, 1));
  }
  for (int t = 0; t < T; ++t) _mm_storeu_ps(totals + t * totals_stride, total[t]);
}

template <class Op>
void group_dot(const int8_t* const weight[4], int64_t depth, int64_t group, int64_t ahead, const void* codes,
               int64_t stride, int tokens, const Token* token, int64_t token_stride, float* totals,
               int64_t totals_stride) {
  for (int t = 0; t < tokens; t += 2, ahead = 0) {
    const auto run = t + 1 < tokens ? group_dot_of<Op, 2> : group_dot_of<Op, 1>;
    run(weight, depth, group, ahead, static_cast<const char*>(codes) + t * stride * Op::kCodeSize, stride,
        token + t * token_stride, token_stride, totals + t * totals_stride, totals_stride);
  }
}

}  // namespace
}  // namespace mq
