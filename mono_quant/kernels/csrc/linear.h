// Linear layers and convolutions: quantize tokens, multiply, rescale.
#pragma once

#include "common.h"

namespace mq {

// A convolution's input [images, height, width, channels]; a token is the receptive field of one output position,
// in the order kernel row, kernel column, channel.
struct Patches {
  int64_t height, width, channels;
  int64_t kernel_h, kernel_w, stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w;
  int64_t out_h, out_w;
};

// y = x W^T + bias for `tokens` tokens: rows of `x`, or receptive fields in it.
struct Linear {
  Isa isa;
  // Weights are int8, or float16 with float activations.
  bool half;
  int qmax;
  int threads;
  int64_t tokens, rows, depth;
  Matrix x;
  // Null for plain rows.
  const Patches* patches;
  const int8_t* weight;
  // In bytes.
  int64_t weight_stride;
  const float* weight_scale;
  const void* bias;
  DType bias_dtype;
  void* out;
  int64_t out_stride;
};

// Returns false when memory for scratch is not to be had.
bool linear(const Linear& layer);

}  // namespace mq
