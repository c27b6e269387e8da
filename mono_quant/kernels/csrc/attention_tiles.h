// Products of float tiles over sixteen lanes, and how rows are laid out for them; see attention_lanes.h.
#pragma once

#include "attention.h"
#include "functions.h"

namespace mq {
namespace {

// Keys side by side where they are laid out for products.
constexpr int64_t kPanel = 64;

MQ_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
MQ_INLINE int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

// c[t][16 v...] = sum over i of a[t][i] * b[i][16 v...]
template <int T, int V>
MQ_TARGET void tile(const float* a, int64_t a_stride, const float* b, int64_t b_stride, int64_t n, float* c,
                    int64_t c_stride) {
  Lanes acc[T][V];
#pragma GCC unroll 12
  for (int t = 0; t < T; ++t) {
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) acc[t][v] = zeros();
  }
  for (int64_t i = 0; i < n; ++i, b += b_stride) {
    Lanes w[V];
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) w[v] = load(b + v * kLaneCount);
#pragma GCC unroll 12
    for (int t = 0; t < T; ++t) {
      const Lanes x = all(a[t * a_stride + i]);
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) acc[t][v] = fma(x, w[v], acc[t][v]);
    }
  }
#pragma GCC unroll 12
  for (int t = 0; t < T; ++t) {
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) store(c + t * c_stride + v * kLaneCount, acc[t][v]);
  }
}

template <int V, int T>
void tile_of(int64_t rows, const float* a, int64_t a_stride, const float* b, int64_t b_stride, int64_t n, float* c,
             int64_t c_stride) {
  if (rows == T) {
    tile<T, V>(a, a_stride, b, b_stride, n, c, c_stride);
  } else if constexpr (T > 1) {
    tile_of<V, T - 1>(rows, a, a_stride, b, b_stride, n, c, c_stride);
  }
}

template <int V>
void columns(int64_t rows, const float* a, int64_t a_stride, const float* b, int64_t b_stride, int64_t n, float* c,
             int64_t c_stride) {
  constexpr int kHeight = kTile[V];
  const int64_t tiles = (rows + kHeight - 1) / kHeight;
  for (int64_t i = 0; i < tiles; ++i) {
    const int64_t t = rows * i / tiles, count = rows * (i + 1) / tiles - t;
    tile_of<V, kHeight>(count, a + t * a_stride, a_stride, b, b_stride, n, c + t * c_stride, c_stride);
  }
}

// c[rows][16 vectors] = a[rows][n] b[n][16 vectors], in tiles W vectors wide and then narrower ones.
template <int W = kWidest>
void product(int64_t vectors, int64_t rows, const float* a, int64_t a_stride, const float* b, int64_t b_stride,
             int64_t n, float* c, int64_t c_stride) {
  int64_t v = 0;
  for (; vectors - v >= W; v += W) {
    columns<W>(rows, a, a_stride, b + v * kLaneCount, b_stride, n, c + v * kLaneCount, c_stride);
  }
  if constexpr (W > 1) {
    product<W - 1>(vectors - v, rows, a, a_stride, b + v * kLaneCount, b_stride, n, c + v * kLaneCount, c_stride);
  }
}

// Sixteen values of a row from d on, zeros behind its end.
template <DType D>
MQ_LANE Lanes load_part(const void* row, int64_t d, int64_t size) {
  if constexpr (D == DType::f32) return load_first(static_cast<const float*>(row) + d, size - d);
  if (size - d >= kLaneCount) return load_as<D>(row, d);
  float part[kLaneCount] = {};
  to_floats(static_cast<const char*>(row) + d * size_of(D), D, size - d, part);
  return load(part);
}

// Keys [count, size] become panels [size][kPanel], zeros behind the last key.
template <DType D>
MQ_TARGET void pack_keys(const void* k, int64_t stride, int64_t count, int64_t size, float* panels) {
  const int64_t padded = round_up(size, kLaneCount);
  for (int64_t p = 0; p < count; p += kLaneCount) {
    const char* rows = static_cast<const char*>(k) + p * stride * size_of(D);
    float* column = panels + p / kPanel * kPanel * padded + p % kPanel;
    for (int64_t d = 0; d < size; d += kLaneCount) {
      Lanes r[kLaneCount];
#pragma GCC unroll 16
      for (int i = 0; i < kLaneCount; ++i) {
        r[i] = p + i < count ? load_part<D>(rows + i * stride * size_of(D), d, size) : zeros();
      }
      transpose(r);
#pragma GCC unroll 16
      for (int i = 0; i < kLaneCount; ++i) store(column + (d + i) * kPanel, r[i]);
    }
  }
}

// Rows [count, size] become float rows of whole vectors.
template <DType D>
MQ_TARGET void copy_rows(const void* source, int64_t stride, int64_t count, int64_t size, float* target) {
  const int64_t padded = round_up(size, kLaneCount);
  for (int64_t i = 0; i < count; ++i) {
    const char* row = static_cast<const char*>(source) + i * stride * size_of(D);
    for (int64_t d = 0; d < size; d += kLaneCount) store(target + i * padded + d, load_part<D>(row, d, size));
  }
}

// c[t][i] = a[t] . keys[i] for R rows of floats and up to sixteen keys, the chains of fused multiply-adds those of `tile`:
// where few rows meet a key, laying it out first costs more than the product.
template <DType D, int R>
MQ_TARGET void score_rows(const float* a, int64_t a_stride, const void* keys, int64_t stride, int64_t count, int64_t size,
                          float* c, int64_t c_stride) {
  const char* row = static_cast<const char*>(keys);
  Lanes acc[R];
#pragma GCC unroll 4
  for (int t = 0; t < R; ++t) acc[t] = zeros();
  for (int64_t d = 0; d < size; d += kLaneCount) {
    Lanes r[kLaneCount];
    if (count >= kLaneCount && size - d >= kLaneCount) {
#pragma GCC unroll 16
      for (int i = 0; i < kLaneCount; ++i) r[i] = load_as<D>(row + i * stride * size_of(D), d);
    } else {
#pragma GCC unroll 16
      for (int i = 0; i < kLaneCount; ++i) r[i] = i < count ? load_part<D>(row + i * stride * size_of(D), d, size) : zeros();
    }
    transpose(r);
    const float* x = a + d;
    if (size - d >= kLaneCount) {
#pragma GCC unroll 16
      for (int i = 0; i < kLaneCount; ++i) {
#pragma GCC unroll 4
        for (int t = 0; t < R; ++t) acc[t] = fma(all(x[t * a_stride + i]), r[i], acc[t]);
      }
    } else {
      for (int64_t i = 0; i < size - d; ++i) {
#pragma GCC unroll 4
        for (int t = 0; t < R; ++t) acc[t] = fma(all(x[t * a_stride + i]), r[i], acc[t]);
      }
    }
  }
#pragma GCC unroll 4
  for (int t = 0; t < R; ++t) store(c + t * c_stride, acc[t]);
}

template <DType D, int R = kDirectRows>
void score_keys(int64_t rows, const float* a, int64_t a_stride, const void* keys, int64_t stride, int64_t count,
                int64_t size, float* c, int64_t c_stride) {
  if constexpr (R > 0) {
    if (rows == R) return score_rows<D, R>(a, a_stride, keys, stride, count, size, c, c_stride);
    score_keys<D, R - 1>(rows, a, a_stride, keys, stride, count, size, c, c_stride);
  }
}

using ScoreKeys = void (*)(int64_t rows, const float* a, int64_t a_stride, const void* keys, int64_t stride, int64_t count,
                           int64_t size, float* c, int64_t c_stride);
constexpr ScoreKeys kScoreKeys[] = {score_keys<DType::f32>, score_keys<DType::f16>, score_keys<DType::bf16>};
using LayOut = void (*)(const void* source, int64_t stride, int64_t count, int64_t size, float* target);
constexpr LayOut kPackKeys[] = {pack_keys<DType::f32>, pack_keys<DType::f16>, pack_keys<DType::bf16>};
constexpr LayOut kCopyRows[] = {copy_rows<DType::f32>, copy_rows<DType::f16>, copy_rows<DType::bf16>};

}  // namespace
}  // namespace mq
