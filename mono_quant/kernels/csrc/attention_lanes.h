// Attention over sixteen lanes. The including file defines MQ_TARGET, one of the macros of lanes.h, and kTile.
//
// A score is one chain of fused multiply-adds over the head size; a sum of values is one over the keys of a block. So
// the shape of tiles, which differs between instruction sets, changes no bit.
#include <limits>

#include "attention.h"
#include "functions.h"

namespace mq {
namespace {

// Keys side by side where they are laid out for products.
constexpr int64_t kPanel = 64;
// Rows whose scores are held at once, and rows that share a packed block of keys.
constexpr int64_t kScoreRows = 48;
// Up to so many rows packing values costs more than reading them where they are.
constexpr int64_t kFewRows = 12;
constexpr int64_t kScoreStride = kKeyBlock + kLaneCount;
constexpr float kHidden = -std::numeric_limits<float>::infinity();

int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

struct Arena {
  char* next;

  float* take(int64_t floats) {
    float* taken = reinterpret_cast<float*>(next);
    next += round_up(floats * 4, 64);
    return taken;
  }
};

struct Buffers {
  float *q, *keys, *values, *scores, *part, *total, *top, *sum;
};

Buffers buffers(const Attention& a, int64_t rows, void* memory, int64_t* bytes) {
  const int64_t size = round_up(a.size, kLaneCount), value_size = round_up(a.value_size, kLaneCount);
  Arena arena = {static_cast<char*>(memory)};
  Buffers b;
  b.q = arena.take(rows * size);
  b.keys = arena.take(kKeyBlock * size);
  b.values = arena.take(kKeyBlock * value_size);
  b.scores = arena.take(kScoreRows * kScoreStride);
  b.part = arena.take(kScoreRows * value_size);
  b.total = arena.take(rows * value_size);
  b.top = arena.take(rows);
  b.sum = arena.take(rows);
  if (bytes != nullptr) *bytes = arena.next - static_cast<char*>(memory);
  return b;
}

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

using LayOut = void (*)(const void* source, int64_t stride, int64_t count, int64_t size, float* target);
constexpr LayOut kPackKeys[] = {pack_keys<DType::f32>, pack_keys<DType::f16>, pack_keys<DType::bf16>};
constexpr LayOut kCopyRows[] = {copy_rows<DType::f32>, copy_rows<DType::f16>, copy_rows<DType::bf16>};

// Which part of a block one row sees, from its beginning.
struct View {
  int64_t first, end;
  const char* mask;
};

// Scores of one row in [begin, end), multiples of sixteen, become weights in place; `count` keys are in the block.
// Returns their sum, and in `top` the largest score.
template <MaskKind Kind>
MQ_TARGET float soften(const View& view, float scale, int64_t begin, int64_t end, int64_t count, float* scores,
                       float* top) {
  const Lanes factor = all(scale), hidden = all(kHidden);
  Lanes best = hidden;
  for (int64_t k = begin; k < end; k += kLaneCount) {
    Lanes s = load(scores + k);
    if constexpr (Kind == MaskKind::added) {
      s = fma(s, factor, load_first(reinterpret_cast<const float*>(view.mask) + k, count - k));
    } else {
      s = mul(s, factor);
    }
    if constexpr (Kind == MaskKind::visible) s = choose(nonzero_bytes(view.mask + k, count - k), s, hidden);
    if (view.end - k < kLaneCount) s = choose(first_lanes(view.end - k), s, hidden);
    if (view.first > k) s = choose(first_lanes(view.first - k), hidden, s);
    store(scores + k, s);
    best = maximum(best, s);
  }
  *top = largest(best);
  // nothing to be seen: weights of zero
  const Lanes base = all(*top == kHidden ? 0.0f : *top);
  Lanes sum = zeros();
  for (int64_t k = begin; k < end; k += kLaneCount) {
    const Lanes e = exponential(sub(load(scores + k), base));
    sum = add(sum, e);
    store(scores + k, e);
  }
  return total(sum);
}

MQ_TARGET MQ_INLINE float exponential_of(float x) {
  float e[kLaneCount];
  store(e, exponential(all(x)));
  return e[0];
}

// Adds the result of a further block to that of the blocks before it.
MQ_TARGET void fold(const float* part, float part_top, float part_sum, int64_t size, float* sums, float* top,
                    float* sum) {
  if (part_sum == 0) return;
  const bool is_first = *sum == 0;
  const float best = is_first || part_top > *top ? part_top : *top;
  const float shrink = is_first ? 0.0f : exponential_of(*top - best);
  const float grow = is_first ? 1.0f : exponential_of(part_top - best);
  for (int64_t d = 0; d < size; d += kLaneCount) {
    const Lanes more = mul(load(part + d), all(grow));
    store(sums + d, is_first ? more : fma(load(sums + d), all(shrink), more));
  }
  *sum = (is_first ? 0.0f : *sum * shrink) + part_sum * grow;
  *top = best;
}

MQ_TARGET void finish(const float* sums, float sum, int64_t size, float* out) {
  // zeros where nothing was to be seen, as torch gives; NaN stays
  const Lanes inverse = all(sum == 0 ? 0.0f : 1.0f / sum);
  for (int64_t d = 0; d < size; d += kLaneCount) {
    // the addition makes a negative zero a positive one: which it is depends on the keys that are not seen
    store_first(out + d, fma(load(sums + d), inverse, zeros()), size - d);
  }
}

// What the rows [first, end) of a span see: all of them between `begin` and `end`.
struct Range {
  int64_t begin, end;
};

Range seen(const Attention& a, int64_t first, int64_t end) {
  int64_t low = first % a.queries, high = (end - 1) % a.queries;
  if (first / a.queries != (end - 1) / a.queries) low = 0, high = a.queries - 1;
  return {a.first_key(low), a.end_key(high)};
}

// The last key that any of a few rows may see by its mask; what lies behind it need not be read.
int64_t last_visible(const Attention& a, const Span& span, int64_t begin, int64_t end) {
  int64_t last = begin;
  for (int64_t r = span.first; r < span.end && last < end; ++r) {
    const char* mask = a.mask_at(span.batch, span.head + r / a.queries, r % a.queries);
    int64_t k = end;
    for (uint64_t word = 0; k - last >= 8; k -= 8) {
      std::memcpy(&word, mask + k - 8, 8);
      if (word != 0) break;
    }
    while (k > last && mask[k - 1] == 0) --k;
    last = k;
  }
  return last;
}

// One block of keys and the rows of a span; buffers.q holds them.
struct Step {
  const Attention& a;
  const Span& span;
  const Buffers& b;
  // Of the block; positions below count from its beginning.
  int64_t start, begin, end;
  const float* values;
  int64_t value_stride;

  // Results of the rows [first, first + n), counted within the span: sums to `out`, then top and sum.
  void rows(int64_t first, int64_t n, float* out, int64_t out_stride, float* top, float* sum) const {
    const Range range = seen(a, span.first + first, span.first + first + n);
    const int64_t low = larger(begin, range.begin - start), high = smaller(end, range.end - start);
    if (low >= high) {
      for (int64_t t = 0; t < n; ++t) top[t] = kHidden, sum[t] = 0;
      return;
    }
    const int64_t size = round_up(a.size, kLaneCount), value_size = round_up(a.value_size, kLaneCount);
    const int64_t from = low / kLaneCount * kLaneCount, to = round_up(high, kLaneCount);
    for (int64_t p = from / kPanel * kPanel; p < to; p += kPanel) {
      product(smaller(kPanel, to - p) / kLaneCount, n, b.q + first * size, size, b.keys + p * size, kPanel, a.size,
              b.scores + p, kScoreStride);
    }
    for (int64_t t = 0; t < n; ++t) {
      sum[t] = weigh(span.first + first + t, from, to, b.scores + t * kScoreStride, top + t);
    }
    product(value_size / kLaneCount, n, b.scores + from, kScoreStride, values + from * value_stride, value_stride,
            high - from, out, out_stride);
  }

  float weigh(int64_t row, int64_t from, int64_t to, float* scores, float* top) const {
    const int64_t query = row % a.queries, element = a.mask_kind == MaskKind::added ? 4 : 1;
    View view = {a.first_key(query) - start, smaller(end, a.end_key(query) - start), nullptr};
    const float scale = static_cast<float>(a.scale);
    if (a.mask_kind != MaskKind::none) {
      view.mask = a.mask_at(span.batch, span.head + row / a.queries, query) + start * element;
    }
    if (a.mask_kind == MaskKind::added) return soften<MaskKind::added>(view, scale, from, to, end, scores, top);
    if (a.mask_kind == MaskKind::visible) return soften<MaskKind::visible>(view, scale, from, to, end, scores, top);
    return soften<MaskKind::none>(view, scale, from, to, end, scores, top);
  }
};

// Calls `each(step)` after the keys and values of a block are laid out, unless no row of the span sees any of them.
template <typename Each>
void with_block(const Attention& a, const Span& span, const Buffers& b, int64_t block, const Each& each) {
  const Range range = seen(a, span.first, span.end);
  const int64_t start = block * kKeyBlock, rows = span.end - span.first;
  const int64_t begin = larger(start, range.begin);
  int64_t end = smaller(start + kKeyBlock, smaller(a.keys, range.end));
  if (a.mask_kind == MaskKind::visible && rows <= kFewRows && begin < end) end = last_visible(a, span, begin, end);
  if (begin >= end) return;
  const int64_t head = span.head / (a.heads / a.key_heads), size = round_up(a.size, kLaneCount);
  const int64_t from = (begin - start) / kLaneCount * kLaneCount, count = end - start;
  for (int64_t p = from / kPanel * kPanel; p < count; p += kPanel) {
    const void* keys = a.k.at(span.batch, head, start + p, a.type());
    kPackKeys[a.dtype](keys, a.k.row, smaller(kPanel, count - p), a.size, b.keys + p * size);
  }
  const float* values = static_cast<const float*>(a.v.at(span.batch, head, start, a.type()));
  int64_t value_stride = a.v.row;
  if (rows > kFewRows || a.value_size % kLaneCount != 0 || a.type() != DType::f32) {
    value_stride = round_up(a.value_size, kLaneCount);
    kCopyRows[a.dtype](a.v.at(span.batch, head, start + from, a.type()), a.v.row, count - from, a.value_size,
                       b.values + from * value_stride);
    values = b.values;
  }
  each(Step{a, span, b, start, begin - start, count, values, value_stride});
}

void copy_queries(const Attention& a, const Span& span, const Buffers& b) {
  const int64_t size = round_up(a.size, kLaneCount);
  for (int64_t r = span.first; r < span.end; ++r) {
    const void* row = a.q.at(span.batch, span.head + r / a.queries, r % a.queries, a.type());
    kCopyRows[a.dtype](row, 0, 1, a.size, b.q + (r - span.first) * size);
  }
}

void finish_rows(const Attention& a, const Span& span, const Buffers& b) {
  const int64_t value_size = round_up(a.value_size, kLaneCount);
  for (int64_t r = span.first; r < span.end; ++r) {
    const int64_t i = r - span.first;
    float* out = a.out + span.batch * a.out_batch + (span.head + r / a.queries) * a.out_head +
                 r % a.queries * a.out_row;
    finish(b.total + i * value_size, b.sum[i], a.value_size, out);
  }
}

int64_t scratch(const Attention& a, int64_t rows) {
  int64_t bytes;
  buffers(a, rows, nullptr, &bytes);
  return bytes;
}

void clear(const Span& span, int64_t value_size, const Buffers& b) {
  std::memset(b.total, 0, (span.end - span.first) * value_size * 4);
  std::memset(b.sum, 0, (span.end - span.first) * 4);
}

void attend(const Attention& a, const Span& span, void* memory) {
  const int64_t rows = span.end - span.first, value_size = round_up(a.value_size, kLaneCount);
  const Buffers b = buffers(a, rows, memory, nullptr);
  copy_queries(a, span, b);
  clear(span, value_size, b);
  const int64_t groups = (rows + kScoreRows - 1) / kScoreRows;
  for (int64_t block = 0; block < a.blocks(); ++block) {
    with_block(a, span, b, block, [&](const Step& step) {
      for (int64_t i = 0; i < groups; ++i) {
        const int64_t first = rows * i / groups, n = rows * (i + 1) / groups - first;
        float top[kScoreRows], sum[kScoreRows];
        step.rows(first, n, b.part, value_size, top, sum);
        for (int64_t t = 0; t < n; ++t) {
          fold(b.part + t * value_size, top[t], sum[t], value_size, b.total + (first + t) * value_size,
               b.top + first + t, b.sum + first + t);
        }
      }
    });
  }
  finish_rows(a, span, b);
}

void attend_block(const Attention& a, const Span& span, int64_t block, const Parts& parts, void* memory) {
  const int64_t rows = span.end - span.first, value_size = round_up(a.value_size, kLaneCount);
  const Buffers b = buffers(a, rows, memory, nullptr);
  for (int64_t r = 0; r < rows; ++r) parts.at(block, r)[value_size + 1] = 0;
  copy_queries(a, span, b);
  with_block(a, span, b, block, [&](const Step& step) {
    float top[kScoreRows], sum[kScoreRows];
    step.rows(0, rows, parts.at(block, 0), parts.width, top, sum);
    for (int64_t r = 0; r < rows; ++r) {
      parts.at(block, r)[value_size] = top[r];
      parts.at(block, r)[value_size + 1] = sum[r];
    }
  });
}

void join(const Attention& a, const Span& span, const Parts& parts, void* memory) {
  const int64_t rows = span.end - span.first, value_size = round_up(a.value_size, kLaneCount);
  const Buffers b = buffers(a, rows, memory, nullptr);
  clear(span, value_size, b);
  for (int64_t block = 0; block < a.blocks(); ++block) {
    for (int64_t r = 0; r < rows; ++r) {
      const float* part = parts.at(block, r);
      fold(part, part[value_size], part[value_size + 1], value_size, b.total + r * value_size, b.top + r, b.sum + r);
    }
  }
  finish_rows(a, span, b);
}

}  // namespace
}  // namespace mq
