#include "floats.h"

#include <algorithm>

namespace mq {
namespace {

// Values below which another thread costs more than it brings.
constexpr int64_t kThreadWork = 1 << 15;

int threads_for(int threads, int64_t work) {
  return static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(threads, work / kThreadWork)));
}

}  // namespace

const FloatKernels& float_kernels(Isa isa) {
#ifdef MQ_X86
  switch (isa) {
    case Isa::avx512vnni:
    case Isa::avx512: return kFloatsAvx512;
    case Isa::avx512vl_vnni:
    case Isa::avxvnni:
    case Isa::avx2: return kFloatsAvx2;
    default: break;
  }
#endif
  (void)isa;
  return kFloatsPortable;
}

void norm_rows(Isa isa, const Norm& norm, int64_t rows, int64_t n, const float* x, const float* residual, float* sum,
               float* out, int threads) {
  const FloatKernels& kernels = float_kernels(isa);
  const int team = threads_for(threads, rows * n);
#pragma omp parallel for num_threads(team) schedule(static) if (team > 1)
  for (int64_t i = 0; i < rows; ++i) {
    const float* row = x + i * n;
    if (residual != nullptr) {
      kernels.add(row, residual + i * n, n, sum + i * n);
      row = sum + i * n;
    }
    kernels.norm(norm, row, n, out + i * n);
  }
}

void rotate(Isa isa, const int64_t shape[4], const int64_t strides[3], const float* x, const float* cos,
            const float* sin, int64_t angle_stride, float* out, int threads) {
  const FloatKernels& kernels = float_kernels(isa);
  const int64_t heads = shape[1], tokens = shape[2], dim = shape[3];
  const int team = threads_for(threads, shape[0] * heads * tokens * dim);
#pragma omp parallel for num_threads(team) schedule(static) if (team > 1)
  for (int64_t i = 0; i < shape[0] * tokens; ++i) {
    const int64_t b = i / tokens, t = i % tokens;
    const int64_t angle = b * angle_stride + t * dim;
    for (int64_t h = 0; h < heads; ++h) {
      kernels.rotate(x + b * strides[0] + h * strides[1] + t * strides[2], cos + angle, sin + angle, dim,
                     out + (i * heads + h) * dim);
    }
  }
}

}  // namespace mq
