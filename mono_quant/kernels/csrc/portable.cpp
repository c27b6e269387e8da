// Plain C++ for processors without a path of their own.
#include <cmath>
#include <limits>

#include "common.h"

namespace mq {
namespace {

template <typename Code>
int32_t write_codes(const void* row, DType dtype, int64_t depth, float inverse, Code* codes) {
  const char* in = static_cast<const char*>(row);
  const int64_t size = size_of(dtype);
  int32_t sum = 0;
  for (int64_t k = 0; k < depth; ++k) {
    codes[k] = static_cast<Code>(std::nearbyint(to_float(in + k * size, dtype) * inverse));
    sum += codes[k];
  }
  return sum;
}

Token quantize_part(const void* row, DType dtype, int64_t depth, int64_t padded, int qmax, int code_size, void* codes) {
  const char* in = static_cast<const char*>(row);
  const int64_t size = size_of(dtype);
  float absmax = 0;
  bool finite = true;
  for (int64_t k = 0; k < depth; ++k) {
    const float magnitude = std::fabs(to_float(in + k * size, dtype));
    finite = finite && magnitude <= std::numeric_limits<float>::max();
    absmax = magnitude > absmax ? magnitude : absmax;
  }
  std::memset(codes, 0, padded * code_size);
  if (!finite) return {std::numeric_limits<float>::quiet_NaN(), 0};
  const float limit = static_cast<float>(qmax);
  // Below this the scale would be subnormal: the row counts as zero.
  if (absmax < limit * 0x1p-126f) return {0, 0};
  const float inverse = limit / absmax;
  const int32_t sum = code_size == 1 ? write_codes(row, dtype, depth, inverse, static_cast<int8_t*>(codes))
                                     : write_codes(row, dtype, depth, inverse, static_cast<int16_t*>(codes));
  return {absmax / limit, static_cast<int32_t>(-128 * static_cast<int64_t>(sum))};
}

void quantize(const void* row, DType dtype, int64_t depth, int64_t padded, int64_t group, int qmax, int code_size,
              void* codes, Token* token) {
  const int64_t step = group == 0 ? padded : group;
  for (int64_t k = 0; k == 0 || k < depth; k += step) {
    const bool last = k + step >= depth;
    *token++ = quantize_part(static_cast<const char*>(row) + k * size_of(dtype), dtype, last ? depth - k : step,
                             last ? padded - k : step, qmax, code_size, static_cast<char*>(codes) + k * code_size);
  }
}

void finish_totals(const Tile& tile) {
  const int64_t size = size_of(tile.dtype);
  for (int64_t t = 0; t < tile.tokens; ++t) {
    const float* totals = reinterpret_cast<const float*>(tile.sums) + t * tile.sums_stride;
    for (int64_t n = 0; n < tile.columns; ++n) {
      float value = totals[n] * tile.weight_scale[n];
      if (tile.bias != nullptr) value += tile.bias[n];
      from_float(value, tile.out_row(t) + n * size, tile.dtype);
    }
  }
}

void finish(const Tile& tile) {
  const int64_t size = size_of(tile.dtype);
  for (int64_t t = 0; t < tile.tokens; ++t) {
    const int32_t* sums = tile.sums + t * tile.sums_stride;
    const Token token = tile.token[t];
    for (int64_t n = 0; n < tile.columns; ++n) {
      const int32_t sum = static_cast<int32_t>(static_cast<uint32_t>(sums[n]) + static_cast<uint32_t>(token.correction));
      float value = static_cast<float>(sum) * (token.scale * tile.weight_scale[n]);
      if (tile.bias != nullptr) value += tile.bias[n];
      from_float(value, tile.out_row(t) + n * size, tile.dtype);
    }
  }
}

void dot(const int8_t* const weight[4], int64_t depth, int64_t, const void* codes, int64_t stride, int tokens,
         int32_t* sums, int64_t sums_stride) {
  for (int t = 0; t < tokens; ++t) {
    const int16_t* token = static_cast<const int16_t*>(codes) + t * stride;
    for (int r = 0; r < 4; ++r) {
      int32_t sum = 0;
      for (int64_t k = 0; k < depth; ++k) {
        sum = static_cast<int32_t>(static_cast<uint32_t>(sum) + static_cast<uint32_t>(token[k] * weight[r][k]));
      }
      sums[t * sums_stride + r] = sum;
    }
  }
}

void group_dot(const int8_t* const weight[4], int64_t depth, int64_t group, int64_t, const void* codes, int64_t stride,
               int tokens, const Token* token, int64_t token_stride, float* totals, int64_t totals_stride) {
  for (int64_t k = 0, g = 0; k < depth; k += group, ++g) {
    const int8_t* const part[4] = {weight[0] + k, weight[1] + k, weight[2] + k, weight[3] + k};
    int32_t sums[4 * 4];
    const int64_t here = k + group < depth ? group : depth - k;
    dot(part, here, 0, static_cast<const int16_t*>(codes) + k, stride, tokens, sums, 4);
    for (int t = 0; t < tokens; ++t) {
      float* total = totals + t * totals_stride;
      for (int r = 0; r < 4; ++r) {
        const float value = static_cast<float>(sums[4 * t + r]) * token[t * token_stride + g].scale;
        total[r] = g == 0 ? value : total[r] + value;
      }
    }
  }
}

}  // namespace

const RowKernels kRowsPortable = {quantize, finish, finish_totals};
const ProductKernels kProductPortable = {2,       1,       0,   0,       4,        0, 0, 0, false,
                                         nullptr, nullptr, dot, nullptr, group_dot};

}  // namespace mq
