// Orders in which tokens and weights meet; which one is fastest depends on how many there are of each.
#pragma once

#include "chunk.h"

namespace mq {

// How many panels `rows` weight rows fill, and the words of one.
inline int64_t panels_of(int64_t rows, const ProductKernels& product) {
  return (rows + product.panel_rows - 1) / product.panel_rows;
}
inline int64_t words_of(int64_t depth, const ProductKernels& product) { return (depth * product.code_size + 3) / 4; }
inline int64_t panel_words(int64_t depth, const ProductKernels& product) {
  return words_of(round_up(depth, kDepthAlign), product) * product.panel_rows;
}

// Few tokens: dot products along the weight rows. More: panels of weights are interleaved, one at a time, and all
// tokens pass by each. Returns false when a thread found no memory.
bool multiply(const Chunk& chunk);

// Many tokens and few weights: all weights are interleaved first, then blocks of tokens are quantized and pass by.
bool suits_blocks(const Linear& layer, const ProductKernels& product);
bool multiply_blocks(const Chunk& whole);

}  // namespace mq
