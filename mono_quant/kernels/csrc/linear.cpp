#include "linear.h"

#include <algorithm>

namespace mq {
namespace {

// Codes of the tokens held at once: a few megabytes stay in the last-level cache while all weights pass by.
constexpr int64_t kChunkBytes = 4 << 20;
// Weights of one panel widened at once, per row: the panel stays in the second-level cache.
constexpr int64_t kBlockDepth = 2048;
// Weight rows per task of the dot-product path.
constexpr int64_t kDotRows = 32;
constexpr int64_t kShortDepth = 1024;
// Weights that are larger come from memory rather than from a cache near the core, and are fetched ahead.
constexpr int64_t kFetchAhead = 2 << 20;
// Multiply-adds below which another thread costs more than it brings.
constexpr int64_t kThreadWork = 1 << 17;
// Values quantized below which another thread costs more than it brings.
constexpr int64_t kQuantizeWork = 1 << 14;
constexpr int64_t kMaxPanel = 64;
constexpr int64_t kMaxTile = 8;

struct Chunk {
  const Linear& layer;
  const RowKernels& row_kernels;
  const ProductKernels& product;
  int64_t first, tokens;
  // Codes [tokens, padded] of product.code_size bytes.
  char* codes;
  Token* token;
  int64_t padded;
  const float* bias;

  const char* code_row(int64_t t) const { return codes + t * padded * product.code_size; }
  char* out(int64_t t, int64_t n) const {
    const int64_t size = size_of(layer.x.dtype);
    return static_cast<char*>(layer.out) + ((first + t) * layer.out_stride + n) * size;
  }
};

const ProductKernels* product_kernels(Isa isa, bool half, int qmax) {
#ifdef MQ_X86
  switch (isa) {
    case Isa::avx512vnni:
      if (half) return &kProductHalfAvx512;
      return qmax <= 127 ? &kProductVnniBytes : &kProductVnniWide;
    case Isa::avx512:
      return half ? &kProductHalfAvx512 : &kProductAvx512;
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

// One kernel row of a receptive field: `pixel` bytes at every `stride` bytes, zeros outside of the image.
char* copy_pixels(const Patches& p, const char* row, int64_t x, int64_t pixel, int64_t stride, char* target) {
  if (p.dilation_w == 1 && stride == pixel && x >= 0 && x + p.kernel_w <= p.width) {
    std::memcpy(target, row + x * pixel, p.kernel_w * pixel);
    return target + p.kernel_w * pixel;
  }
  for (int64_t i = 0; i < p.kernel_w; ++i, x += p.dilation_w, target += pixel) {
    if (x >= 0 && x < p.width) {
      std::memcpy(target, row + x * stride, pixel);
    } else {
      std::memset(target, 0, pixel);
    }
  }
  return target;
}

void gather(const Linear& layer, int64_t t, char* target) {
  const Patches& p = *layer.patches;
  const int64_t image = t / (p.out_h * p.out_w), y = t / p.out_w % p.out_h, x = t % p.out_w;
  // Several groups share a pixel: it has x.stride values of which this layer sees `channels`.
  const int64_t pixel = p.channels * size_of(layer.x.dtype), stride = layer.x.stride * size_of(layer.x.dtype);
  for (int64_t i = 0; i < p.kernel_h; ++i) {
    const int64_t row = y * p.stride_h - p.padding_h + i * p.dilation_h;
    if (row < 0 || row >= p.height) {
      std::memset(target, 0, p.kernel_w * pixel);
      target += p.kernel_w * pixel;
    } else {
      const char* start = static_cast<const char*>(layer.x.at((image * p.height + row) * p.width));
      target = copy_pixels(p, start, x * p.stride_w - p.padding_w, pixel, stride, target);
    }
  }
}

// Writes the codes of token `t`; false when there is no memory for its receptive field.
bool quantize(const Chunk& chunk, int64_t t) {
  static thread_local Scratch scratch;
  const Linear& layer = chunk.layer;
  const void* row = layer.x.at(chunk.first + t);
  if (layer.patches != nullptr) {
    char* patch = static_cast<char*>(scratch.reserve(layer.depth * size_of(layer.x.dtype) + 1));
    if (patch == nullptr) return false;
    gather(layer, chunk.first + t, patch);
    row = patch;
  }
  void* codes = chunk.codes + t * chunk.padded * chunk.product.code_size;
  Token token = chunk.row_kernels.quantize(row, layer.x.dtype, layer.depth, chunk.padded, layer.qmax,
                                           chunk.product.code_size, codes);
  if (!chunk.product.unsigned_weights) token.correction = 0;
  chunk.token[t] = token;
  return true;
}

void finish(const Chunk& chunk, int64_t t, int64_t n, int64_t columns, const int32_t* sums) {
  const float* scale = chunk.layer.weight_scale == nullptr ? nullptr : chunk.layer.weight_scale + n;
  chunk.row_kernels.finish(sums, columns, chunk.token[t], scale,
                           chunk.bias == nullptr ? nullptr : chunk.bias + n, chunk.out(t, n), chunk.layer.x.dtype);
}

// Few tokens: dot products along the weight rows, `rows` of them from `n` on.
void multiply_rows(const Chunk& chunk, int64_t n, int64_t rows) {
  const Linear& layer = chunk.layer;
  alignas(64) int32_t sums[kMaxTile * kDotRows];
  const bool far = layer.rows * layer.weight_stride > kFetchAhead;
  const int64_t step = chunk.product.dot_tokens;
  for (int64_t first = 0; first < chunk.tokens; first += kMaxTile) {
    const int64_t last = std::min(first + kMaxTile, chunk.tokens);
    for (int64_t r = 0; r < rows; r += 4) {
      const int8_t* weight[4];
      for (int64_t i = 0; i < 4; ++i) weight[i] = layer.weight + (n + std::min(r + i, rows - 1)) * layer.weight_stride;
      // All tokens pass by four weight rows while these are in the first-level cache and the next four on their way.
      for (int64_t t = first; t < last; t += step) {
        const int64_t ahead = far && t == 0 ? 4 * layer.weight_stride : 0;
        chunk.product.dot(weight, layer.depth, ahead, chunk.code_row(t), chunk.padded,
                          static_cast<int>(std::min(step, last - t)), sums + (t - first) * kDotRows + r, kDotRows);
      }
    }
    for (int64_t t = first; t < last; ++t) finish(chunk, t, n, rows, sums + (t - first) * kDotRows);
  }
}

// Many tokens: one panel of weights from row `n` on is interleaved into scratch, then all tokens pass by it.
void multiply_panel(const Chunk& chunk, int64_t n, int64_t first, int64_t last, int32_t* panel, int32_t* sums) {
  const Linear& layer = chunk.layer;
  const ProductKernels& product = chunk.product;
  const int64_t codes_per_word = 4 / product.code_size;
  const int rows = static_cast<int>(std::min<int64_t>(product.panel_rows, layer.rows - n));
  const int64_t tiles = (last - first + product.tile_tokens - 1) / product.tile_tokens;
  for (int64_t k = 0; k < layer.depth; k += kBlockDepth) {
    const int64_t depth = std::min(kBlockDepth, layer.depth - k);
    const bool final = k + depth == layer.depth;
    product.interleave(layer.weight + n * layer.weight_stride + k * product.weight_size, layer.weight_stride, rows, depth,
                       panel);
    const int64_t words = (depth + codes_per_word - 1) / codes_per_word;
    for (int64_t i = 0; i < tiles; ++i) {
      // Tiles of nearly equal height: a last tile of one token would cost almost as much as a full one.
      const int64_t t = first + (last - first) * i / tiles;
      const int tokens = static_cast<int>(first + (last - first) * (i + 1) / tiles - t);
      int32_t* tile = layer.depth <= kBlockDepth ? sums : sums + (t - first) * product.panel_rows;
      product.tile(reinterpret_cast<const int32_t*>(chunk.code_row(t) + k * product.code_size),
                   chunk.padded / codes_per_word, tokens, panel, rows, words, tile, k > 0);
      for (int j = 0; final && j < tokens; ++j) finish(chunk, t + j, n, rows, tile + j * product.panel_rows);
    }
  }
}

struct Plan {
  bool dot;
  int64_t tasks;
  // Parts that the tokens are split into, besides the split of the weight rows.
  int64_t parts;
  int threads;
};

Plan make_plan(const Chunk& chunk) {
  const Linear& layer = chunk.layer;
  const int64_t work = chunk.tokens * layer.rows * layer.depth;
  Plan plan;
  plan.threads = static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(layer.threads, work / kThreadWork)));
  plan.parts = 1;
  // Interleaving a panel costs about as much as a few more tokens; summing up lanes at the end of a dot product
  // costs more, the shorter the rows are.
  const int limit = layer.depth < kShortDepth ? chunk.product.dot_limit_short : chunk.product.dot_limit_long;
  plan.dot = chunk.product.panel_rows == 0 || chunk.tokens <= limit || layer.depth == 0;
  if (plan.dot) {
    plan.tasks = (layer.rows + kDotRows - 1) / kDotRows;
    return plan;
  }
  const int64_t panels = (layer.rows + chunk.product.panel_rows - 1) / chunk.product.panel_rows;
  while (plan.threads > 1 && panels * plan.parts < 4 * plan.threads && chunk.tokens / (2 * plan.parts) >= 48) {
    plan.parts *= 2;
  }
  plan.tasks = panels * plan.parts;
  return plan;
}

void run_task(const Chunk& chunk, const Plan& plan, int64_t task, int32_t* panel, int32_t* sums) {
  if (plan.dot) {
    const int64_t n = task * kDotRows;
    multiply_rows(chunk, n, std::min(kDotRows, chunk.layer.rows - n));
    return;
  }
  const int64_t part = task % plan.parts, n = task / plan.parts * chunk.product.panel_rows;
  multiply_panel(chunk, n, chunk.tokens * part / plan.parts, chunk.tokens * (part + 1) / plan.parts, panel, sums);
}

// Runs all tasks of a chunk; false when a thread found no memory.
bool run_tasks(const Chunk& chunk, const Plan& plan) {
  const int64_t panel_bytes = plan.dot ? 0 : kMaxPanel * kBlockDepth * chunk.product.code_size;
  const int64_t sum_rows = chunk.layer.depth <= kBlockDepth ? kMaxTile : chunk.tokens;
  const int64_t sum_bytes = plan.dot ? 0 : sum_rows * kMaxPanel * 4;
  bool ok = true;
#pragma omp parallel num_threads(plan.threads) if (plan.threads > 1)
  {
    static thread_local Scratch scratch;
    char* memory = plan.dot ? nullptr : static_cast<char*>(scratch.reserve(panel_bytes + sum_bytes));
    const bool mine = plan.dot || memory != nullptr;
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < plan.tasks; ++task) {
      if (mine) {
        run_task(chunk, plan, task, reinterpret_cast<int32_t*>(memory),
                 reinterpret_cast<int32_t*>(memory + panel_bytes));
      } else {
#pragma omp atomic write
        ok = false;
      }
    }
  }
  return ok;
}

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

bool linear(const Linear& layer) {
  static thread_local Scratch scratch;
  const ProductKernels* product = product_kernels(layer.isa, layer.half, layer.qmax);
  if (product == nullptr) return false;
  // One more step than needed: rows that are a power of two apart would share their place in the cache.
  const int64_t padded = round_up(layer.depth, kDepthAlign) + kDepthAlign;
  const int64_t code_bytes = padded * product->code_size;
  const int64_t fit = std::max<int64_t>(kMaxTile, kChunkBytes / code_bytes);
  const int64_t step = std::min(layer.tokens, fit);
  const bool convert_bias = layer.bias != nullptr && layer.bias_dtype != DType::f32;
  const int64_t bias_bytes = convert_bias ? round_up(layer.rows * 4, 64) : 0;
  char* memory = static_cast<char*>(scratch.reserve(step * (code_bytes + sizeof(Token)) + bias_bytes));
  if (memory == nullptr) return false;

  if (convert_bias) to_floats(layer.bias, layer.bias_dtype, layer.rows, reinterpret_cast<float*>(memory));
  const float* bias = convert_bias ? reinterpret_cast<float*>(memory) : static_cast<const float*>(layer.bias);
  char* codes = memory + bias_bytes;
  Token* token = reinterpret_cast<Token*>(codes + step * code_bytes);
  for (int64_t first = 0; first < layer.tokens; first += step) {
    const Chunk chunk = {layer, row_kernels(layer.isa, layer.half), *product, first, std::min(step, layer.tokens - first),
                         codes, token,                              padded,   bias};
    if (!quantize_all(chunk) || !run_tasks(chunk, make_plan(chunk))) return false;
  }
  return true;
}

}  // namespace mq
