// Orders in which tokens and weights meet; which one is fastest depends on how many there are of each.
#pragma once

#include "chunk.h"

namespace mq {

// Weight rows per task of the dot products.
constexpr int64_t kDotRows = 32;
// Weights of one panel interleaved at once, per row: the panel stays in the second-level cache.
constexpr int64_t kBlockDepth = 2048;
// Tokens that are quantized, and then multiplied while they are in the second-level cache.
constexpr int64_t kBlockTokens = 64;
constexpr int64_t kMaxPanel = 64;
constexpr int64_t kMaxTile = 8;
// Multiply-adds below which another thread costs more than it brings.
constexpr int64_t kThreadWork = 1 << 17;

// Weights that come from memory even where a layer is called again and again.
inline bool is_far(int64_t rows, int64_t row_bytes) { return rows * row_bytes > 2 << 20; }

// How many panels `rows` weight rows fill, and the words of one.
inline int64_t panels_of(int64_t rows, const ProductKernels& product) {
  return (rows + product.panel_rows - 1) / product.panel_rows;
}
inline int64_t words_of(int64_t depth, const ProductKernels& product) { return (depth * product.code_size + 3) / 4; }
inline int64_t panel_words(int64_t depth, const ProductKernels& product) {
  return words_of(round_up(depth, kDepthAlign), product) * product.panel_rows;
}

// Up to how many tokens dot products along the weight rows are faster than panels; `group` is 0 without groups.
int64_t dot_limit(const ProductKernels& product, int64_t rows, int64_t depth, int64_t row_bytes, int64_t group,
                  bool packed);

// Few tokens: dot products along the weight rows. More: panels of weights are interleaved, one at a time, and all
// tokens pass by each. Returns false when a thread found no memory.
bool multiply(const Chunk& chunk);

// Many tokens and few weights: all weights are interleaved first, then blocks of tokens are quantized and pass by.
bool suits_blocks(const Linear& layer, const ProductKernels& product);
bool multiply_blocks(const Chunk& whole);

}  // namespace mq
