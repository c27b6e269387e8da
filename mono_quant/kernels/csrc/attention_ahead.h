// Which keys some rows see, and fetching what is needed next while something else is computed.
#pragma once

#include "attention_tiles.h"

namespace mq {
namespace {

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

// Keys of one block that a span may see.
struct Keys {
  int64_t batch, head, begin, end;

  bool empty() const { return begin >= end; }
};

Keys keys_of(const Attention& a, const Span& span, int64_t block) {
  const Range range = seen(a, span.first, span.end);
  const int64_t start = block * kKeyBlock, begin = larger(start, range.begin);
  int64_t end = smaller(start + kKeyBlock, smaller(a.keys, range.end));
  if (a.mask_kind == MaskKind::visible && begin < end) end = end_of_visible(a, span, begin, end);
  return {span.batch, span.head / (a.heads / a.key_heads), begin, end};
}

// A compiler takes a function that does nothing but fetch for one that does nothing, unless told otherwise.
MQ_INLINE void fetch_line(const char* line) {
#ifdef MQ_X86
  asm volatile("prefetcht1 %0" : : "m"(*line));
#else
  __builtin_prefetch(line, 0, 2);
#endif
}

void fetch(const Rows& rows, DType dtype, int64_t batch, int64_t head, int64_t first, int64_t end, int64_t size) {
  for (int64_t i = first; i < end; ++i) {
    const char* row = static_cast<const char*>(rows.at(batch, head, i, dtype));
    for (int64_t d = 0; d < size * size_of(dtype); d += 64) fetch_line(row + d);
  }
}

// So far ahead are keys fetched for few rows: a whole block of them, and of values, would push out what is read before.
constexpr int64_t kKeysAhead = 64;

// Brings what is needed next while something else is computed.
struct Ahead {
  const Attention& a;
  // Of this block, and of the one that comes next.
  Keys now, later;
  // Queries that come next, and those whose results are written next; null where they are those of this block.
  const Span *queries, *results;

  // Part `i` of `n` of what comes after this block.
  void fetch_part(int64_t i, int64_t n) const {
    const int64_t count = later.end - later.begin;
    const int64_t first = later.begin + count * i / n, end = later.begin + count * (i + 1) / n;
    fetch_keys(later, first, end);
    fetch_values(later, first, end);
    fetch_rows(i, n);
  }

  // The same for few rows, which are computed sooner than anything can be there: values of this block while its scores are
  // made, and keys in the order in which they are read.
  void fetch_while_scoring(int64_t i, int64_t n) const {
    const int64_t first = now.begin + i * kLaneCount, ahead = first + kKeysAhead;
    fetch_values(now, first, smaller(first + kLaneCount, now.end));
    fetch_keys(now, ahead, smaller(ahead + kLaneCount, now.end));
    const int64_t beyond = larger(later.begin, later.begin + ahead - now.end);
    const int64_t end = later.begin + ahead + kLaneCount - now.end;
    fetch_keys(later, beyond, smaller(end, later.end));
    fetch_rows(i, n);
  }

  void fetch_keys(const Keys& of, int64_t first, int64_t end) const {
    fetch(a.k, a.type(), of.batch, of.head, first, end, a.size);
  }
  void fetch_values(const Keys& of, int64_t first, int64_t end) const {
    fetch(a.v, a.type(), of.batch, of.head, first, end, a.value_size);
  }

  void fetch_rows(int64_t i, int64_t n) const {
    if (queries != nullptr) {
      each_part(*queries, i, n, [&](int64_t head, int64_t query, int64_t rows) {
        fetch(a.q, a.type(), queries->batch, head, query, query + rows, a.size);
      });
    }
    if (results != nullptr) {
      each_part(*results, i, n, [&](int64_t head, int64_t query, int64_t rows) {
        // short rows that lie a page from each other, in an order that no processor foresees
        const float* out = a.out + results->batch * a.out_batch + head * a.out_head + query * a.out_row;
        for (int64_t r = 0; r < rows; ++r, out += a.out_row) {
          for (int64_t d = 0; d < a.value_size; d += 16) __builtin_prefetch(out + d, 1, 3);
        }
      });
    }
  }

  template <class Each>
  void each_part(const Span& span, int64_t i, int64_t n, const Each& each) const {
    const int64_t rows = span.end - span.first;
    each_head(a, span, rows * i / n, rows * (i + 1) / n,
              [&](int64_t, int64_t head, int64_t query, int64_t count) { each(head, query, count); });
  }
};

// What a thread reads after `now`, the keys of a block of a span, of which `later` is the block behind it and `next` the span to
// come, or null.
Ahead ahead_of(const Attention& a, const Span& span, const Keys& now, const Keys& later, const Span* next) {
  if (!later.empty()) return {a, now, later, nullptr, nullptr};
  if (next == nullptr) return {a, now, {}, nullptr, &span};
  Keys keys = keys_of(a, *next, seen(a, next->first, next->end).begin / kKeyBlock);
  // what several spans read is there already
  if (keys.batch == now.batch && keys.head == now.head) keys.end = keys.begin;
  return {a, now, keys, next, &span};
}

}  // namespace
}  // namespace mq
