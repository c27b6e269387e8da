// Attention over sixteen lanes. The including file defines MQ_TARGET, one of the macros of lanes.h, and kTile.
//
// A score is one chain of fused multiply-adds over the head size; a sum of values is one over the keys of a block. So
// the shape of tiles, which differs between instruction sets, changes no bit.
#include "attention_ahead.h"
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

// One block of keys and the rows of a span; buffers.q holds them.
struct Step {
  const Attention& a;
  const Span& span;
  const Buffers& b;
  // Of the block; positions below count from its beginning.
  int64_t start, begin, end;
  // The first key of the block, where keys are not laid out.
  const void* keys;
  const float* values;
  int64_t value_stride;

  bool direct() const { return keys != nullptr; }

  // Results of the rows [first, first + n), counted within the span.
  void rows(int64_t first, int64_t n, const Results& out, const Ahead& ahead) const {
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
    for (int64_t p = from; direct() && p < to; p += kLaneCount) {
      kScoreKeys[a.dtype](n, b.q + first * size, size, static_cast<const char*>(keys) + p * a.k.row * size_of(a.type()),
                          a.k.row, end - p, a.size, b.scores + p, kScoreStride);
      ahead.fetch_while_scoring((p - from) / kLaneCount, (to - from) / kLaneCount);
    }
    for (int64_t p = from / kPanel * kPanel; !direct() && p < to; p += kPanel) {
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
Step step_of(const Attention& a, const Span& span, const Buffers& b, int64_t block, const Keys& keys) {
  const int64_t start = block * kKeyBlock;
  if (keys.empty()) return {a, span, b, start, 0, 0, nullptr, nullptr, 0};
  const int64_t size = round_up(a.size, kLaneCount);
  const int64_t from = (keys.begin - start) / kLaneCount * kLaneCount, count = keys.end - start;
  const bool direct = span.end - span.first <= kDirectRows;
  for (int64_t p = from / kPanel * kPanel; !direct && p < count; p += kPanel) {
    kPackKeys[a.dtype](a.k.at(span.batch, keys.head, start + p, a.type()), a.k.row, smaller(kPanel, count - p), a.size,
                       b.keys + p * size);
  }
  const float* values = static_cast<const float*>(a.v.at(span.batch, keys.head, start, a.type()));
  int64_t value_stride = a.v.row;
  if (span.end - span.first > kFewRows || a.value_size % kLaneCount != 0 || a.type() != DType::f32) {
    value_stride = round_up(a.value_size, kLaneCount);
    kCopyRows[a.dtype](a.v.at(span.batch, keys.head, start + from, a.type()), a.v.row, count - from, a.value_size,
                       b.values + from * value_stride);
    values = b.values;
  }
  const void* place = direct ? a.k.at(span.batch, keys.head, start, a.type()) : nullptr;
  return {a, span, b, start, keys.begin - start, count, place, values, value_stride};
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

void attend(const Attention& a, const Span& span, const Span* next, void* memory) {
  const int64_t rows = span.end - span.first, value_size = round_up(a.value_size, kLaneCount);
  const Buffers b = buffers(a, rows, memory, nullptr);
  copy_queries(a, span, b);
  // the result of a single block is that of all
  const bool is_single = a.blocks() == 1;
  const Results total = is_single ? Results{} : begin_total(span, value_size, b);
  const int64_t groups = (rows + kScoreRows - 1) / kScoreRows;
  Keys later = keys_of(a, span, 0);
  for (int64_t block = 0; block < a.blocks(); ++block) {
    const Keys keys = later;
    later = block + 1 < a.blocks() ? keys_of(a, span, block + 1) : Keys{};
    if (keys.empty() && !is_single) continue;
    const Ahead ahead = ahead_of(a, span, keys, later, next);
    const Step step = step_of(a, span, b, block, keys);
    for (int64_t i = 0; i < groups; ++i) {
      const int64_t first = rows * i / groups, n = rows * (i + 1) / groups - first;
      float top[kScoreRows], sum[kScoreRows];
      const Results part = {b.part, value_size, top, sum};
      if (!step.direct()) ahead.fetch_part(i, groups);
      step.rows(first, n, part, ahead);
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
  const Keys keys = keys_of(a, span, block);
  const Step step = step_of(a, span, b, block, keys);
  // the block that comes next is another thread's
  const Ahead ahead = {a, keys, {}, nullptr, nullptr};
  for (int64_t first = 0; first < rows; first += kScoreRows) {
    step.rows(first, smaller(kScoreRows, rows - first), parts.at(block).from(first), ahead);
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
