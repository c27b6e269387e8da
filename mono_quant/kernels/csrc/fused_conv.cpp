#include "fused_conv.h"

#include <omp.h>

#include <algorithm>
#include <cmath>

#include "multiply.h"

namespace mq {
namespace {

// Codes of the tokens held at once: they stay in the second-level caches while all weights pass by.
constexpr int64_t kChunkBytes = 2 << 20;
// Tokens that pass by a panel of weights at a time.
constexpr int64_t kBlockPositions = 96;
// Tasks for each thread from which on a thread that is late does not hold up the others.
constexpr int64_t kTasks = 4;

const ConvKernels* float_kernels(Isa isa) {
#ifdef MQ_X86
  if (isa == Isa::avx512 || isa == Isa::avx512vnni) return &kConvAvx512;
  if (isa != Isa::portable) return &kConvAvx2;
#endif
  (void)isa;
  return nullptr;
}

// Codes that have a scale of their own, from where the codes and the scales of a token begin.
struct Segment {
  int64_t codes, words;
  int64_t token;
};

// How the codes of a chunk lie. Where groups are parts of pixels, each pixel is quantized once and receptive fields overlap:
// "lines" are then rows of the output, and codes an image with a border of zeros. Elsewhere each receptive field has codes of
// its own, and a chunk is one line.
struct Layout {
  bool pixels;
  // Of one pixel or one receptive field: codes, and scales.
  int64_t stride, scales;
  // With the border.
  int64_t height, width;
  int64_t segments;
};

// What all tasks of a call share.
struct Call {
  const FusedConv& conv;
  const ProductKernels& product;
  const ConvKernels& floats;
  Layout layout;
  const Segment* segments;
  const int32_t* packed;
  // With batch norm in them.
  const float* weight_scale;
  const float* bias;
};

// Codes of a few images, or of tokens from `first` on.
struct Chunk {
  int64_t first, tokens;
  char* codes;
  Token* token;
};

Layout layout_of(const FusedConv& conv, const ProductKernels& product) {
  const Patches& p = conv.patches;
  const int64_t channels = p.channels;
  Layout layout = {};
  layout.pixels = p.kernel_h * p.kernel_w > 1 && conv.group > 0 && channels % conv.group == 0;
  const int64_t depth = layout.pixels ? channels : conv.depth();
  layout.scales = conv.group > 0 ? (depth + conv.group - 1) / conv.group : 1;
  layout.segments = layout.pixels ? p.kernel_h * p.kernel_w * layout.scales : layout.scales;
  layout.height = p.height + 2 * p.padding_h;
  layout.width = p.width + 2 * p.padding_w;
  // one step more than needed: rows that are a power of two apart would share their place in the cache
  const int64_t codes = layout.pixels ? channels : round_up(depth, kDepthAlign) + kDepthAlign;
  layout.stride = codes * product.code_size;
  return layout;
}

void fill_segments(const FusedConv& conv, const ProductKernels& product, const Layout& layout, Segment* segment) {
  const Patches& p = conv.patches;
  const int64_t depth = layout.pixels ? p.channels : conv.depth();
  const int64_t fields = layout.pixels ? p.kernel_h * p.kernel_w : 1;
  for (int64_t i = 0; i < fields; ++i) {
    const int64_t pixel = i / p.kernel_w * p.dilation_h * layout.width + i % p.kernel_w * p.dilation_w;
    for (int64_t g = 0; g < layout.scales; ++g, ++segment) {
      const int64_t size = conv.group > 0 ? std::min(conv.group, depth - g * conv.group) : depth;
      *segment = {pixel * layout.stride + g * conv.group * product.code_size, words_of(size, product),
                  pixel * layout.scales + g};
    }
  }
}

void quantize_row(const Call& call, const float* row, int64_t depth, char* codes, Token* token) {
  const ProductKernels& product = call.product;
  const int64_t step = call.conv.group > 0 ? call.conv.group : depth;
  for (int64_t k = 0; k < depth; k += step, ++token) {
    *token = call.floats.quantize(row + k, std::min(step, depth - k), call.conv.qmax, product.code_size,
                                  product.unsigned_weights, codes + k * product.code_size);
  }
}

const float* pixel_at(const FusedConv& conv, int64_t image, int64_t y, int64_t x) {
  return conv.x + ((image * conv.patches.height + y) * conv.patches.width + x) * conv.x_stride;
}

// One row of an image with its border.
void quantize_line(const Call& call, const Chunk& chunk, int64_t line) {
  const Patches& p = call.conv.patches;
  const Layout& layout = call.layout;
  const int64_t image = line / layout.height, y = line % layout.height - p.padding_h;
  char* codes = chunk.codes + line * layout.width * layout.stride;
  Token* token = chunk.token + line * layout.width * layout.scales;
  for (int64_t i = 0; i < layout.width; ++i, codes += layout.stride, token += layout.scales) {
    const int64_t x = i - p.padding_w;
    if (y < 0 || y >= p.height || x < 0 || x >= p.width) {
      std::memset(codes, 0, layout.stride);
      std::memset(token, 0, layout.scales * sizeof(Token));
    } else {
      quantize_row(call, pixel_at(call.conv, chunk.first + image, y, x), p.channels, codes, token);
    }
  }
}

// The receptive field of the output position `t` of all images, zeros outside of the image.
void gather(const FusedConv& conv, int64_t t, float* target) {
  const Patches& p = conv.patches;
  const int64_t image = t / (p.out_h * p.out_w), top = t / p.out_w % p.out_h * p.stride_h - p.padding_h;
  const int64_t left = t % p.out_w * p.stride_w - p.padding_w, line = p.kernel_w * p.channels;
  const bool dense = p.dilation_w == 1 && conv.x_stride == p.channels;
  for (int64_t i = 0; i < p.kernel_h; ++i, target += line) {
    const int64_t y = top + i * p.dilation_h;
    if (y < 0 || y >= p.height) {
      std::memset(target, 0, line * sizeof(float));
    } else if (dense && left >= 0 && left + p.kernel_w <= p.width) {
      std::memcpy(target, pixel_at(conv, image, y, left), line * sizeof(float));
    } else {
      for (int64_t j = 0; j < p.kernel_w; ++j) {
        const int64_t x = left + j * p.dilation_w;
        float* place = target + j * p.channels;
        if (x < 0 || x >= p.width) {
          std::memset(place, 0, p.channels * sizeof(float));
        } else {
          std::memcpy(place, pixel_at(conv, image, y, x), p.channels * sizeof(float));
        }
      }
    }
  }
}

void quantize_token(const Call& call, const Chunk& chunk, int64_t t, float* patch) {
  const FusedConv& conv = call.conv;
  const Patches& p = conv.patches;
  const float* row = patch;
  if (p.kernel_h * p.kernel_w == 1 && p.padding_h == 0 && p.padding_w == 0) {
    const int64_t place = chunk.first + t, image = place / (p.out_h * p.out_w);
    row = pixel_at(conv, image, place / p.out_w % p.out_h * p.stride_h, place % p.out_w * p.stride_w);
  } else {
    gather(conv, chunk.first + t, patch);
  }
  quantize_row(call, row, conv.depth(), chunk.codes + t * call.layout.stride, chunk.token + t * call.layout.scales);
}

// `tokens` outputs from position `t` on, and the weights from row `n` on.
void multiply_tile(const Call& call, const char* codes, const Token* token, int64_t step, int64_t t, int tokens,
                   int64_t n) {
  const FusedConv& conv = call.conv;
  const ProductKernels& product = call.product;
  const Layout& layout = call.layout;
  // Integers, or the totals of groups. One row more: panels narrower than a multiple of sixteen are read beyond their end.
  alignas(64) int32_t sums[(kMaxTile + 1) * kMaxPanel];
  float* totals = reinterpret_cast<float*>(sums);
  const int rows = static_cast<int>(std::min<int64_t>(product.panel_rows, conv.rows - n));
  const int64_t lanes = std::min<int64_t>(round_up(rows, 16), product.panel_rows);
  const int64_t stride = step * layout.stride / 4, scales = step * layout.scales;
  const int32_t* panel = call.packed + n / product.panel_rows * panel_words(conv.depth(), product);
  const bool whole = layout.segments == 1;
  if (whole) {
    product.tile(reinterpret_cast<const int32_t*>(codes), stride, tokens, panel, rows, call.segments->words, sums, false);
  }
  for (int64_t s = 0; !whole && s < layout.segments; ++s) {
    const Segment& segment = call.segments[s];
    product.group_tile(reinterpret_cast<const int32_t*>(codes + segment.codes), stride, tokens, panel, rows,
                       segment.words, token + segment.token, scales, totals, s > 0);
    panel += segment.words * lanes;
  }
  const int64_t place = t * conv.out_stride + n;
  call.floats.finish({tokens, rows, sums, whole ? nullptr : totals, product.panel_rows, token, scales,
                      call.weight_scale + n, call.bias == nullptr ? nullptr : call.bias + n,
                      conv.residual == nullptr ? nullptr : conv.residual + place, conv.relu, conv.out + place,
                      conv.out_stride});
}

// Positions [first, last) of a chunk in one line, and the weights from row `n` on.
void multiply_line(const Call& call, const char* codes, const Token* token, int64_t step, int64_t t, int64_t tokens,
                   int64_t n) {
  const int64_t tiles = (tokens + call.product.tile_tokens - 1) / call.product.tile_tokens;
  for (int64_t i = 0; i < tiles; ++i) {
    // Tiles of nearly equal height: a last tile of one token would cost almost as much as a full one.
    const int64_t first = tokens * i / tiles, count = tokens * (i + 1) / tiles - first;
    multiply_tile(call, codes + first * step * call.layout.stride, token + first * step * call.layout.scales, step,
                  t + first, static_cast<int>(count), n);
  }
}

// Lines [first, last) of the output, or tokens where receptive fields have codes of their own.
void multiply_block(const Call& call, const Chunk& chunk, int64_t first, int64_t last, int64_t n) {
  const Patches& p = call.conv.patches;
  const Layout& layout = call.layout;
  if (!layout.pixels) {
    multiply_line(call, chunk.codes + first * layout.stride, chunk.token + first * layout.scales, 1,
                  chunk.first + first, last - first, n);
    return;
  }
  for (int64_t line = first; line < last; ++line) {
    const int64_t pixel = (line / p.out_h * layout.height + line % p.out_h * p.stride_h) * layout.width;
    multiply_line(call, chunk.codes + pixel * layout.stride, chunk.token + pixel * layout.scales, p.stride_w,
                  (chunk.first * p.out_h + line) * p.out_w, p.out_w, n);
  }
}

// Everything of a chunk, by a team that is there already. Chunks are counted in images or in tokens, as they are cut.
void run_chunk(const Call& call, const Chunk& chunk, float* patch, int team) {
  const Patches& p = call.conv.patches;
  const Layout& layout = call.layout;
  const int64_t quantized = layout.pixels ? chunk.tokens * layout.height : chunk.tokens;
#pragma omp for schedule(static)
  for (int64_t i = 0; i < quantized; ++i) {
    if (layout.pixels) {
      quantize_line(call, chunk, i);
    } else {
      quantize_token(call, chunk, i, patch);
    }
  }
  const int64_t units = layout.pixels ? chunk.tokens * p.out_h : chunk.tokens;
  const int64_t block = layout.pixels ? std::max<int64_t>(1, kBlockPositions / p.out_w) : kBlockPositions;
  const int64_t blocks = (units + block - 1) / block;
  const int64_t panels = panels_of(call.conv.rows, call.product);
  const int64_t parts = std::min(panels, (kTasks * team + blocks - 1) / blocks);
#pragma omp for schedule(dynamic)
  for (int64_t task = 0; task < blocks * parts; ++task) {
    const int64_t b = task % blocks, part = task / blocks;
    for (int64_t panel = panels * part / parts; panel < panels * (part + 1) / parts; ++panel) {
      multiply_block(call, chunk, units * b / blocks, units * (b + 1) / blocks, panel * call.product.panel_rows);
    }
  }
}

// Batch norm is linear in the sums: it joins scales and bias, rounded once.
void fold_norm(const FusedConv& conv, float* weight_scale, float* bias) {
  const BatchNorm& norm = conv.norm;
  for (int64_t n = 0; n < conv.rows; ++n) {
    const double factor = (norm.weight == nullptr ? 1.0 : norm.weight[n]) / std::sqrt(norm.variance[n] + norm.epsilon);
    const double offset = (conv.bias == nullptr ? 0.0 : conv.bias[n]) - static_cast<double>(norm.mean[n]);
    weight_scale[n] = static_cast<float>(conv.weight_scale[n] * factor);
    bias[n] = static_cast<float>(offset * factor + (norm.bias == nullptr ? 0.0 : norm.bias[n]));
  }
}

}  // namespace

bool fused_conv(const FusedConv& conv) {
  static thread_local Scratch scratch;
  const ConvKernels* floats = float_kernels(conv.isa);
  const ProductKernels& product = *product_kernels(conv.isa, false, conv.qmax);
  if (floats == nullptr || product.panel_rows == 0 || conv.depth() == 0) return false;
  const Patches& p = conv.patches;
  const Layout layout = layout_of(conv, product);
  const int64_t units = layout.pixels ? conv.images : conv.images * p.out_h * p.out_w;
  const int64_t unit_pixels = layout.pixels ? layout.height * layout.width : 1;
  const int64_t unit_codes = unit_pixels * layout.stride, unit_scales = unit_pixels * layout.scales;
  const int64_t step = std::min(units, std::max<int64_t>(layout.pixels ? 1 : kBlockPositions, kChunkBytes / unit_codes));
  const int64_t work = conv.images * p.out_h * p.out_w * conv.rows * conv.depth();
  const int team = static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(conv.threads, work / kThreadWork)));

  const int64_t pack_bytes = conv.packed == nullptr ? 4 * packed_words(product, conv.rows, conv.depth()) : 0;
  const int64_t code_bytes = round_up(step * unit_codes, 64);
  const int64_t token_bytes = round_up(step * unit_scales * static_cast<int64_t>(sizeof(Token)), 64);
  const int64_t segment_bytes = round_up(layout.segments * static_cast<int64_t>(sizeof(Segment)), 64);
  const int64_t patch_bytes = round_up(conv.depth() * 4, 64);
  const int64_t norm_bytes = conv.norm.mean == nullptr ? 0 : round_up(2 * conv.rows * 4, 64);
  const int64_t bytes = pack_bytes + code_bytes + token_bytes + segment_bytes + norm_bytes + team * patch_bytes;
  char* memory = static_cast<char*>(scratch.reserve(bytes));
  if (memory == nullptr) return false;
  char* codes = memory + pack_bytes;
  Token* token = reinterpret_cast<Token*>(codes + code_bytes);
  Segment* segments = reinterpret_cast<Segment*>(codes + code_bytes + token_bytes);
  float* folded = reinterpret_cast<float*>(codes + code_bytes + token_bytes + segment_bytes);
  char* patches = reinterpret_cast<char*>(folded) + norm_bytes;
  fill_segments(conv, product, layout, segments);
  int32_t* fresh = reinterpret_cast<int32_t*>(memory);
  if (conv.packed == nullptr) pack(product, conv.weight, conv.rows, conv.depth(), team, fresh);
  if (norm_bytes > 0) fold_norm(conv, folded, folded + conv.rows);
  const Call call = {conv, product, *floats, layout, segments, conv.packed == nullptr ? fresh : conv.packed,
                     norm_bytes > 0 ? folded : conv.weight_scale, norm_bytes > 0 ? folded + conv.rows : conv.bias};
#pragma omp parallel num_threads(team) if (team > 1)
  {
    float* patch = reinterpret_cast<float*>(patches + omp_get_thread_num() * patch_bytes);
    for (int64_t first = 0; first < units; first += step) {
      run_chunk(call, {first, std::min(step, units - first), codes, token}, patch, team);
    }
  }
  return true;
}

}  // namespace mq
