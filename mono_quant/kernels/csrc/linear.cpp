#include "linear.h"

#include <algorithm>

#include "multiply.h"

namespace mq {
namespace {

// Codes of the tokens held at once: a few megabytes stay in the last-level cache while all weights pass by.
constexpr int64_t kChunkBytes = 4 << 20;
// A chunk is not cut smaller than this.
constexpr int64_t kFewestTokens = 8;
// Values quantized below which another thread costs more than it brings.
constexpr int64_t kQuantizeWork = 1 << 14;

bool quantize_all(const Chunk& chunk) {
  const int64_t work = chunk.tokens * chunk.layer.depth / kQuantizeWork;
  const int64_t threads = std::min<int64_t>({chunk.layer.threads, chunk.tokens, work});
  bool ok = true;
  if (threads <= 1) {
    for (int64_t t = 0; t < chunk.tokens; ++t) ok = quantize(chunk, t) && ok;
    return ok;
  }
#pragma omp parallel for num_threads(static_cast<int>(threads)) schedule(static) reduction(&& : ok)
  for (int64_t t = 0; t < chunk.tokens; ++t) ok = quantize(chunk, t) && ok;
  return ok;
}

}  // namespace

const ProductKernels* product_kernels(Isa isa, bool half, int qmax) {
#ifdef MQ_X86
  switch (isa) {
    case Isa::avx512vnni:
      if (half) return &kProductHalfAvx512;
      return qmax <= 127 ? &kProductVnniBytes : &kProductVnniWide;
    case Isa::avx512:
      return half ? &kProductHalfAvx512 : &kProductAvx512;
    case Isa::avx512vl_vnni:
      return half ? &kProductHalfAvx2 : qmax <= 127 ? &kProductAvx512VlVnni : &kProductAvx2;
#ifdef MQ_HAS_AVXVNNI
    case Isa::avxvnni:
      return half ? &kProductHalfAvx2 : qmax <= 127 ? &kProductAvxVnni : &kProductAvx2;
#endif
    case Isa::avx2:
      return half ? &kProductHalfAvx2 : &kProductAvx2;
    default:
      break;
  }
#endif
  (void)isa, (void)qmax;
  return half ? nullptr : &kProductPortable;
}

const RowKernels& row_kernels(Isa isa, bool half) {
#ifdef MQ_X86
  if (half) return kRowsFloat;
  if (isa != Isa::portable) return kRowsAvx2;
#endif
  (void)isa, (void)half;
  return kRowsPortable;
}

int64_t packed_words(const ProductKernels& product, int64_t rows, int64_t depth) {
  return product.panel_rows == 0 ? 0 : panel_words(depth, product) * panels_of(rows, product);
}

void pack(const ProductKernels& product, const int8_t* weight, int64_t rows, int64_t depth, int threads,
          int32_t* words) {
  const int64_t panels = panels_of(rows, product), step = panel_words(depth, product);
#pragma omp parallel for num_threads(threads) if (threads > 1 && rows * depth >= kQuantizeWork) schedule(static)
  for (int64_t p = 0; p < panels; ++p) {
    const int64_t n = p * product.panel_rows;
    const int here = static_cast<int>(std::min<int64_t>(product.panel_rows, rows - n));
    product.interleave(weight + n * depth * product.weight_size, depth * product.weight_size, here, depth,
                       words + p * step);
  }
}

bool linear(const Linear& layer) {
  static thread_local Scratch scratch;
  const ProductKernels* product = product_kernels(layer.isa, layer.half, layer.qmax);
  if (product == nullptr) return false;
  // One more step than needed: rows that are a power of two apart would share their place in the cache.
  const int64_t padded = round_up(layer.depth, kDepthAlign) + kDepthAlign;
  const int64_t code_bytes = padded * product->code_size;
  const bool blocks = suits_blocks(layer, *product);
  const int64_t step = blocks ? 0 : std::min(layer.tokens, std::max(kFewestTokens, kChunkBytes / code_bytes));
  const bool convert_bias = layer.bias != nullptr && layer.bias_dtype != DType::f32;
  const int64_t bias_bytes = convert_bias ? round_up(layer.rows * 4, 64) : 0;
  const int64_t token_bytes = groups_of(layer) * sizeof(Token);
  char* memory = static_cast<char*>(scratch.reserve(step * (code_bytes + token_bytes) + bias_bytes));
  if (memory == nullptr) return false;

  if (convert_bias) to_floats(layer.bias, layer.bias_dtype, layer.rows, reinterpret_cast<float*>(memory));
  const float* bias = convert_bias ? reinterpret_cast<float*>(memory) : static_cast<const float*>(layer.bias);
  char* codes = memory + bias_bytes;
  Token* token = reinterpret_cast<Token*>(codes + step * code_bytes);
  Chunk chunk = {layer, row_kernels(layer.isa, layer.half), *product, bias, 0, layer.tokens,
                 codes, token, groups_of(layer), padded};
  if (blocks) return multiply_blocks(chunk);
  for (; chunk.first < layer.tokens; chunk.first += step) {
    chunk.tokens = std::min(step, layer.tokens - chunk.first);
    if (!quantize_all(chunk) || !multiply(chunk)) return false;
  }
  return true;
}

}  // namespace mq
