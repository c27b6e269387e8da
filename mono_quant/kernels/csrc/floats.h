// Float arithmetic between products, one table per instruction set; all give the same bits.
#pragma once

#include "common.h"

namespace mq {

// The numbers are part of the C interface.
enum class NormKind : int64_t { none = 0, layer = 1, rms = 2 };
enum class Act : int64_t { none = 0, gelu = 1, gelu_tanh = 2, silu = 3, relu = 4 };

// A row becomes (x - mean) / sqrt(variance + eps) * weight + bias; for rms the mean counts as zero. Both may be null.
struct Norm {
  NormKind kind;
  const float* weight;
  const float* bias;
  double eps;
};

// Sums of some tokens with some weight rows on their way to outputs: act(sum * scales + bias) * factor + term. Strides are
// in elements; bias, factor and term may be null.
struct Finish {
  // int32 sums, or the fp32 totals of groups, which the token's scales are in already.
  const int32_t* sums;
  int64_t sums_stride;
  bool totals;
  int64_t tokens, columns;
  const Token* token;
  int64_t token_stride;
  const float* weight_scale;
  const float* bias;
  Act act;
  const float* factor;
  int64_t factor_stride;
  const float* term;
  int64_t term_stride;
  float* out;
  int64_t out_stride;
};

struct FloatKernels {
  void (*norm)(const Norm& norm, const float* x, int64_t n, float* out);
  void (*finish)(const Finish& finish);
  // out = a + b
  void (*add)(const float* a, const float* b, int64_t n, float* out);
  // The halves a, b of a row become a * cos - b * sin and b * cos + a * sin, with both halves of cos and sin.
  void (*rotate)(const float* x, const float* cos, const float* sin, int64_t dim, float* out);
};

extern const FloatKernels kFloatsPortable, kFloatsAvx2, kFloatsAvx512;

const FloatKernels& float_kernels(Isa isa);

// Norms of rows [rows, n]; with a residual, of its sum with x, which goes to `sum`.
void norm_rows(Isa isa, const Norm& norm, int64_t rows, int64_t n, const float* x, const float* residual, float* sum,
               float* out, int threads);

// x [batch, heads, tokens, dim] in strides to out [batch, tokens, heads, dim]; cos and sin [tokens, dim], `angle_stride`
// apart for each element of the batch.
void rotate(Isa isa, const int64_t shape[4], const int64_t strides[3], const float* x, const float* cos,
            const float* sin, int64_t angle_stride, float* out, int threads);

}  // namespace mq
