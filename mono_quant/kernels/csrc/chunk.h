// Some tokens of a linear layer as codes, on their way through a product.
#pragma once

#include "linear.h"

namespace mq {

struct Chunk {
  const Linear& layer;
  const RowKernels& row_kernels;
  const ProductKernels& product;
  const float* bias;
  int64_t first, tokens;
  // Codes [tokens, padded] of product.code_size bytes.
  char* codes;
  // [tokens, groups]
  Token* token;
  int64_t groups;
  int64_t padded;

  int64_t code_bytes() const { return padded * product.code_size; }
  char* code_row(int64_t t) const { return codes + t * code_bytes(); }
  Token* tokens_of(int64_t t) const { return token + t * groups; }
};

// Writes the codes of token `t`; false when there is no memory for its receptive field.
bool quantize(const Chunk& chunk, int64_t t);

// Sums [tokens, columns], `stride` apart, of the tokens from `t` and the weight rows from `n` on become outputs; fp32
// totals where the tokens have groups.
void finish(const Chunk& chunk, int64_t t, int64_t tokens, int64_t n, int64_t columns, const int32_t* sums,
            int64_t stride);

}  // namespace mq
