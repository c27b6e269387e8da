// 8-bit codes on AVX-VNNI.
#include "common.h"

#ifdef MQ_HAS_AVXVNNI
#define MQ_TARGET MQ_AVXVNNI
#define MQ_DPBUSD _mm256_dpbusd_avx_epi32
#define MQ_KERNELS kProductAvxVnni
#include "avxvnni.h"
#endif
