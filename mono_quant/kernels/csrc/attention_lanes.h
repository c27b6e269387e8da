// Attention over sixteen lanes. The including file defines MQ_TARGET, one of the macros of lanes.h, and kTile.
//
// A score is one chain of fused multiply-adds over the head size; a sum of values is one over the keys of a block. So
// the shape of tiles, which differs between instruction sets, changes no bit.
#include "attention_weights.h"

namespace mq {
namespace {

// Rows whose scores are held at once, and rows that share a packed block of keys.
constexpr int64_t kScoreRows = 24;
// Up to so many rows packing values costs more than reading them where they are.
constexpr int64_t kFewRows = 12;
constexpr int64_t kScoreStride = kKeyBlock + kLaneCount;

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

// What the rows [first, end) of a span see: all of them between `begin` and `end`.
struct Range {
  int64_t begin, end;
};

Range seen(const Attention& a, int64_t first, int64_t end) {
  if (a.causal == 0 && a.window == 0) return {0, a.keys};
  int64_t low = first % a.queries, high = (end - 1) % a.queries;
  if (first / a.queries != (end - 1) / a.queries) low = 0, high = a.queries - 1;
  return {a.first_key(low), a.end_key(high)};
}

// The end of the keys that some rows may see by their masks of bytes; what lies behind it need not be read.
int64_t end_of_visible(const Attention& a, const Span& span, int64_t begin, int64_t end) {
  int64_t last = begin;
  // the last rows first: where queries see no key behind their own, others are done at once
  for (int64_t r = span.end; r > span.first && last < end; --r) {
    const char* mask = a.mask_at(span.batch, span.head + (r - 1) / a.queries, (r - 1) % a.queries);
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

// Calls `each(row, head, query, count)` for the stretches of rows [first, end) of a span that are queries of one head;
// rows are counted within the span.
template <class Each>
void each_head(const Attention& a, const Span& span, int64_t first, int64_t end, const Each& each) {
  for (int64_t r = first, count; r < end; r += count) {
    const int64_t row = span.first + r, head = row < a.queries ? 0 : row / a.queries, query = row - head * a.queries;
    count = smaller(end - r, a.queries - query);
    each(r, span.head + head, query, count);
  }
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

  // Results of the rows [first, first + n), counted within the span.
  void rows(int64_t first, int64_t n, const Results& out) const {
    const Span part = {span.batch, span.head, span.first + first, span.first + first + n};
    const Range range = seen(a, part.first, part.end);
    const int64_t low = larger(begin, range.begin - start);
    int64_t high = smaller(end, range.end - start);
    if (a.mask_kind == MaskKind::visible && low < high) {
      high = end_of_visible(a, part, start + low, start + high) - start;
    }
    if (low >= high) {
      for (int64_t t = 0; t < n; ++t) out.top[t] = kHidden, out.sum[t] = 0;
      return;
    }
    const int64_t size = round_up(a.size, kLaneCount), value_size = round_up(a.value_size, kLaneCount);
    const int64_t from = low / kLaneCount * kLaneCount, to = round_up(high, kLaneCount);
    for (int64_t p = from / kPanel * kPanel; p < to; p += kPanel) {
      product(smaller(kPanel, to - p) / kLaneCount, n, b.q + first * size, size, b.keys + p * size, kPanel, a.size,
              b.scores + p, kScoreStride);
    }
    weigh(first, n, {b.scores, kScoreStride, from, to, a.keys - start}, high, out);
    product(value_size / kLaneCount, n, b.scores + from, kScoreStride, values + from * value_stride, value_stride,
            high - from, out.sums, out.stride);
  }

  void weigh(int64_t first, int64_t n, const Scores& scores, int64_t high, const Results& out) const {
    View views[kScoreRows];
    each_head(a, span, first, first + n, [&](int64_t row, int64_t head, int64_t query, int64_t count) {
      const char* mask = nullptr;
      if (a.mask_kind != MaskKind::none) mask = a.mask_at(span.batch, head, query) + start * a.mask_bytes();
      for (int64_t i = 0; i < count; ++i) {
        const int64_t low = smaller(larger(a.first_key(query + i) - start, scores.begin), high);
        views[row - first + i] = {low, larger(low, smaller(high, a.end_key(query + i) - start)), mask};
        if (mask != nullptr) mask += a.mask_row * a.mask_bytes();
      }
    });
    const auto soften_as = a.mask_kind == MaskKind::none    ? soften<MaskKind::none>
                           : a.mask_kind == MaskKind::added ? soften<MaskKind::added>
                                                            : soften<MaskKind::visible>;
    soften_as(scores, views, n, static_cast<float>(a.scale), out.top, out.sum);
  }
};

// Lays out what the rows of a span see of a block; of keys that none of them sees nothing is read.
Step step_of(const Attention& a, const Span& span, const Buffers& b, int64_t block) {
  const Range range = seen(a, span.first, span.end);
  const int64_t start = block * kKeyBlock;
  const int64_t begin = larger(start, range.begin);
  int64_t end = smaller(start + kKeyBlock, smaller(a.keys, range.end));
  if (a.mask_kind == MaskKind::visible && begin < end) end = end_of_visible(a, span, begin, end);
  if (begin >= end) return {a, span, b, start, 0, 0, nullptr, 0};
  const int64_t head = span.head / (a.heads / a.key_heads), size = round_up(a.size, kLaneCount);
  const int64_t from = (begin - start) / kLaneCount * kLaneCount, count = end - start;
  for (int64_t p = from / kPanel * kPanel; p < count; p += kPanel) {
    const void* keys = a.k.at(span.batch, head, start + p, a.type());
    kPackKeys[a.dtype](keys, a.k.row, smaller(kPanel, count - p), a.size, b.keys + p * size);
  }
  const float* values = static_cast<const float*>(a.v.at(span.batch, head, start, a.type()));
  int64_t value_stride = a.v.row;
  if (span.end - span.first > kFewRows || a.value_size % kLaneCount != 0 || a.type() != DType::f32) {
    value_stride = round_up(a.value_size, kLaneCount);
    kCopyRows[a.dtype](a.v.at(span.batch, head, start + from, a.type()), a.v.row, count - from, a.value_size,
                       b.values + from * value_stride);
    values = b.values;
  }
  return {a, span, b, start, begin - start, count, values, value_stride};
}

void copy_queries(const Attention& a, const Span& span, const Buffers& b) {
  const int64_t size = round_up(a.size, kLaneCount);
  each_head(a, span, 0, span.end - span.first, [&](int64_t row, int64_t head, int64_t query, int64_t count) {
    kCopyRows[a.dtype](a.q.at(span.batch, head, query, a.type()), a.q.row, count, a.size, b.q + row * size);
  });
}

// Results of the rows [first, first + n), counted within the span, go where the caller wants them.
void finish_rows(const Attention& a, const Span& span, int64_t first, int64_t n, const Results& of) {
  each_head(a, span, first, first + n, [&](int64_t row, int64_t head, int64_t query, int64_t count) {
    float* out = a.out + span.batch * a.out_batch + head * a.out_head + query * a.out_row;
    finish(of.from(row - first), count, a.value_size, out, a.out_row);
  });
}

int64_t scratch(const Attention& a, int64_t rows) {
  int64_t bytes;
  buffers(a, rows, nullptr, &bytes);
  return bytes;
}

// What the rows of a span have of no block yet.
Results begin_total(const Span& span, int64_t value_size, const Buffers& b) {
  std::memset(b.total, 0, (span.end - span.first) * value_size * 4);
  std::memset(b.sum, 0, (span.end - span.first) * 4);
  return {b.total, value_size, b.top, b.sum};
}

// Inlined, as a function that does nothing but this is taken for one that does nothing.
MQ_INLINE void fetch(const Rows& rows, DType dtype, int64_t batch, int64_t head, int64_t first, int64_t end,
                     int64_t size) {
  for (int64_t i = first; i < end; ++i) {
    const char* row = static_cast<const char*>(rows.at(batch, head, i, dtype));
    for (int64_t d = 0; d < size * size_of(dtype); d += 64) __builtin_prefetch(row + d, 0, 2);
  }
}

// Fetches a share of what the next span reads while the rows [first, first + n) of this one are computed, and where
// their results go: short rows that lie a page from each other, in an order that no processor foresees.
MQ_INLINE void fetch_ahead(const Attention& a, const Span& span, const Span& next, int64_t first, int64_t n) {
  const int64_t rows = span.end - span.first, sharing = a.heads / a.key_heads, key_head = next.head / sharing;
  const int64_t query = next.first + first;
  fetch(a.q, a.type(), next.batch, next.head, query, smaller(query + n, next.end), a.size);
  if (next.batch != span.batch || key_head != span.head / sharing) {
    const int64_t key = a.keys * first / rows, end = a.keys * (first + n) / rows;
    fetch(a.k, a.type(), next.batch, key_head, key, end, a.size);
    fetch(a.v, a.type(), next.batch, key_head, key, end, a.value_size);
  }
  const float* out = a.out + span.batch * a.out_batch + span.head * a.out_head + (span.first + first) * a.out_row;
  for (int64_t i = 0; i < n; ++i, out += a.out_row) {
    for (int64_t d = 0; d < a.value_size; d += 16) __builtin_prefetch(out + d, 1, 3);
  }
}

void attend(const Attention& a, const Span& span, const Span* next, void* memory) {
  const int64_t rows = span.end - span.first, value_size = round_up(a.value_size, kLaneCount);
  const Buffers b = buffers(a, rows, memory, nullptr);
  copy_queries(a, span, b);
  // the result of a single block is that of all
  const bool is_single = a.blocks() == 1;
  const Results total = is_single ? Results{} : begin_total(span, value_size, b);
  const int64_t groups = (rows + kScoreRows - 1) / kScoreRows;
  for (int64_t block = 0; block < a.blocks(); ++block) {
    const Step step = step_of(a, span, b, block);
    for (int64_t i = 0; i < groups; ++i) {
      const int64_t first = rows * i / groups, n = rows * (i + 1) / groups - first;
      float top[kScoreRows], sum[kScoreRows];
      const Results part = {b.part, value_size, top, sum};
      if (is_single && next != nullptr) fetch_ahead(a, span, *next, first, n);
      step.rows(first, n, part);
      if (is_single) {
        finish_rows(a, span, first, n, part);
      } else {
        fold(part, n, value_size, total.from(first));
      }
    }
  }
  if (!is_single) finish_rows(a, span, 0, rows, total);
}

void attend_block(const Attention& a, const Span& span, int64_t block, const Parts& parts, void* memory) {
  const int64_t rows = span.end - span.first;
  const Buffers b = buffers(a, rows, memory, nullptr);
  copy_queries(a, span, b);
  const Step step = step_of(a, span, b, block);
  for (int64_t first = 0; first < rows; first += kScoreRows) {
    step.rows(first, smaller(kScoreRows, rows - first), parts.at(block).from(first));
  }
}

void join(const Attention& a, const Span& span, const Parts& parts, void* memory) {
  const int64_t rows = span.end - span.first, value_size = round_up(a.value_size, kLaneCount);
  const Buffers b = buffers(a, rows, memory, nullptr);
  const Results total = begin_total(span, value_size, b);
  for (int64_t block = 0; block < a.blocks(); ++block) fold(parts.at(block), rows, value_size, total);
  finish_rows(a, span, 0, rows, total);
}

}  // namespace
}  // namespace mq
