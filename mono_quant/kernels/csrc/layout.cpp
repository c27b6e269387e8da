#include "layout.h"

#ifdef MQ_X86
#define MQ_TARGET MQ_AVX2
#include "words256.h"
#endif

#include <algorithm>

namespace mq {
namespace {

// One side of the square that is transposed at a time: its rows and columns stay in the first-level cache.
constexpr int64_t kBlock = 32;
// Elements moved below which another thread costs more than it brings.
constexpr int64_t kThreadWork = 1 << 15;

template <typename T>
void block_of(const T* source, int64_t rows, int64_t columns, int64_t source_stride, T* target, int64_t target_stride) {
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < columns; ++c) target[c * target_stride + r] = source[r * source_stride + c];
  }
}

#ifdef MQ_X86
MQ_AVX2 void transpose8(const uint32_t* source, int64_t source_stride, uint32_t* target, int64_t target_stride) {
  __m256i r[8];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) r[i] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(source + i * source_stride));
  transpose_words(r);
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) _mm256_storeu_si256(reinterpret_cast<__m256i*>(target + i * target_stride), r[i]);
}

MQ_AVX2 void block_of_words(const uint32_t* source, int64_t rows, int64_t columns, int64_t source_stride,
                            uint32_t* target, int64_t target_stride) {
  const int64_t whole_rows = rows / 8 * 8, whole_columns = columns / 8 * 8;
  for (int64_t c = 0; c < whole_columns; c += 8) {
    for (int64_t r = 0; r < whole_rows; r += 8) {
      transpose8(source + r * source_stride + c, source_stride, target + c * target_stride + r, target_stride);
    }
  }
  block_of(source + whole_columns, whole_rows, columns - whole_columns, source_stride,
           target + whole_columns * target_stride, target_stride);
  block_of(source + whole_rows * source_stride, rows - whole_rows, columns, source_stride, target + whole_rows,
           target_stride);
}
#endif

template <typename T>
void transpose_block(const T* source, int64_t rows, int64_t columns, int64_t source_stride, T* target,
                     int64_t target_stride, bool avx2) {
#ifdef MQ_X86
  if constexpr (sizeof(T) == 4) {
    if (avx2) return block_of_words(source, rows, columns, source_stride, target, target_stride);
  }
#endif
  (void)avx2;
  block_of(source, rows, columns, source_stride, target, target_stride);
}

template <typename T>
void transpose_all(const T* source, int64_t images, int64_t rows, int64_t columns, T* target, int threads) {
  const bool avx2 = runs(Isa::avx2);
  // The target is written along its rows, which are the columns of the source.
  const int64_t strips = (columns + kBlock - 1) / kBlock;
  const int64_t team = std::max<int64_t>(1, std::min<int64_t>(threads, images * rows * columns / kThreadWork));
#pragma omp parallel for num_threads(static_cast<int>(team)) schedule(static) if (team > 1)
  for (int64_t task = 0; task < images * strips; ++task) {
    const int64_t image = task / strips, c = task % strips * kBlock;
    const T* from = source + image * rows * columns;
    T* to = target + image * rows * columns;
    for (int64_t r = 0; r < rows; r += kBlock) {
      transpose_block(from + r * columns + c, std::min(kBlock, rows - r), std::min(kBlock, columns - c), columns,
                      to + c * rows + r, rows, avx2);
    }
  }
}

}  // namespace

void transpose(const void* source, int64_t images, int64_t rows, int64_t columns, int64_t size, void* target,
               int threads) {
  if (size == 4) {
    transpose_all(static_cast<const uint32_t*>(source), images, rows, columns, static_cast<uint32_t*>(target), threads);
  } else {
    transpose_all(static_cast<const uint16_t*>(source), images, rows, columns, static_cast<uint16_t*>(target), threads);
  }
}

}  // namespace mq
