// Float arithmetic between products on AVX-512.
#include "common.h"

#ifdef MQ_X86
#define MQ_TARGET MQ_AVX512
#define MQ_LANES_512
#include "float_rows.h"

namespace mq {
const FloatKernels kFloatsAvx512 = float_table();
}  // namespace mq
#endif
