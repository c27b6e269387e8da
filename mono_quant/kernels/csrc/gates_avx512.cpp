// The gates of recurrent layers on AVX-512.
#include "common.h"

#ifdef MQ_X86
#define MQ_TARGET MQ_AVX512
#define MQ_LANES_512
#include "gates.h"

namespace mq {

const GateKernels kGatesAvx512 = kGates;

}  // namespace mq
#endif
