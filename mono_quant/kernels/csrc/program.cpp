#include "program.h"

namespace mq {

bool copy_rows(const CopyRows& copy) {
  for (int64_t t = 0; copy.index != nullptr && t < copy.tokens; ++t) {
    if (copy.index[t] < 0 || copy.index[t] >= copy.rows) return false;
  }
  for (int64_t b = 0; b < copy.batch; ++b) {
    for (int64_t h = 0; h < copy.heads; ++h) {
      const char* source = copy.source + b * copy.source_batch + h * copy.source_head;
      char* target = copy.target + b * copy.target_batch + h * copy.target_head;
      for (int64_t t = 0; t < copy.tokens; ++t) {
        const int64_t row = copy.index == nullptr ? t : copy.index[t];
        std::memcpy(target + row * copy.target_row, source + t * copy.source_row, copy.bytes);
      }
    }
  }
  return true;
}

void add_longs(const AddLongs& add) {
  for (int64_t i = 0; i < add.count; ++i) {
    const uint64_t other = add.b == nullptr ? 0 : static_cast<uint64_t>(add.b[i * add.b_step]);
    add.out[i] = static_cast<int64_t>(static_cast<uint64_t>(add.a[i * add.a_step]) + other + static_cast<uint64_t>(add.constant));
  }
}

}  // namespace mq
