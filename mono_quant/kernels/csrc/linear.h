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
  // Values of a token that share a scale, a multiple of kDepthAlign and less than `depth`; 0 for all of them.
  int64_t group;
  int threads;
  int64_t tokens, rows, depth;
  Matrix x;
  // Null for plain rows.
  const Patches* patches;
  const int8_t* weight;
  // In bytes.
  int64_t weight_stride;
  // The weights as `pack` writes them, or null.
  const int32_t* packed;
  const float* weight_scale;
  const void* bias;
  DType bias_dtype;
  void* out;
  int64_t out_stride;
};

// How many tokens of `Token` a row leaves.
inline int64_t groups_of(const Linear& layer) {
  return layer.group == 0 ? 1 : (layer.depth + layer.group - 1) / layer.group;
}

// The kernels that a layer with codes up to `qmax` takes, or null.
const ProductKernels* product_kernels(Isa isa, bool half, int qmax);
const RowKernels& row_kernels(Isa isa, bool half);

// Words of `rows` weight rows interleaved once, panel after panel; 0 where weights are read as they are.
int64_t packed_words(const ProductKernels& product, int64_t rows, int64_t depth);
void pack(const ProductKernels& product, const int8_t* weight, int64_t rows, int64_t depth, int threads, int32_t* words);

// Returns false when memory for scratch is not to be had.
bool linear(const Linear& layer);

}  // namespace mq
