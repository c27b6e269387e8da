// Attention on AVX2.
#include "common.h"

#ifdef MQ_X86
#define MQ_TARGET MQ_AVX2
#define MQ_LANES_256
namespace mq {
namespace {

// Rows of a tile, by its width in vectors: as many as registers hold.
constexpr int kWidest = 1;
constexpr int kTile[] = {0, 6};
// Rows that meet keys where these lie, at most.
constexpr int kDirectRows = 4;

}  // namespace
}  // namespace mq

#include "attention_lanes.h"

namespace mq {

const AttentionKernels kAttentionAvx2 = {scratch, attend, attend_block, join};

}  // namespace mq
#endif
