// The float arithmetic of convolutions on AVX2.
#include "common.h"

#ifdef MQ_X86
#define MQ_TARGET MQ_AVX2
#define MQ_LANES_256
#include "conv_rows.h"

namespace mq {

const ConvKernels kConvAvx2 = kKernels;

}  // namespace mq
#endif
