// Attention: softmax(scale * q k^T + mask) v, in float32.
#pragma once

#include "common.h"

namespace mq {

// Keys are taken in blocks that begin at multiples of this. Each block has a softmax of its own, and the blocks are
// joined in order: a query's result depends neither on other queries nor on keys that it does not see. So this number
// is part of what the arithmetic is defined to be.
constexpr int64_t kKeyBlock = 256;

enum class MaskKind : int64_t { none = 0, added = 1, visible = 2 };

// Where the rows of [batch, heads, length, size] lie; the last stride is 1.
struct Rows {
  const void* data;
  int64_t batch, head, row, element;

  const void* at(int64_t b, int64_t h, int64_t i, DType dtype) const {
    return static_cast<const char*>(data) + (b * batch + h * head + i * row) * size_of(dtype);
  }
};

// Read from memory that the caller filled: eight-byte fields alone. Strides are in elements.
struct Attention {
  int64_t isa, threads;
  // Of queries, keys and values.
  int64_t dtype;
  int64_t batch, heads, key_heads, queries, keys, size, value_size;
  Rows q, k, v;
  // Added to the scores (float), or what may be seen (bytes that are not zero).
  MaskKind mask_kind;
  const void* mask;
  int64_t mask_batch, mask_head, mask_row, mask_element;
  // Queries are the last of the keys' positions when causal: one sees no key behind its own position, and of those
  // before it the last `window`, its own included; 0 sets no limit.
  int64_t causal, window;
  double scale;
  float* out;
  int64_t out_batch, out_head, out_row, out_element;

  DType type() const { return static_cast<DType>(dtype); }
  int64_t mask_bytes() const { return mask_kind == MaskKind::added ? 4 : 1; }
  const char* mask_at(int64_t b, int64_t h, int64_t i) const {
    return static_cast<const char*>(mask) + (b * mask_batch + h * mask_head + i * mask_row) * mask_bytes();
  }
  // The keys that a query may see: [first_key, end_key), empty where the second is not larger.
  int64_t first_key(int64_t query) const {
    const int64_t first = query + keys - queries + 1 - window;
    return window > 0 && first > 0 ? first : 0;
  }
  int64_t end_key(int64_t query) const {
    const int64_t end = query + keys - queries + 1;
    return !causal || end > keys ? keys : end < 0 ? 0 : end;
  }
  int64_t blocks() const { return (keys + kKeyBlock - 1) / kKeyBlock; }
};

// Some rows that have the keys of one head in common: row r is query r % queries of head `head` + r / queries.
struct Span {
  int64_t batch, head, first, end;
};

// What rows have of some keys: sums of values `stride` floats apart, the largest score and the sum of the weights.
struct Results {
  float* sums;
  int64_t stride;
  float *top, *sum;

  Results from(int64_t row) const { return {sums + row * stride, stride, top + row, sum + row}; }
};

// Results of one block of keys each, for up to so many rows.
struct Parts {
  float* data;
  int64_t rows, stride;

  int64_t floats() const { return round_up(rows * (stride + 2), 16); }
  Results at(int64_t block) const {
    float* sums = data + block * floats();
    return {sums, stride, sums + rows * stride, sums + rows * (stride + 1)};
  }
};

struct AttentionKernels {
  // Bytes of scratch that `attend` needs for spans of at most `rows` rows.
  int64_t (*scratch)(const Attention& a, int64_t rows);
  // `next` is what comes next in the same thread, or null.
  void (*attend)(const Attention& a, const Span& span, const Span* next, void* memory);
  // The same in two steps: one block of keys, then all blocks joined.
  void (*attend_block)(const Attention& a, const Span& span, int64_t block, const Parts& parts, void* memory);
  void (*join)(const Attention& a, const Span& span, const Parts& parts, void* memory);
};

extern const AttentionKernels kAttentionPortable, kAttentionAvx2, kAttentionAvx512;

// Returns false when memory for scratch is not to be had.
bool attention(const Attention& a);

}  // namespace mq
