// Convolutions of images with channels last, together with what follows them: batch norm, residual and ReLU.
//
// A receptive field is one token, in the order kernel row, kernel column, channel; its values have one scale, or one for each
// group of them in that order.
#pragma once

#include "common.h"
#include "linear.h"

namespace mq {

// Batch norm over channels in evaluation, (y - mean) / sqrt(variance + epsilon) * weight + bias; `mean` is null where there
// is none, weight and bias where they are ones and zeros.
struct BatchNorm {
  const float* weight;
  const float* bias;
  const float* mean;
  const float* variance;
  double epsilon;
};

struct FusedConv {
  Isa isa;
  int qmax;
  // Consecutive values that share a scale, a multiple of 64; 0 for all of a receptive field.
  int64_t group;
  int threads;
  int64_t images, rows;
  Patches patches;
  // Pixels are `x_stride` floats apart, of which this convolution sees patches.channels.
  const float* x;
  int64_t x_stride;
  // [rows, depth], and the same as `pack` writes it, or null.
  const int8_t* weight;
  const int32_t* packed;
  const float* weight_scale;
  // May be null.
  const float* bias;
  BatchNorm norm;
  // Added to the result, or null; it lies as the output does.
  const float* residual;
  bool relu;
  float* out;
  int64_t out_stride;

  int64_t depth() const { return patches.kernel_h * patches.kernel_w * patches.channels; }
};

// False where there is no kernel for it, or no memory.
bool fused_conv(const FusedConv& conv);

// Sums of some tokens with some weight rows become outputs. Strides are in elements.
struct ConvTile {
  int64_t tokens, columns;
  // Rows of `stride` columns: integers, and the totals of groups, or null where a token has one scale.
  const int32_t* sums;
  const float* totals;
  int64_t stride;
  const Token* token;
  int64_t token_stride;
  const float* weight_scale;
  const float* bias;
  const float* residual;
  bool relu;
  float* out;
  int64_t out_stride;
};

// Float arithmetic of convolutions, over lanes.h: the same bits on every instruction set.
struct ConvKernels {
  // `n` floats become codes of `code_size` bytes, with zeros up to a multiple of four.
  Token (*quantize)(const float* x, int64_t n, int qmax, int code_size, bool corrected, void* codes);
  // out = relu(float(sums + correction) * (scale * weight_scale) + bias + residual), or of totals * weight_scale.
  void (*finish)(const ConvTile& tile);
};

extern const ConvKernels kConvAvx2, kConvAvx512;

}  // namespace mq
