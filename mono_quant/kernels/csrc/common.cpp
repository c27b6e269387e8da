#include "common.h"

#include <cstdlib>

#ifdef MQ_X86
#include <cpuid.h>
#endif

namespace mq {

Scratch::~Scratch() { std::free(data_); }

void* Scratch::reserve(size_t bytes) {
  if (bytes > size_ || data_ == nullptr) {
    std::free(data_);
    // never nothing: null means that there is no memory
    size_ = round_up(static_cast<int64_t>(bytes) + 1, 4096);
    data_ = std::aligned_alloc(64, size_);
    if (data_ == nullptr) size_ = 0;
  }
  return data_;
}

#ifdef MQ_HAS_AVXVNNI
// __builtin_cpu_supports knows the name from GCC 12 on only. Vectors of 256 bits are what AVX2 asks the system for.
static bool has_avxvnni() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid_count(7, 1, &a, &b, &c, &d) != 0 && (a >> 4 & 1) != 0;
}
#endif

bool runs(Isa isa) {
  if (isa == Isa::portable) return true;
#ifdef MQ_X86
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  if (isa == Isa::avx2) return avx2;
#ifdef MQ_HAS_AVXVNNI
  if (isa == Isa::avxvnni) return avx2 && has_avxvnni();
#endif
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (isa == Isa::avx512) return avx512;
  if (isa == Isa::avx512vnni || isa == Isa::avx512vl_vnni) return avx512 && __builtin_cpu_supports("avx512vnni");
#endif
  return false;
}

namespace {

uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

float half_to_float(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000) << 16;
  const uint32_t rest = half & 0x7fff;
  if (rest >= 0x7c00) return float_of(sign | 0x7f800000 | (rest & 0x3ff) << 13);
  // Scaling by 2^112 moves the exponent bias from 15 to 127 and makes subnormals normal, exactly.
  return float_of(sign | bits_of(float_of(rest << 13) * 0x1p112f));
}

uint16_t float_to_half(float value) {
  const uint32_t bits = bits_of(value);
  const uint32_t sign = bits >> 16 & 0x8000;
  const uint32_t rest = bits & 0x7fffffff;
  if (rest > 0x7f800000) return sign | 0x7e00;
  if (rest >= 0x477ff000) return sign | 0x7c00;
  if (rest < 0x38800000) {
    // Adding 0.5 aligns the last bit of the sum with the last bit of a half subnormal; the sum rounds to even.
    return sign | (bits_of(float_of(rest) + 0.5f) - 0x3f000000);
  }
  return sign | ((rest + 0xfff + (rest >> 13 & 1) - 0x38000000) >> 13);
}

uint16_t float_to_bfloat(float value) {
  const uint32_t bits = bits_of(value);
  if ((bits & 0x7fffffff) > 0x7f800000) return (bits >> 16) | 0x40;
  return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

}  // namespace

float to_float(const void* source, DType dtype) {
  if (dtype == DType::f32) {
    float value;
    std::memcpy(&value, source, 4);
    return value;
  }
  uint16_t half;
  std::memcpy(&half, source, 2);
  return dtype == DType::f16 ? half_to_float(half) : float_of(static_cast<uint32_t>(half) << 16);
}

void to_floats(const void* source, DType dtype, int64_t n, float* target) {
  const char* in = static_cast<const char*>(source);
  for (int64_t i = 0; i < n; ++i) target[i] = to_float(in + i * size_of(dtype), dtype);
}

void from_float(float value, void* target, DType dtype) {
  if (dtype == DType::f32) {
    std::memcpy(target, &value, 4);
    return;
  }
  const uint16_t half = dtype == DType::f16 ? float_to_half(value) : float_to_bfloat(value);
  std::memcpy(target, &half, 2);
}

}  // namespace mq
