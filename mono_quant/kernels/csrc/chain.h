// Products with what lies around them, in one pass over the tokens: norm, quantize, product, activation or gate, quantize,
// product, residual, norm. What lies between two products never leaves the caches.
#pragma once

#include "floats.h"

namespace mq {

// Some rows of a weight [rows, depth], and their outputs' place beside those of the parts before it.
struct Part {
  const int8_t* weight;
  // The same codes as `pack` writes them, or null.
  const int32_t* packed;
  const float* weight_scale;
  // May be null.
  const float* bias;
  int64_t rows;
};

// Several weights that see the same tokens are one product. Without parts there is none.
struct Product {
  int64_t depth, rows;
  // How its tokens become codes: the largest code, and the values that share a scale (0: all of a token).
  int64_t qmax, group;
  int64_t parts;
};

// All are rows next to each other; residual may be null. `gate` has parts of the same sizes as `first`.
struct Chain {
  int64_t isa, threads, tokens;
  const float* x;
  const float* residual;
  float* out;
  Norm pre, post;
  Act act;
  Product first, gate, second;
  // Those of first, gate and second, one after another.
  const Part* parts;
};

// Returns false when memory for scratch is not to be had. Each token's output depends on that token alone, and is the same on
// every path and for any number of threads.
bool chain(const Chain& chain);

}  // namespace mq
