// Attention without vectors.
#include "common.h"

#define MQ_TARGET 
#define MQ_LANES_ARRAY
namespace mq {
namespace {

// Rows of a tile, by its width in vectors: as many as registers hold.
constexpr int kWidest = 1;
constexpr int kTile[] = {0, 4};
// Keys are always laid out: unrolled for no vectors, the other way takes a compiler too long.
constexpr int kDirectRows = 0;

}  // namespace
}  // namespace mq

#include "attention_lanes.h"

namespace mq {

const AttentionKernels kAttentionPortable = {scratch, attend, attend_block, join};

}  // namespace mq
