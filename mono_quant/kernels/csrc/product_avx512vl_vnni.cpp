// The kernels of AVX-VNNI in the encoding of AVX-512, for tests.
#include "common.h"

#ifdef MQ_X86
#define MQ_TARGET MQ_VNNI
#define MQ_DPBUSD _mm256_dpbusd_epi32
#define MQ_KERNELS kProductAvx512VlVnni
#include "avxvnni.h"
#endif
