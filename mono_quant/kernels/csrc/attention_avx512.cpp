// Attention on AVX-512.
#include "common.h"

#ifdef MQ_X86
#define MQ_TARGET MQ_AVX512
#define MQ_LANES_512
namespace mq {
namespace {

// Rows of a tile, by its width in vectors: as many as registers hold.
constexpr int kWidest = 4;
constexpr int kTile[] = {0, 12, 12, 8, 6};
// Rows that meet keys where these lie, at most.
constexpr int kDirectRows = 4;

}  // namespace
}  // namespace mq

#include "attention_lanes.h"

namespace mq {

const AttentionKernels kAttentionAvx512 = {scratch, attend, attend_block, join};

}  // namespace mq
#endif
