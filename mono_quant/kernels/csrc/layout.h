// Changing the order of dimensions in memory.
#pragma once

#include "common.h"

namespace mq {

// target[i][c][r] = source[i][r][c] for `images` matrices [rows, columns] of elements of 2 or 4 bytes.
void transpose(const void* source, int64_t images, int64_t rows, int64_t columns, int64_t size, void* target,
               int threads);

}  // namespace mq
