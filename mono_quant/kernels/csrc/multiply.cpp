#include "multiply.h"

#include <algorithm>

namespace mq {
namespace {

// Rows of a panel are padded to this.
constexpr int64_t kPanelAlign = 16;
// Of panels that were interleaved before, so much passes from the second-level cache to the first at once.
constexpr int64_t kSliceDepth = 512;
constexpr int64_t kShortDepth = 1024;
// With groups the limit of dot products shrinks in proportion: to a quarter of the tokens for 128, an eighth for 64
// (measured).
constexpr int64_t kDotGroups = 512;
// Interleaved weights, all of them and one panel, that stay in the caches while blocks of tokens pass by.
constexpr int64_t kPackedBytes = 4 << 20, kPackedPanelBytes = 256 << 10;
// Blocks for each thread from which on the interleaved weights have paid.
constexpr int64_t kBlocks = 8;

// `rows` weight rows from `n` on, by dot products.
void multiply_rows(const Chunk& chunk, int64_t n, int64_t rows) {
  const Linear& layer = chunk.layer;
  alignas(64) int32_t sums[kMaxTile * kDotRows];
  const int64_t step = chunk.product.dot_tokens;
  for (int64_t first = 0; first < chunk.tokens; first += kMaxTile) {
    const int64_t last = std::min(first + kMaxTile, chunk.tokens);
    for (int64_t r = 0; r < rows; r += 4) {
      const int8_t* weight[4];
      for (int64_t i = 0; i < 4; ++i) weight[i] = layer.weight + (n + std::min(r + i, rows - 1)) * layer.weight_stride;
      // All tokens pass by four weight rows while these are in the first-level cache and the next four on their way.
      for (int64_t t = first; t < last; t += step) {
        const int64_t ahead = t == 0 ? 4 * layer.weight_stride : 0;
        const int tokens = static_cast<int>(std::min(step, last - t));
        int32_t* place = sums + (t - first) * kDotRows + r;
        if (layer.group == 0) {
          chunk.product.dot(weight, layer.depth, ahead, chunk.code_row(t), chunk.padded, tokens, place, kDotRows);
        } else {
          chunk.product.group_dot(weight, layer.depth, layer.group, ahead, chunk.code_row(t), chunk.padded, tokens,
                                  chunk.tokens_of(t), chunk.groups, reinterpret_cast<float*>(place), kDotRows);
        }
      }
    }
    finish(chunk, first, last - first, n, rows, sums, kDotRows);
  }
}

int rows_from(int64_t n, const Chunk& chunk) {
  return static_cast<int>(std::min<int64_t>(chunk.product.panel_rows, chunk.layer.rows - n));
}

// The panel from row `n` on, `depth` codes of it from `k` on.
void interleave(const Chunk& chunk, int64_t n, int64_t k, int64_t depth, int32_t* panel) {
  const Linear& layer = chunk.layer;
  chunk.product.interleave(layer.weight + n * layer.weight_stride + k * chunk.product.weight_size, layer.weight_stride,
                           rows_from(n, chunk), depth, panel);
}

// The panel that comes next, on its way from memory while tokens pass by the one before.
struct Ahead {
  const int32_t* panel;
  int64_t lines;

  // The part of it that belongs to one of so many steps.
  void fetch(int64_t step, int64_t steps) const {
    const char* place = reinterpret_cast<const char*>(panel);
    const int64_t first = lines * step / steps, last = lines * (step + 1) / steps;
    for (int64_t i = first; i < last; ++i) __builtin_prefetch(place + i * 64, 0, 2);
  }
};

// Tokens [first, last) pass by such a panel. The sums are finished at the end of the rows; until then each token keeps
// its own.
void multiply_tiles(const Chunk& chunk, int64_t first, int64_t last, int64_t n, int64_t k, int64_t depth,
                    const int32_t* panel, const Ahead& ahead, int32_t* sums) {
  const ProductKernels& product = chunk.product;
  const bool whole = depth == chunk.layer.depth, final = k + depth == chunk.layer.depth;
  const int rows = rows_from(n, chunk);
  const int64_t tiles = (last - first + product.tile_tokens - 1) / product.tile_tokens;
  for (int64_t i = 0; i < tiles; ++i) {
    // Tiles of nearly equal height: a last tile of one token would cost almost as much as a full one.
    const int64_t t = first + (last - first) * i / tiles;
    const int tokens = static_cast<int>(first + (last - first) * (i + 1) / tiles - t);
    ahead.fetch(i, tiles);
    int32_t* tile = whole ? sums : sums + (t - first) * product.panel_rows;
    product.tile(reinterpret_cast<const int32_t*>(chunk.code_row(t) + k * product.code_size), chunk.code_bytes() / 4,
                 tokens, panel, rows, words_of(depth, product), tile, k > 0);
    if (final) finish(chunk, t, tokens, n, rows, tile, product.panel_rows);
  }
}

// The same for tokens with groups, which keep their totals in the place of sums: group by group, so that a group's part
// of the panel stays in the first-level cache while a block of tokens passes by.
void multiply_groups(const Chunk& chunk, int64_t first, int64_t last, int64_t n, int64_t k, int64_t depth,
                     const int32_t* panel, const Ahead& ahead, int32_t* sums) {
  const ProductKernels& product = chunk.product;
  const int64_t group = chunk.layer.group, end = k + depth;
  const bool whole = depth == chunk.layer.depth, final = end == chunk.layer.depth;
  const int rows = rows_from(n, chunk);
  const int64_t lanes = round_up(rows, kPanelAlign);
  const int64_t blocks = (last - first + kBlockTokens - 1) / kBlockTokens;
  for (int64_t b = 0; b < blocks; ++b) {
    const int64_t from = first + (last - first) * b / blocks, to = first + (last - first) * (b + 1) / blocks;
    float* totals = reinterpret_cast<float*>(whole ? sums : sums + (from - first) * product.panel_rows);
    const int64_t tiles = (to - from + product.tile_tokens - 1) / product.tile_tokens;
    for (int64_t g = k / group; g * group < end; ++g) {
      const int64_t start = g * group, words = words_of(std::min(group, end - start), product);
      const int32_t* weights = panel + words_of(start - k, product) * lanes;
      ahead.fetch(b * chunk.groups + g, blocks * chunk.groups);
      for (int64_t i = 0; i < tiles; ++i) {
        const int64_t t = from + (to - from) * i / tiles;
        const int tokens = static_cast<int>(from + (to - from) * (i + 1) / tiles - t);
        product.group_tile(reinterpret_cast<const int32_t*>(chunk.code_row(t) + start * product.code_size),
                           chunk.code_bytes() / 4, tokens, weights, rows, words, chunk.tokens_of(t) + g, chunk.groups,
                           totals + (t - from) * product.panel_rows, g > 0);
      }
    }
    if (final) {
      finish(chunk, from, to - from, n, rows, reinterpret_cast<const int32_t*>(totals), product.panel_rows);
    }
  }
}

void pass(const Chunk& chunk, int64_t first, int64_t last, int64_t n, int64_t k, int64_t depth, const int32_t* panel,
          const Ahead& ahead, int32_t* sums) {
  const auto run = chunk.layer.group == 0 ? multiply_tiles : multiply_groups;
  run(chunk, first, last, n, k, depth, panel, ahead, sums);
}

// They pass by panel `p` of weights that were interleaved before; panel `next` will be the one after it.
void pass_packed(const Chunk& chunk, int64_t first, int64_t last, int64_t p, int64_t next, const int32_t* packed,
                 int32_t* sums) {
  const ProductKernels& product = chunk.product;
  const int64_t depth = chunk.layer.depth, step = panel_words(depth, product), n = p * product.panel_rows;
  const int64_t lanes = round_up(rows_from(n, chunk), kPanelAlign);
  // Groups cut the depth by themselves.
  const int64_t slice = chunk.layer.group == 0 ? kSliceDepth : depth;
  const int64_t slices = (depth + slice - 1) / slice, blocks = (last - first + kBlockTokens - 1) / kBlockTokens;
  // A single tile reads panels one behind the other, which the processor sees by itself.
  const bool fetch = next < panels_of(chunk.layer.rows, product) && last - first > product.tile_tokens;
  const int64_t lines = fetch ? step / 16 : 0;
  for (int64_t i = 0; i < blocks * slices; ++i) {
    const int64_t b = i / slices, k = i % slices * slice;
    const int64_t from = lines * i / (blocks * slices), to = lines * (i + 1) / (blocks * slices);
    pass(chunk, first + (last - first) * b / blocks, first + (last - first) * (b + 1) / blocks, n, k,
         std::min(slice, depth - k), packed + p * step + words_of(k, product) * lanes,
         {packed + next * step + from * 16, to - from}, sums);
  }
}

// Tokens [first, last) pass by the panel of weights from row `n` on, which is interleaved block by block.
void multiply_panel(const Chunk& chunk, int64_t n, int64_t first, int64_t last, int32_t* panel, int32_t* sums) {
  for (int64_t k = 0; k < chunk.layer.depth; k += kBlockDepth) {
    const int64_t depth = std::min(kBlockDepth, chunk.layer.depth - k);
    interleave(chunk, n, k, depth, panel);
    pass(chunk, first, last, n, k, depth, panel, {panel, 0}, sums);
  }
}

struct Plan {
  bool dot;
  int64_t tasks;
  // Parts that the tokens are split into, besides the split of the weight rows.
  int64_t parts;
  int threads;
};

// Up to how many tokens dot products are faster.

Plan make_plan(const Chunk& chunk) {
  const Linear& layer = chunk.layer;
  const ProductKernels& product = chunk.product;
  const int64_t work = chunk.tokens * layer.rows * layer.depth;
  Plan plan;
  plan.threads = static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(layer.threads, work / kThreadWork)));
  plan.parts = 1;
  const int64_t limit = dot_limit(product, layer.rows, layer.depth, layer.weight_stride, layer.group,
                                  layer.packed != nullptr);
  plan.dot = product.panel_rows == 0 || chunk.tokens <= limit || layer.depth == 0;
  if (plan.dot) {
    plan.tasks = (layer.rows + kDotRows - 1) / kDotRows;
    return plan;
  }
  const int64_t panels = panels_of(layer.rows, product);
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
  const int64_t first = chunk.tokens * part / plan.parts, last = chunk.tokens * (part + 1) / plan.parts;
  if (chunk.layer.packed == nullptr) return multiply_panel(chunk, n, first, last, panel, sums);
  // Threads take panels in turn.
  const int64_t p = task / plan.parts, next = plan.parts == 1 ? p + plan.threads : p + 1;
  pass_packed(chunk, first, last, p, next, chunk.layer.packed, sums);
}

}  // namespace

int64_t dot_limit(const ProductKernels& product, int64_t rows, int64_t depth, int64_t row_bytes, int64_t group,
                  bool packed) {
  // Weights that were interleaved before cost nothing but their size: twice that of the codes where these are pairs.
  if (packed) return product.packed_limit;
  const bool is_short = depth < kShortDepth && !is_far(rows, row_bytes);
  const int64_t limit = is_short ? product.dot_limit_short : product.dot_limit_long;
  // The lanes of every group are added up by themselves.
  return group == 0 ? limit : (limit * group + kDotGroups - 1) / kDotGroups;
}

bool multiply(const Chunk& chunk) {
  const Plan plan = make_plan(chunk);
  const bool packed = chunk.layer.packed != nullptr;
  const int64_t panel_bytes = plan.dot || packed ? 0 : kMaxPanel * kBlockDepth * chunk.product.code_size;
  const int64_t at_once = chunk.layer.group == 0 && !packed ? kMaxTile : kBlockTokens;
  const int64_t sum_rows = packed || chunk.layer.depth <= kBlockDepth ? at_once : chunk.tokens;
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

bool suits_blocks(const Linear& layer, const ProductKernels& product) {
  if (product.panel_rows == 0 || layer.depth == 0) return false;
  if (layer.tokens < kBlocks * kBlockTokens * std::max(1, layer.threads)) return false;
  const int64_t panel = panel_words(layer.depth, product) * 4;
  return panel <= kPackedPanelBytes && panel * panels_of(layer.rows, product) <= kPackedBytes;
}

bool multiply_blocks(const Chunk& whole) {
  static thread_local Scratch packed_scratch;
  const Linear& layer = whole.layer;
  const ProductKernels& product = whole.product;
  const int64_t step = panel_words(layer.depth, product);
  const int64_t panels = panels_of(layer.rows, product), blocks = (layer.tokens + kBlockTokens - 1) / kBlockTokens;
  const int64_t code_bytes = kBlockTokens * whole.code_bytes();
  int32_t* own = nullptr;
  if (layer.packed == nullptr) {
    own = static_cast<int32_t*>(packed_scratch.reserve(step * panels * 4));
    if (own == nullptr) return false;
  }
  const int32_t* packed = own == nullptr ? layer.packed : own;
  bool ok = true;
#pragma omp parallel num_threads(layer.threads) if (layer.threads > 1)
  {
    static thread_local Scratch scratch;
    char* memory = static_cast<char*>(scratch.reserve(code_bytes + kBlockTokens * whole.groups * sizeof(Token)));
#pragma omp for schedule(static)
    for (int64_t p = 0; p < (own == nullptr ? 0 : panels); ++p) {
      interleave(whole, p * product.panel_rows, 0, layer.depth, own + p * step);
    }
#pragma omp for schedule(dynamic)
    for (int64_t b = 0; b < blocks; ++b) {
      Chunk block = {layer, whole.row_kernels, product, whole.bias, layer.tokens * b / blocks, 0,
                     memory, reinterpret_cast<Token*>(memory + code_bytes), whole.groups, whole.padded};
      block.tokens = layer.tokens * (b + 1) / blocks - block.first;
      bool mine = memory != nullptr;
      for (int64_t t = 0; mine && t < block.tokens; ++t) mine = quantize(block, t);
      alignas(64) int32_t sums[kBlockTokens * kMaxPanel];
      for (int64_t p = 0; mine && p < panels; ++p) {
        pass_packed(block, 0, block.tokens, p, p + 1 == panels ? 0 : p + 1, packed, sums);
      }
      if (!mine) {
#pragma omp atomic write
        ok = false;
      }
    }
  }
  return ok;
}

}  // namespace mq
