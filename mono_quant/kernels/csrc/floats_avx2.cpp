// Float arithmetic between products on AVX2.
#include "common.h"

#ifdef MQ_X86
#define MQ_TARGET MQ_AVX2
#define MQ_LANES_256
#include "float_rows.h"

namespace mq {
const FloatKernels kFloatsAvx2 = float_table();
}  // namespace mq
#endif
