// The float arithmetic of convolutions on AVX-512.
#include "common.h"

#ifdef MQ_X86
#define MQ_TARGET MQ_AVX512
#define MQ_LANES_512
#include "conv_rows.h"

namespace mq {

const ConvKernels kConvAvx512 = kKernels;

}  // namespace mq
#endif
