#include "recurrent.h"

#include <algorithm>

#include "fused_conv.h"

namespace mq {
namespace {

// Values that gates make below which another thread costs more than it brings.
constexpr int64_t kThreadWork = 1 << 12;
// Tokens from which on it pays to interleave for tiles (measured).
constexpr int64_t kPackTokens = 16;

// Sequences from which on tiles are faster than dot products (measured).
int64_t tiled_from(const ProductKernels& product) { return product.code_size == 1 ? 3 : 6; }

const GateKernels& gate_kernels(Isa isa) {
#ifdef MQ_X86
  if (isa == Isa::avx512 || isa == Isa::avx512vnni) return kGatesAvx512;
  if (isa != Isa::portable) return kGatesAvx2;
#endif
  (void)isa;
  return kGatesPortable;
}

auto advance_of(Cell cell, const GateKernels& kernels) {
  switch (cell) {
    case Cell::lstm:
      return kernels.lstm;
    case Cell::gru:
      return kernels.gru;
    case Cell::tanh:
      return kernels.tanh;
    default:
      return kernels.relu;
  }
}

// Several sequences pass by panels of weights, which are interleaved once for all steps; null with a single one, which is fastest
// by dot products, or where there are no panels or no memory.
const int32_t* panels_for(const Sequence& sequence, const Linear& product) {
  static thread_local Scratch scratch;
  const ProductKernels& kernels = *product_kernels(product.isa, false, product.qmax);
  if (kernels.panel_rows == 0 || sequence.sizes[0] < tiled_from(kernels)) return nullptr;
  if (product.packed != nullptr || sequence.steps * sequence.sizes[0] < kPackTokens) return product.packed;
  int32_t* words = static_cast<int32_t*>(scratch.reserve(4 * packed_words(kernels, product.rows, product.depth)));
  if (words != nullptr) pack(kernels, product.weight, product.rows, product.depth, product.threads, words);
  return words;
}

bool multiply(const Linear& product, const int32_t* panels) {
  const ProductKernels& kernels = *product_kernels(product.isa, false, product.qmax);
  if (panels == nullptr || product.tokens < tiled_from(kernels)) return linear(product);
  FusedConv conv = {};
  conv.isa = product.isa, conv.qmax = product.qmax, conv.group = product.group, conv.threads = product.threads;
  conv.images = 1, conv.rows = product.rows;
  // each sequence is a pixel
  conv.patches = {1, product.tokens, product.depth, 1, 1, 1, 1, 0, 0, 1, 1, 1, product.tokens};
  conv.x = static_cast<const float*>(product.x.data), conv.x_stride = product.depth;
  conv.weight = product.weight, conv.packed = panels;
  conv.weight_scale = product.weight_scale, conv.bias = static_cast<const float*>(product.bias);
  conv.out = static_cast<float*>(product.out), conv.out_stride = product.out_stride;
  return fused_conv(conv) || linear(product);
}

}  // namespace

bool run_sequence(const Sequence& sequence) {
  static thread_local Scratch scratch;
  const int64_t size = sequence.product.depth, width = gates_of(sequence.cell) * size;
  const int64_t most = sequence.sizes[0];
  Linear product = sequence.product;
  product.rows = width;
  float* recurrent = static_cast<float*>(scratch.reserve(most * width * sizeof(float)));
  if (recurrent == nullptr) return false;
  const int32_t* panels = panels_for(sequence, product);
  const auto advance = advance_of(sequence.cell, gate_kernels(sequence.product.isa));
  product.x = {sequence.state, DType::f32, size};
  product.out = recurrent, product.out_stride = width;
  int64_t place = 0;
  for (int64_t t = 0; sequence.backward && t < sequence.steps; ++t) place += sequence.sizes[t];
  for (int64_t i = 0; i < sequence.steps; ++i) {
    product.tokens = sequence.sizes[sequence.backward ? sequence.steps - 1 - i : i];
    if (sequence.backward) place -= product.tokens;
    if (!multiply(product, panels)) return false;
    const int threads = static_cast<int>(std::min<int64_t>(product.threads, product.tokens * size / kThreadWork));
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int64_t n = 0; n < product.tokens; ++n) {
      advance({size, sequence.given + (place + n) * width, recurrent + n * width, sequence.state + n * size,
               sequence.cells + n * size, sequence.out + (place + n) * sequence.out_stride});
    }
    if (!sequence.backward) place += product.tokens;
  }
  return true;
}

}  // namespace mq
