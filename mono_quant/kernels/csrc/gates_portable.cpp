// The gates of recurrent layers in plain C++.
#define MQ_TARGET
#define MQ_LANES_ARRAY
#include "gates.h"

namespace mq {

const GateKernels kGatesPortable = kGates;

}  // namespace mq
