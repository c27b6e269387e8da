// The hot loops of converting a checkpoint, and the gather of an int8 embedding.
#pragma once

#include "common.h"

namespace mq {

// What a cast to float16 lost.
struct HalfCounts {
  int64_t overflowed, clamped, flushed, nonfinite;
};

// Row by row: scale = absmax / 127 rounded to `scale_dtype`, codes = rint(x / scale). A row of zeros has scale 1; a
// row with NaN or infinity has scale NaN and codes 0. `energy` gets the sums of x^2 and of (x - code * scale)^2.
struct QuantizeRows {
  Matrix x;
  int64_t rows, depth;
  DType scale_dtype;
  int8_t* codes;
  float* scale;
  double* energy;
  int threads;
};

void quantize_rows(const QuantizeRows& job);
HalfCounts to_half(const void* source, DType dtype, int64_t n, void* target, int threads);
// out[i] = table[index[i]] * scale[index[i]]; false when an index is out of range.
bool gather_rows(const int64_t* index, int64_t count, const int8_t* table, const float* scale, int64_t rows,
                 int64_t depth, void* out, DType dtype, int threads);

}  // namespace mq
