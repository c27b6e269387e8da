// The gates of recurrent layers on AVX2.
#include "common.h"

#ifdef MQ_X86
#define MQ_TARGET MQ_AVX2
#define MQ_LANES_256
#include "gates.h"

namespace mq {

const GateKernels kGatesAvx2 = kGates;

}  // namespace mq
#endif
