// The integer product on 512-bit vectors, for an operation `Op` that multiplies and adds.
//
// An Op names the size of a code (4: floats with float16 weights, 2: int16, 1: int8 with unsigned weights), loads
// one vector of weights and adds products of weights and codes.
//
// Included once per instruction set with MQ_TARGET set to it: a target attribute cannot depend on a template
// argument, and code compiled for VNNI must not run without it.
#include "words512.h"

namespace mq {
namespace {

constexpr int kLanes = 16;
constexpr int kVectors = 3;
constexpr int kTileTokens = 8;
constexpr int kDotTokens = 4;

MQ_TARGET MQ_INLINE __mmask64 first_bytes(int64_t count) {
  return count >= 64 ? ~0ull : count <= 0 ? 0ull : (1ull << count) - 1;
}

// Bytes of a weight row that become one block of sixteen vectors in the panel, one word of each row after another.
constexpr int64_t kBlockBytes = 64;

// Sixteen rows of int8; `step` words from one word of the panel to the next.
template <int CodeSize>
MQ_TARGET void interleave_bytes(const int8_t* weight, int64_t stride, int rows, int64_t bytes, int64_t step,
                                int32_t* panel) {
  const __m512i order = _mm512_broadcast_i32x4(_mm_set_epi8(15, 13, 14, 12, 11, 9, 10, 8, 7, 5, 6, 4, 3, 1, 2, 0));
  const __m512i offset = _mm512_set1_epi8(-128);
  for (int64_t k = 0; k < bytes; k += kBlockBytes) {
    __m512i r[16];
    const __mmask64 mask = first_bytes(bytes - k);
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) {
      r[i] = i < rows ? _mm512_maskz_loadu_epi8(mask, weight + i * stride + k) : _mm512_setzero_si512();
      // Bytes 0 2 1 3 of each word: its even bytes then hold the first pair and its odd bytes the second.
      r[i] = CodeSize == 1 ? _mm512_xor_si512(r[i], offset) : _mm512_shuffle_epi8(r[i], order);
    }
    transpose_words(r);
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) {
      if (CodeSize == 1) {
        _mm512_store_si512(panel, r[i]);
        panel += step;
      } else {
        _mm512_store_si512(panel, _mm512_srai_epi16(_mm512_slli_epi16(r[i], 8), 8));
        _mm512_store_si512(panel + step, _mm512_srai_epi16(r[i], 8));
        panel += 2 * step;
      }
    }
  }
}

// Sixteen rows of float16.
MQ_TARGET inline void interleave_halves(const int8_t* weight, int64_t stride, int rows, int64_t bytes, int64_t step,
                                        int32_t* panel) {
  for (int64_t k = 0; k < bytes; k += kBlockBytes / 2) {
    __m512i r[16];
    const __mmask32 mask = static_cast<__mmask32>(first_bytes(bytes - k));
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) {
      const __m256i half = i < rows ? _mm256_maskz_loadu_epi8(mask, weight + i * stride + k) : _mm256_setzero_si256();
      r[i] = _mm512_castps_si512(_mm512_cvtph_ps(half));
    }
    transpose_words(r);
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i, panel += step) _mm512_store_si512(panel, r[i]);
  }
}

template <int CodeSize>
void interleave(const int8_t* weight, int64_t stride, int rows, int64_t depth, int32_t* panel) {
  const int64_t step = (rows + kLanes - 1) / kLanes * kLanes;
  for (int n = 0; n < rows; n += kLanes, weight += kLanes * stride, panel += kLanes) {
    if constexpr (CodeSize == 4) {
      interleave_halves(weight, stride, rows - n, 2 * depth, step, panel);
    } else {
      interleave_bytes<CodeSize>(weight, stride, rows - n, depth, step, panel);
    }
  }
}

constexpr int kColumns = kVectors * kLanes;

template <class Op, int T, int V>
MQ_TARGET MQ_INLINE void add_words(__m512i acc[T][V], const int32_t* codes, int64_t stride, const int32_t* panel,
                                   int64_t words) {
  int64_t i = 0;
  if constexpr (T == 1 && Op::kCodeSize != 4) {
    // V chains of sums alone would wait for each other; floats may not take another order.
    __m512i more[3][V];
#pragma GCC unroll 3
    for (int u = 0; u < 3; ++u) {
#pragma GCC unroll 3
      for (int v = 0; v < V; ++v) more[u][v] = _mm512_setzero_si512();
    }
    for (; i + 4 <= words; i += 4, panel += 4 * V * kLanes) {
#pragma GCC unroll 4
      for (int u = 0; u < 4; ++u) {
        const __m512i a = _mm512_set1_epi32(codes[i + u]);
#pragma GCC unroll 3
        for (int v = 0; v < V; ++v) {
          // Packed weights of one token flow from memory; of an interleaved panel this stays in the cache.
          _mm_prefetch(reinterpret_cast<const char*>(panel + (u * V + v) * kLanes) + kStreamAhead, _MM_HINT_T1);
          __m512i& sum = u == 3 ? acc[0][v] : more[u][v];
          sum = Op::add(sum, _mm512_load_si512(panel + (u * V + v) * kLanes), a);
        }
      }
    }
#pragma GCC unroll 3
    for (int v = 0; v < V; ++v) {
      acc[0][v] = _mm512_add_epi32(_mm512_add_epi32(acc[0][v], more[0][v]), _mm512_add_epi32(more[1][v], more[2][v]));
    }
  }
  for (; i < words; ++i, panel += V * kLanes) {
    __m512i b[V];
#pragma GCC unroll 3
    for (int v = 0; v < V; ++v) {
      if constexpr (T <= 4) {
        _mm_prefetch(reinterpret_cast<const char*>(panel + v * kLanes) + kStreamAhead, _MM_HINT_T1);
      }
      b[v] = _mm512_load_si512(panel + v * kLanes);
    }
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) {
      const __m512i a = _mm512_set1_epi32(codes[t * stride + i]);
#pragma GCC unroll 3
      for (int v = 0; v < V; ++v) acc[t][v] = Op::add(acc[t][v], b[v], a);
    }
  }
}

template <class Op, int T, int V>
MQ_TARGET void tile_of(const int32_t* codes, int64_t stride, const int32_t* panel, int64_t words, int32_t* sums,
                       bool accumulate) {
  __m512i acc[T][V];
#pragma GCC unroll 8
  for (int t = 0; t < T; ++t) {
#pragma GCC unroll 3
    for (int v = 0; v < V; ++v) {
      acc[t][v] = accumulate ? _mm512_loadu_si512(sums + t * kColumns + v * kLanes) : _mm512_setzero_si512();
    }
  }
  add_words<Op, T, V>(acc, codes, stride, panel, words);
#pragma GCC unroll 8
  for (int t = 0; t < T; ++t) {
#pragma GCC unroll 3
    for (int v = 0; v < V; ++v) _mm512_storeu_si512(sums + t * kColumns + v * kLanes, acc[t][v]);
  }
}

template <class Op, int T>
void tile_rows(const int32_t* codes, int64_t stride, const int32_t* panel, int rows, int64_t words, int32_t* sums,
               bool accumulate) {
  if (rows > 2 * kLanes) return tile_of<Op, T, 3>(codes, stride, panel, words, sums, accumulate);
  if (rows > kLanes) return tile_of<Op, T, 2>(codes, stride, panel, words, sums, accumulate);
  tile_of<Op, T, 1>(codes, stride, panel, words, sums, accumulate);
}

template <class Op>
void tile(const int32_t* codes, int64_t stride, int tokens, const int32_t* panel, int rows, int64_t words,
          int32_t* sums, bool accumulate) {
  switch (tokens) {
    case 1: return tile_rows<Op, 1>(codes, stride, panel, rows, words, sums, accumulate);
    case 2: return tile_rows<Op, 2>(codes, stride, panel, rows, words, sums, accumulate);
    case 3: return tile_rows<Op, 3>(codes, stride, panel, rows, words, sums, accumulate);
    case 4: return tile_rows<Op, 4>(codes, stride, panel, rows, words, sums, accumulate);
    case 5: return tile_rows<Op, 5>(codes, stride, panel, rows, words, sums, accumulate);
    case 6: return tile_rows<Op, 6>(codes, stride, panel, rows, words, sums, accumulate);
    case 7: return tile_rows<Op, 7>(codes, stride, panel, rows, words, sums, accumulate);
    default: return tile_rows<Op, 8>(codes, stride, panel, rows, words, sums, accumulate);
  }
}

// Ends the life of a sum as an accumulator. GCC 12 otherwise keeps a second copy of each for what comes after the
// loop, and
// moves both through memory in every turn.
MQ_TARGET MQ_INLINE void settle(__m512i& sum) { asm("" : "+v"(sum)); }

// A group's sums leave the registers as floats: with both there were too few.
template <class Op, int T, int V>
MQ_TARGET void group_tile_of(const int32_t* codes, int64_t stride, const int32_t* panel, int64_t words,
                             const Token* token, int64_t token_stride, float* totals, bool accumulate) {
  __m512i acc[T][V];
#pragma GCC unroll 8
  for (int t = 0; t < T; ++t) {
#pragma GCC unroll 3
    for (int v = 0; v < V; ++v) acc[t][v] = _mm512_set1_epi32(token[t * token_stride].correction);
  }
  add_words<Op, T, V>(acc, codes, stride, panel, words);
#pragma GCC unroll 8
  for (int t = 0; t < T; ++t) {
#pragma GCC unroll 3
    for (int v = 0; v < V; ++v) settle(acc[t][v]);
  }
#pragma GCC unroll 8
  for (int t = 0; t < T; ++t) {
    const __m512 scale = _mm512_set1_ps(token[t * token_stride].scale);
#pragma GCC unroll 3
    for (int v = 0; v < V; ++v) {
      float* place = totals + t * kColumns + v * kLanes;
      const __m512 value = _mm512_mul_ps(_mm512_cvtepi32_ps(acc[t][v]), scale);
      _mm512_storeu_ps(place, accumulate ? _mm512_add_ps(_mm512_loadu_ps(place), value) : value);
    }
  }
}

template <class Op, int T>
void group_tile_rows(const int32_t* codes, int64_t stride, const int32_t* panel, int rows, int64_t words,
                     const Token* token, int64_t token_stride, float* totals, bool accumulate) {
  const auto run = rows > 2 * kLanes ? group_tile_of<Op, T, 3> : rows > kLanes ? group_tile_of<Op, T, 2>
                                                                               : group_tile_of<Op, T, 1>;
  run(codes, stride, panel, words, token, token_stride, totals, accumulate);
}

template <class Op>
void group_tile(const int32_t* codes, int64_t stride, int tokens, const int32_t* panel, int rows, int64_t words,
                const Token* token, int64_t token_stride, float* totals, bool accumulate) {
  constexpr decltype(&group_tile_rows<Op, 1>) kRun[kTileTokens] = {
      group_tile_rows<Op, 1>, group_tile_rows<Op, 2>, group_tile_rows<Op, 3>, group_tile_rows<Op, 4>,
      group_tile_rows<Op, 5>, group_tile_rows<Op, 6>, group_tile_rows<Op, 7>, group_tile_rows<Op, 8>};
  kRun[tokens - 1](codes, stride, panel, rows, words, token, token_stride, totals, accumulate);
}

MQ_TARGET MQ_INLINE __m256i halves(__m512i v) {
  return _mm256_add_epi32(_mm512_castsi512_si256(v), _mm512_extracti64x4_epi64(v, 1));
}

MQ_TARGET MQ_INLINE __m256 halves_of_floats(__m512i v) {
  return _mm256_add_ps(_mm256_castsi256_ps(_mm512_castsi512_si256(v)),
                       _mm256_castsi256_ps(_mm512_extracti64x4_epi64(v, 1)));
}

// The sums over all lanes of four vectors.
template <bool Floats>
MQ_TARGET MQ_INLINE __m128i four_totals(const __m512i v[4]) {
  if constexpr (Floats) {
    const __m256 s = _mm256_hadd_ps(_mm256_hadd_ps(halves_of_floats(v[0]), halves_of_floats(v[1])),
                                    _mm256_hadd_ps(halves_of_floats(v[2]), halves_of_floats(v[3])));
    return _mm_castps_si128(_mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1)));
  }
  const __m256i s = _mm256_hadd_epi32(_mm256_hadd_epi32(halves(v[0]), halves(v[1])),
                                      _mm256_hadd_epi32(halves(v[2]), halves(v[3])));
  return _mm_add_epi32(_mm256_castsi256_si128(s), _mm256_extracti128_si256(s, 1));
}

template <class Op>
constexpr int64_t kWeightSize = Op::kCodeSize == 4 ? 2 : 1;

template <class Op, int T, bool Ahead>
MQ_TARGET MQ_INLINE void dot_step(__m512i acc[T][4], const int8_t* const weight[4], int64_t k, __mmask64 mask,
                                  int64_t ahead, const char* codes, int64_t stride) {
#pragma GCC unroll 4
  for (int r = 0; r < 4; ++r) {
    const int8_t* place = weight[r] + k * kWeightSize<Op>;
    if constexpr (Ahead) _mm_prefetch(place + ahead, _MM_HINT_T1);
    const __m512i w = Op::load(place, mask);
#pragma GCC unroll 4
    for (int t = 0; t < T; ++t) {
      acc[t][r] = Op::add(acc[t][r], w, _mm512_loadu_si512(codes + (t * stride + k) * Op::kCodeSize));
    }
  }
}

template <class Op, int T, bool Ahead>
MQ_TARGET void dot_of(const int8_t* const weight[4], int64_t depth, int64_t ahead, const void* codes, int64_t stride,
                      int32_t* sums, int64_t sums_stride) {
  constexpr int64_t kStep = 64 / Op::kCodeSize;
  __m512i acc[T][4];
#pragma GCC unroll 4
  for (int t = 0; t < T; ++t) {
#pragma GCC unroll 4
    for (int r = 0; r < 4; ++r) acc[t][r] = _mm512_setzero_si512();
  }
  const char* bytes = static_cast<const char*>(codes);
  int64_t k = 0;
  for (; k + kStep <= depth; k += kStep) dot_step<Op, T, Ahead>(acc, weight, k, ~0ull, ahead, bytes, stride);
  if (k < depth) dot_step<Op, T, false>(acc, weight, k, first_bytes((depth - k) * kWeightSize<Op>), 0, bytes, stride);
#pragma GCC unroll 4
  for (int t = 0; t < T; ++t) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(sums + t * sums_stride), four_totals<Op::kCodeSize == 4>(acc[t]));
  }
}

// One token by four rows of codes from memory, read one after another: the fewer streams, the faster these flow.
template <class Op>
MQ_TARGET void dot_stream(const int8_t* const weight[4], int64_t depth, const void* codes, int32_t* sums) {
  constexpr int64_t kStep = 64 / Op::kCodeSize;
  const char* bytes = static_cast<const char*>(codes);
  __m512i total[4];
#pragma GCC unroll 4
  for (int r = 0; r < 4; ++r) {
    __m512i acc[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) acc[i] = _mm512_setzero_si512();
    int64_t k = 0;
    for (; k + 4 * kStep <= depth; k += 4 * kStep) {
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        const int8_t* place = weight[r] + k + i * kStep;
        _mm_prefetch(place + kStreamAhead, _MM_HINT_T1);
        acc[i] = Op::add(acc[i], Op::load(place, ~0ull), _mm512_loadu_si512(bytes + (k + i * kStep) * Op::kCodeSize));
      }
    }
    for (; k < depth; k += kStep) {
      const __m512i w = Op::load(weight[r] + k, first_bytes(depth - k));
      acc[0] = Op::add(acc[0], w, _mm512_loadu_si512(bytes + k * Op::kCodeSize));
    }
    total[r] = _mm512_add_epi32(_mm512_add_epi32(acc[0], acc[1]), _mm512_add_epi32(acc[2], acc[3]));
  }
  _mm_storeu_si128(reinterpret_cast<__m128i*>(sums), four_totals<false>(total));
}

template <class Op, bool Ahead>
void dot_ahead(const int8_t* const weight[4], int64_t depth, int64_t ahead, const void* codes, int64_t stride,
               int tokens, int32_t* sums, int64_t sums_stride) {
  switch (tokens) {
    case 1:
      if constexpr (Ahead && Op::kCodeSize != 4) {
        return dot_stream<Op>(weight, depth, codes, sums);
      } else {
        return dot_of<Op, 1, Ahead>(weight, depth, ahead, codes, stride, sums, sums_stride);
      }
    case 2: return dot_of<Op, 2, Ahead>(weight, depth, ahead, codes, stride, sums, sums_stride);
    case 3: return dot_of<Op, 3, Ahead>(weight, depth, ahead, codes, stride, sums, sums_stride);
    default: return dot_of<Op, 4, Ahead>(weight, depth, ahead, codes, stride, sums, sums_stride);
  }
}

template <class Op>
void dot(const int8_t* const weight[4], int64_t depth, int64_t ahead, const void* codes, int64_t stride, int tokens,
         int32_t* sums, int64_t sums_stride) {
  const auto run = ahead != 0 ? dot_ahead<Op, true> : dot_ahead<Op, false>;
  run(weight, depth, ahead, codes, stride, tokens, sums, sums_stride);
}

// The sums over all lanes of sixteen vectors, in their order.
MQ_TARGET MQ_INLINE __m512i sixteen_totals(const __m512i v[16]) {
  __m512i four[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const __m512i *a = v + 4 * i, *c = a + 2;
    const __m512i ab = _mm512_add_epi32(_mm512_unpacklo_epi32(a[0], a[1]), _mm512_unpackhi_epi32(a[0], a[1]));
    const __m512i cd = _mm512_add_epi32(_mm512_unpacklo_epi32(c[0], c[1]), _mm512_unpackhi_epi32(c[0], c[1]));
    four[i] = _mm512_add_epi32(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd));
  }
  __m512i eight[2];
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
    eight[i] = _mm512_add_epi32(_mm512_shuffle_i32x4(four[2 * i], four[2 * i + 1], 0x88),
                                _mm512_shuffle_i32x4(four[2 * i], four[2 * i + 1], 0xdd));
  }
  return _mm512_add_epi32(_mm512_shuffle_i32x4(eight[0], eight[1], 0x88),
                          _mm512_shuffle_i32x4(eight[0], eight[1], 0xdd));
}

// Four weight rows by T tokens and 4 / T groups from the one at `k` on: sixteen sums, added up together. Lanes hold
// the rows of the first group's first token, those of its second token, ...
template <class Op, int T, bool Whole, bool Ahead>
MQ_TARGET MQ_INLINE __m512i group_sums(const int8_t* const weight[4], int64_t k, int64_t depth, int64_t group,
                                       int64_t ahead, const char* const codes[T]) {
  constexpr int64_t kStep = 64 / Op::kCodeSize;
  __m512i acc[16];
#pragma GCC unroll 4
  for (int g = 0; g < 4 / T; ++g) {
    const int64_t start = k + g * group, end = start + group < depth ? start + group : depth;
#pragma GCC unroll 16
    for (int i = 0; i < 4 * T; ++i) acc[g * 4 * T + i] = _mm512_setzero_si512();
    for (int64_t j = start; j < end; j += kStep) {
      const __mmask64 mask = Whole ? ~0ull : first_bytes(end - j);
#pragma GCC unroll 4
      for (int r = 0; r < 4; ++r) {
        if constexpr (Ahead) _mm_prefetch(weight[r] + j + ahead, _MM_HINT_T1);
        const __m512i w = Op::load(weight[r] + j, mask);
#pragma GCC unroll 4
        for (int t = 0; t < T; ++t) {
          __m512i& sum = acc[(g * T + t) * 4 + r];
          sum = Op::add(sum, w, _mm512_loadu_si512(codes[t] + j * Op::kCodeSize));
        }
      }
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) settle(acc[i]);
  return sixteen_totals(acc);
}

template <class Op, int T, bool Ahead>
MQ_TARGET void group_dot_of(const int8_t* const weight[4], int64_t depth, int64_t group, int64_t ahead,
                            const void* codes, int64_t stride, int tokens, const Token* token, int64_t token_stride,
                            float* totals, int64_t totals_stride) {
  constexpr int kGroups = 4 / T;
  const int64_t groups = (depth + group - 1) / group;
  // Without as many tokens the first stands in for the last.
  const char* row[T];
  for (int t = 0; t < T; ++t) row[t] = static_cast<const char*>(codes) + (t < tokens ? t : 0) * stride * Op::kCodeSize;
  const __m512i scales = _mm512_setr_epi32(0, 0, 0, 0, 2, 2, 2, 2, 4, 4, 4, 4, 6, 6, 6, 6);
  const __m512i corrections = _mm512_or_si512(scales, _mm512_set1_epi32(1));
  // "-0.0 + x" is x in every bit
  __m512 total = _mm512_set1_ps(-0.0f);
  for (int64_t g = 0; g < groups; g += kGroups) {
    alignas(32) Token of[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const int64_t t = i % T < tokens ? i % T : 0, mine = g + i / T < groups ? g + i / T : g;
      std::memcpy(of + i, token + t * token_stride + mine, sizeof(Token));
    }
    const __m512i tokens4 = _mm512_castsi256_si512(_mm256_load_si256(reinterpret_cast<const __m256i*>(of)));
    const bool whole = (g + kGroups) * group <= depth || depth % group == 0;
    const __m512i sums = whole ? group_sums<Op, T, true, Ahead>(weight, g * group, depth, group, ahead, row)
                               : group_sums<Op, T, false, false>(weight, g * group, depth, group, 0, row);
    const __m512i exact = _mm512_add_epi32(sums, _mm512_permutexvar_epi32(corrections, tokens4));
    __m512 value = _mm512_mul_ps(_mm512_cvtepi32_ps(exact),
                                 _mm512_castsi512_ps(_mm512_permutexvar_epi32(scales, tokens4)));
    const int64_t here = groups - g < kGroups ? groups - g : kGroups;
    for (int64_t i = 0; i < here; ++i) {
      total = _mm512_add_ps(total, value);
      value = T == 1 ? _mm512_shuffle_f32x4(value, value, 0x39) : _mm512_shuffle_f32x4(value, value, 0x4e);
    }
  }
  alignas(64) float out[16];
  _mm512_store_ps(out, total);
  for (int t = 0; t < tokens; ++t) std::memcpy(totals + t * totals_stride, out + 4 * t, 4 * sizeof(float));
}

template <class Op>
void group_dot(const int8_t* const weight[4], int64_t depth, int64_t group, int64_t ahead, const void* codes,
               int64_t stride, int tokens, const Token* token, int64_t token_stride, float* totals,
               int64_t totals_stride) {
  const auto near = tokens == 1   ? group_dot_of<Op, 1, false>
                    : tokens == 2 ? group_dot_of<Op, 2, false>
                                  : group_dot_of<Op, 4, false>;
  const auto far = tokens == 1   ? group_dot_of<Op, 1, true>
                   : tokens == 2 ? group_dot_of<Op, 2, true>
                                 : group_dot_of<Op, 4, true>;
  const auto run = ahead == 0 ? near : far;
  run(weight, depth, group, ahead, codes, stride, tokens, token, token_stride, totals, totals_stride);
}

template <class Op>
constexpr ProductKernels make() {
  constexpr int kShort = Op::kCodeSize == 1 ? 16 : Op::kCodeSize == 2 ? 24 : 48;
  ProductKernels kernels = {Op::kCodeSize, kWeightSize<Op>, kColumns, kTileTokens, kDotTokens, kShort,
                            Op::kCodeSize == 1 ? 40 : 48, Op::kCodeSize == 1 ? 0 : 24, Op::kCodeSize == 1,
                            interleave<Op::kCodeSize>, tile<Op>, dot<Op>, nullptr, nullptr};
  if constexpr (Op::kCodeSize != 4) kernels.group_tile = group_tile<Op>, kernels.group_dot = group_dot<Op>;
  return kernels;
}

}  // namespace
}  // namespace mq
