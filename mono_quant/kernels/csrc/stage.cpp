#include "stage.h"

#include <algorithm>

#include "linear.h"

namespace mq {

Stage::Stage(const Chain& chain, const Product& product, const Part* parts, bool packed, int64_t tokens)
    : product_(product),
      parts_(parts),
      kernels_(product_kernels(static_cast<Isa>(chain.isa), false, static_cast<int>(product.qmax))),
      rows_(&row_kernels(static_cast<Isa>(chain.isa), false)),
      floats_(&float_kernels(static_cast<Isa>(chain.isa))) {
  // One more step than needed: rows that are a power of two apart would share their place in the cache.
  padded_ = round_up(product.depth, kDepthAlign) + kDepthAlign;
  group_ = product.group < product.depth ? product.group : 0;
  groups_ = group_ == 0 ? 1 : (product.depth + group_ - 1) / group_;
  const int64_t limit = dot_limit(*kernels_, product.rows, product.depth, product.depth, group_, packed);
  dot_ = kernels_->panel_rows == 0 || product.depth == 0 || tokens <= limit;
  strip_rows_ = dot_ ? kDotRows : kernels_->panel_rows;
  strips_ = 0;
  for (int64_t i = 0; i < product.parts; ++i) strips_ += (parts[i].rows + strip_rows_ - 1) / strip_rows_;
}

Strip Stage::strip(int64_t index) const {
  int64_t column = 0;
  for (const Part* part = parts_;; ++part) {
    const int64_t here = (part->rows + strip_rows_ - 1) / strip_rows_;
    if (index < here) {
      const int64_t row = index * strip_rows_;
      return {part, row, std::min(strip_rows_, part->rows - row), column + row};
    }
    index -= here;
    column += part->rows;
  }
}

const int32_t* Stage::words(const Strip& strip) const {
  if (dot_ || strip.part->packed == nullptr) return nullptr;
  return strip.part->packed + strip.row / strip_rows_ * panel_words(product_.depth, *kernels_);
}

int64_t Stage::code_bytes(int64_t tokens) const { return tokens * padded_ * kernels_->code_size; }

int64_t Stage::token_bytes(int64_t tokens) const {
  return round_up(tokens * groups_ * static_cast<int64_t>(sizeof(Token)), 64);
}

int64_t Stage::work_bytes() const {
  return kBlockTokens * kMaxPanel * 4 + kMaxPanel * std::min(kBlockDepth, padded_) * kernels_->code_size;
}

void Stage::quantize(const float* row, int64_t t, const Codes& codes) const {
  Token* token = codes.token + t * groups_;
  rows_->quantize(row, DType::f32, product_.depth, padded_, group_, static_cast<int>(product_.qmax), kernels_->code_size,
                  codes.data + code_bytes(t), token);
  if (!kernels_->unsigned_weights) {
    for (int64_t g = 0; g < groups_; ++g) token[g].correction = 0;
  }
}

void Stage::multiply(const Codes& codes, int64_t first, int64_t tokens, const Strip& strip, const int32_t* next,
                     char* work, Finish finish) const {
  int32_t* sums = reinterpret_cast<int32_t*>(work);
  if (dot_) {
    by_dots(codes, first, tokens, strip, sums);
  } else {
    by_tiles(codes, first, tokens, strip, next, work + kBlockTokens * kMaxPanel * 4, sums);
  }
  finish.sums = sums;
  finish.sums_stride = strip_rows_;
  finish.totals = group_ != 0;
  finish.tokens = tokens;
  finish.columns = strip.rows;
  finish.token = codes.token + first * groups_;
  finish.token_stride = groups_;
  finish.weight_scale = strip.part->weight_scale + strip.row;
  finish.bias = strip.part->bias == nullptr ? nullptr : strip.part->bias + strip.row;
  floats_->finish(finish);
}

void Stage::interleave(const Strip& strip, int64_t k, int64_t depth, int32_t* panel) const {
  kernels_->interleave(strip.part->weight + strip.row * product_.depth + k, product_.depth, static_cast<int>(strip.rows),
                       depth, panel);
}

void Stage::by_tiles(const Codes& codes, int64_t first, int64_t tokens, const Strip& strip, const int32_t* next,
                     char* work, int32_t* sums) const {
  const int64_t depth = product_.depth, lanes = std::min(round_up(strip.rows, 16), strip_rows_), stride = code_bytes(1) / 4;
  const int rows = static_cast<int>(strip.rows);
  const int32_t* packed = words(strip);
  const int64_t tiles = (tokens + kernels_->tile_tokens - 1) / kernels_->tile_tokens;
  // The next strip comes from memory while this one is used; with a single tile, the processor sees that by itself.
  const char* ahead = reinterpret_cast<const char*>(next);
  const int64_t lines = next == nullptr || tiles == 1 ? 0 : panel_words(depth, *kernels_) / 16;
  const int64_t step = group_ != 0 ? group_ : kBlockDepth;
  const int64_t steps = tiles * ((depth + step - 1) / step);
  int64_t done = 0, fetched = 0;
  for (int64_t k = 0; k < depth; k += step) {
    const int64_t block = k / kBlockDepth * kBlockDepth;
    const int32_t* panel;
    if (packed != nullptr) {
      panel = packed + words_of(k, *kernels_) * lanes;
    } else {
      int32_t* own = reinterpret_cast<int32_t*>(work);
      if (k == block) interleave(strip, k, std::min(kBlockDepth, depth - k), own);
      panel = own + words_of(k - block, *kernels_) * lanes;
    }
    const int64_t count = words_of(std::min(step, depth - k), *kernels_);
    for (int64_t i = 0; i < tiles; ++i) {
      // Tiles of nearly equal height: a last tile of one token would cost almost as much as a full one.
      const int64_t t = tokens * i / tiles, height = tokens * (i + 1) / tiles - t;
      for (const int64_t until = lines * ++done / steps; fetched < until; ++fetched) {
        __builtin_prefetch(ahead + fetched * 64, 0, 2);
      }
      const int32_t* row =
          reinterpret_cast<const int32_t*>(codes.data + code_bytes(first + t) + k * kernels_->code_size);
      int32_t* place = sums + t * strip_rows_;
      if (group_ != 0) {
        const Token* token = codes.token + (first + t) * groups_ + k / step;
        kernels_->group_tile(row, stride, static_cast<int>(height), panel, rows, count, token, groups_,
                             reinterpret_cast<float*>(place), k > 0);
      } else {
        kernels_->tile(row, stride, static_cast<int>(height), panel, rows, count, place, k > 0);
      }
    }
  }
}

void Stage::by_dots(const Codes& codes, int64_t first, int64_t tokens, const Strip& strip, int32_t* sums) const {
  const int64_t depth = product_.depth, step = kernels_->dot_tokens;
  for (int64_t r = 0; r < strip.rows; r += 4) {
    const int8_t* weight[4];
    for (int64_t i = 0; i < 4; ++i) {
      weight[i] = strip.part->weight + (strip.row + std::min(r + i, strip.rows - 1)) * depth;
    }
    for (int64_t t = 0; t < tokens; t += step) {
      const int64_t ahead = t == 0 ? 4 * depth : 0;
      const int count = static_cast<int>(std::min(step, tokens - t));
      const char* row = codes.data + code_bytes(first + t);
      int32_t* place = sums + t * kDotRows + r;
      if (group_ != 0) {
        kernels_->group_dot(weight, depth, group_, ahead, row, padded_, count, codes.token + (first + t) * groups_, groups_,
                            reinterpret_cast<float*>(place), kDotRows);
      } else {
        kernels_->dot(weight, depth, ahead, row, padded_, count, place, kDotRows);
      }
    }
  }
}

}  // namespace mq
