#include "convert.h"

#ifdef MQ_X86
#include <algorithm>
#include <cmath>
#include <limits>

#include "avx2_rows.h"

namespace mq {
namespace {

// Values below which another thread costs more than it brings.
constexpr int64_t kThreadWork = 1 << 15;

int thread_count(int threads, int64_t work) {
  return static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(threads, work / kThreadWork)));
}

float round_scale(float scale, DType dtype) {
  // Rounded to a float16 subnormal, a scale would lose most of its bits.
  if (dtype == DType::f32 || (dtype == DType::f16 && scale < 0x1p-14f)) return scale;
  uint16_t half;
  from_float(scale, &half, dtype);
  const float rounded = to_float(&half, dtype);
  return std::isinf(rounded) ? scale : rounded;
}

// The scale below `scale` where 127 times it, rounded up, is infinite: next to the largest float.
float finite_scale(float scale, DType dtype) {
  if (!std::isinf(scale * 127.0f)) return scale;
  const float epsilon = dtype == DType::f32 ? 0x1p-23f : dtype == DType::f16 ? 0x1p-10f : 0x1p-7f;
  return round_scale(scale * (1.0f - epsilon), dtype);
}

// Sums of squares in units of the scale: they can neither overflow nor vanish in fp32.
struct Energy {
  __m256 signal, noise;
};

MQ_AVX2 MQ_INLINE double total(__m256 v) {
  const __m256d low = _mm256_cvtps_pd(_mm256_castps256_ps128(v)), high = _mm256_cvtps_pd(_mm256_extractf128_ps(v, 1));
  const __m256d sum = _mm256_add_pd(low, high);
  const __m128d s = _mm_add_pd(_mm256_castpd256_pd128(sum), _mm256_extractf128_pd(sum, 1));
  return _mm_cvtsd_f64(s) + _mm_cvtsd_f64(_mm_unpackhi_pd(s, s));
}

template <DType D>
MQ_AVX2 MQ_INLINE __m256i encode8(const void* row, int64_t k, __m256 scale, Energy* energy) {
  const __m256 x = _mm256_div_ps(load8<D>(row, k), scale);
  const __m256 limit = _mm256_set1_ps(127.0f), sign = _mm256_set1_ps(-0.0f);
  __m256 q = _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  // A scale that was rounded down leaves values beyond 127.
  q = _mm256_max_ps(_mm256_min_ps(q, limit), _mm256_or_ps(limit, sign));
  const __m256 error = _mm256_sub_ps(x, q);
  energy->signal = _mm256_fmadd_ps(x, x, energy->signal);
  energy->noise = _mm256_fmadd_ps(error, error, energy->noise);
  return _mm256_cvtps_epi32(q);
}

template <DType D>
MQ_AVX2 MQ_INLINE void encode32(const void* row, int64_t k, __m256 scale, int8_t* codes, Energy* energy) {
  const __m256i a = encode8<D>(row, k, scale, energy), b = encode8<D>(row, k + 8, scale, energy);
  const __m256i c = encode8<D>(row, k + 16, scale, energy), d = encode8<D>(row, k + 24, scale, energy);
  const __m256i packed = _mm256_packs_epi16(_mm256_packs_epi32(a, b), _mm256_packs_epi32(c, d));
  const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(codes), _mm256_permutevar8x32_epi32(packed, order));
}

// Values whose squares are summed in fp32 before the sum moves on to double.
constexpr int64_t kEnergyBlock = 16 * kBlock;

// The row after this one, at `next`, is on its way to the cache meanwhile.
template <DType D>
MQ_AVX2 void encode_row(const void* row, const char* next, int64_t depth, float scale_value, int8_t* codes,
                        double* sums) {
  const __m256 scale = _mm256_set1_ps(scale_value);
  double signal = 0, noise = 0;
  for (int64_t k = 0; k < depth;) {
    Energy energy = {_mm256_setzero_ps(), _mm256_setzero_ps()};
    const int64_t end = std::min(depth, k + kEnergyBlock);
    for (; k + kBlock <= end; k += kBlock) {
      for (int64_t byte = 0; byte < kBlock * size_of(D); byte += 64) _mm_prefetch(next + k * size_of(D) + byte, _MM_HINT_T1);
      encode32<D>(row, k, scale, codes + k, &energy);
    }
    if (k < end) {
      const Tail<D> tail(row, k, depth);
      int8_t rest[kBlock];
      encode32<D>(tail.data, 0, scale, rest, &energy);
      std::memcpy(codes + k, rest, end - k);
      k = end;
    }
    signal += total(energy.signal);
    noise += total(energy.noise);
  }
  const double unit = static_cast<double>(scale_value) * scale_value;
  sums[0] = signal * unit;
  sums[1] = noise * unit;
}

// The sum of squares of a row whose squares vanish in fp32.
template <DType D>
double tiny_energy(const void* row, int64_t depth) {
  double sum = 0;
  for (int64_t k = 0; k < depth; ++k) {
    const double x = to_float(static_cast<const char*>(row) + k * size_of(D), D);
    sum += x * x;
  }
  return sum;
}

template <DType D>
void quantize_weight_row(const QuantizeRows& job, int64_t n) {
  const void* row = job.x.at(n);
  int8_t* codes = job.codes + n * job.depth;
  double* sums = job.energy + 2 * n;
  const uint32_t bits = absmax_bits<D>(row, job.depth);
  float absmax;
  std::memcpy(&absmax, &bits, 4);
  const bool finite = bits < 0x7f800000u;
  if (!finite) {
    std::memset(codes, 0, job.depth);
    job.scale[n] = std::numeric_limits<float>::quiet_NaN();
    sums[0] = sums[1] = 0;
    return;
  }
  const float scale = finite_scale(round_scale(absmax / 127.0f, job.scale_dtype), job.scale_dtype);
  // A row of zeros, or so small that its scale would be subnormal.
  if (scale < std::numeric_limits<float>::min()) {
    std::memset(codes, 0, job.depth);
    job.scale[n] = 1;
    sums[0] = sums[1] = absmax == 0 ? 0 : tiny_energy<D>(row, job.depth);
    return;
  }
  job.scale[n] = scale;
  encode_row<D>(row, static_cast<const char*>(job.x.at(n + 1)), job.depth, scale, codes, sums);
}

// Elements of one task of a cast.
constexpr int64_t kCastBlock = 1 << 14;

MQ_AVX2 MQ_INLINE __m256i count(__m256i sum, __m256i mask) { return _mm256_sub_epi32(sum, mask); }

MQ_AVX2 MQ_INLINE int64_t total(__m256i v) {
  alignas(32) int32_t lanes[8];
  _mm256_store_si256(reinterpret_cast<__m256i*>(lanes), v);
  int64_t sum = 0;
  for (int32_t lane : lanes) sum += lane;
  return sum;
}

struct Counters {
  __m256i overflowed, clamped, flushed, nonfinite;
};

// Magnitudes compare like signed integers: their sign bit is clear.
template <DType D>
MQ_AVX2 MQ_INLINE __m128i cast8(const void* source, int64_t i, Counters* c) {
  const __m256 x = load8<D>(source, i);
  const __m256i m = _mm256_and_si256(_mm256_castps_si256(x), _mm256_set1_epi32(0x7fffffff));
  const __m256i nonfinite = _mm256_cmpgt_epi32(m, _mm256_set1_epi32(0x7f7fffff));
  const __m256i overflow = _mm256_cmpgt_epi32(m, _mm256_set1_epi32(0x477fefff));  // >= 65520
  const __m256i large = _mm256_cmpgt_epi32(m, _mm256_set1_epi32(0x477fe000));     // > 65504
  const __m256i nonzero = _mm256_cmpgt_epi32(m, _mm256_setzero_si256());
  const __m256i tiny = _mm256_cmpgt_epi32(_mm256_set1_epi32(0x33000001), m);  // <= 2^-25
  c->nonfinite = count(c->nonfinite, nonfinite);
  c->overflowed = count(c->overflowed, _mm256_andnot_si256(nonfinite, overflow));
  c->clamped = count(c->clamped, _mm256_andnot_si256(overflow, large));
  c->flushed = count(c->flushed, _mm256_and_si256(nonzero, tiny));
  return _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT);
}

template <DType D>
MQ_AVX2 void cast_block(const void* source, int64_t n, void* target, HalfCounts* counts) {
  const __m256i zero = _mm256_setzero_si256();
  Counters c = {zero, zero, zero, zero};
  uint16_t* out = static_cast<uint16_t*>(target);
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) _mm_storeu_si128(reinterpret_cast<__m128i*>(out + i), cast8<D>(source, i, &c));
  if (i < n) {
    const Tail<D> tail(source, i, n);
    uint16_t rest[8];
    _mm_storeu_si128(reinterpret_cast<__m128i*>(rest), cast8<D>(tail.data, 0, &c));
    std::memcpy(out + i, rest, (n - i) * 2);
  }
  counts->overflowed += total(c.overflowed);
  counts->clamped += total(c.clamped);
  counts->flushed += total(c.flushed);
  counts->nonfinite += total(c.nonfinite);
}

template <DType D>
MQ_AVX2 void dequantize_row(const int8_t* row, float scale_value, int64_t depth, void* out) {
  const __m256 scale = _mm256_set1_ps(scale_value);
  int64_t k = 0;
  for (; k + 8 <= depth; k += 8) {
    const __m256i codes = _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(row + k)));
    store8<D>(_mm256_mul_ps(_mm256_cvtepi32_ps(codes), scale), out, k);
  }
  for (; k < depth; ++k) {
    from_float(static_cast<float>(row[k]) * scale_value, static_cast<char*>(out) + k * size_of(D), D);
  }
}

}  // namespace

void quantize_rows(const QuantizeRows& job) {
  const auto run = job.x.dtype == DType::f16    ? quantize_weight_row<DType::f16>
                   : job.x.dtype == DType::bf16 ? quantize_weight_row<DType::bf16>
                                                : quantize_weight_row<DType::f32>;
  const int threads = thread_count(job.threads, job.rows * job.depth);
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
  for (int64_t n = 0; n < job.rows; ++n) run(job, n);
}

HalfCounts to_half(const void* source, DType dtype, int64_t n, void* target, int threads) {
  const auto run = dtype == DType::bf16 ? cast_block<DType::bf16> : cast_block<DType::f32>;
  const int count = thread_count(threads, n);
  int64_t overflowed = 0, clamped = 0, flushed = 0, nonfinite = 0;
#pragma omp parallel for num_threads(count) schedule(static) if (count > 1) \
    reduction(+ : overflowed, clamped, flushed, nonfinite)
  for (int64_t i = 0; i < n; i += kCastBlock) {
    HalfCounts counts = {};
    run(static_cast<const char*>(source) + i * size_of(dtype), std::min(kCastBlock, n - i),
        static_cast<uint16_t*>(target) + i, &counts);
    overflowed += counts.overflowed, clamped += counts.clamped;
    flushed += counts.flushed, nonfinite += counts.nonfinite;
  }
  return {overflowed, clamped, flushed, nonfinite};
}

bool gather_rows(const int64_t* index, int64_t count, const int8_t* table, const float* scale, int64_t rows,
                 int64_t depth, void* out, DType dtype, int threads) {
  for (int64_t i = 0; i < count; ++i) {
    if (index[i] < 0 || index[i] >= rows) return false;
  }
  const auto run = dtype == DType::f16    ? dequantize_row<DType::f16>
                   : dtype == DType::bf16 ? dequantize_row<DType::bf16>
                                          : dequantize_row<DType::f32>;
  const int team = thread_count(threads, count * depth);
#pragma omp parallel for num_threads(team) schedule(static) if (team > 1)
  for (int64_t i = 0; i < count; ++i) {
    run(table + index[i] * depth, scale[index[i]], depth, static_cast<char*>(out) + i * depth * size_of(dtype));
  }
  return true;
}

}  // namespace mq
#endif
