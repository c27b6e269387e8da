// Orders in which tokens and weights meet; which one is fastest depends on how many there are of each.
#pragma once

#include "chunk.h"

namespace mq {

// Few tokens: dot products along the weight rows. More: panels of weights are interleaved, one at a time, and all
// tokens pass by each. Returns false when a thread found no memory.
bool multiply(const Chunk& chunk);

// Many tokens and few weights: all weights are interleaved first, then blocks of tokens are quantized and pass by.
bool suits_blocks(const Linear& layer, const ProductKernels& product);
bool multiply_blocks(const Chunk& whole);

}  // namespace mq
