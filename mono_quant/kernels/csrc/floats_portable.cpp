// Float arithmetic between products for processors without a path of their own.
#define MQ_TARGET
#define MQ_LANES_ARRAY
#include "float_rows.h"

namespace mq {

const FloatKernels kFloatsPortable = float_table();

}  // namespace mq
