// Norms, activations and what else happens to rows of floats between products: written once over lanes, included by the
// file of each instruction set; see lanes.h.
#include "floats.h"
#include "functions.h"

namespace mq {
namespace {

// Sums of this many vectors run side by side.
constexpr int kChains = 4;

MQ_LANE Lanes masked(Lanes x, int64_t n) { return choose(first_lanes(n), x, zeros()); }

// The sum of x - mean, or of its squares. The order of additions depends on n alone.
template <bool Squares>
MQ_TARGET float sum_of(const float* x, int64_t n, float mean) {
  const Lanes m = all(mean);
  Lanes sums[kChains] = {zeros(), zeros(), zeros(), zeros()};
  int64_t k = 0;
  for (; k + kChains * kLaneCount <= n; k += kChains * kLaneCount) {
#pragma GCC unroll 4
    for (int i = 0; i < kChains; ++i) {
      const Lanes d = sub(load(x + k + i * kLaneCount), m);
      sums[i] = Squares ? fma(d, d, sums[i]) : add(sums[i], d);
    }
  }
  for (; k < n; k += kLaneCount) {
    const Lanes d = masked(sub(load_first(x + k, n - k), m), n - k);
    sums[0] = Squares ? fma(d, d, sums[0]) : add(sums[0], d);
  }
  return total(add(add(sums[0], sums[1]), add(sums[2], sums[3])));
}

// Two passes: the squares are those of centred values, as in torch.
MQ_TARGET void norm_row(const Norm& norm, const float* x, int64_t n, float* out) {
  const float count = static_cast<float>(n);
  const float mean = norm.kind == NormKind::layer ? sum_of<false>(x, n, 0.0f) / count : 0.0f;
  const float variance = sum_of<true>(x, n, mean) / count;
  const Lanes m = all(mean), inverse = all(1.0f / __builtin_sqrtf(variance + static_cast<float>(norm.eps)));
  for (int64_t k = 0; k < n; k += kLaneCount) {
    const int64_t rest = n - k;
    Lanes v = mul(sub(load_first(x + k, rest), m), inverse);
    if (norm.weight != nullptr) v = mul(v, load_first(norm.weight + k, rest));
    if (norm.bias != nullptr) v = add(v, load_first(norm.bias + k, rest));
    store_first(out + k, v, rest);
  }
}

template <Act A>
MQ_LANE Lanes activated(Lanes x) {
  if constexpr (A == Act::gelu) return gelu(x);
  if constexpr (A == Act::gelu_tanh) return gelu_tanh(x);
  if constexpr (A == Act::silu) return silu(x);
  // NaN stays NaN: the second operand is returned
  if constexpr (A == Act::relu) return maximum(zeros(), x);
  return x;
}

template <Act A, bool Totals>
MQ_TARGET void finish_as(const Finish& f) {
  for (int64_t t = 0; t < f.tokens; ++t) {
    const Token token = f.token[t * f.token_stride];
    const Lanes token_scale = all(token.scale);
    const Ints correction = all_ints(token.correction);
    const int32_t* sums = f.sums + t * f.sums_stride;
    for (int64_t n = 0; n < f.columns; n += kLaneCount) {
      const int64_t rest = f.columns - n;
      const Lanes scale = load_first(f.weight_scale + n, rest);
      Lanes v;
      if constexpr (Totals) {
        v = mul(load_first(reinterpret_cast<const float*>(sums + n), rest), scale);
      } else {
        v = mul(to_lanes(add_ints(load_first_ints(sums + n, rest), correction)), mul(token_scale, scale));
      }
      if (f.bias != nullptr) v = add(v, load_first(f.bias + n, rest));
      v = activated<A>(v);
      if (f.factor != nullptr) v = mul(load_first(f.factor + t * f.factor_stride + n, rest), v);
      if (f.term != nullptr) v = add(v, load_first(f.term + t * f.term_stride + n, rest));
      store_first(f.out + t * f.out_stride + n, v, rest);
    }
  }
}

template <Act A>
void finish_for(const Finish& f) {
  f.totals ? finish_as<A, true>(f) : finish_as<A, false>(f);
}

void finish_row(const Finish& f) {
  switch (f.act) {
    case Act::gelu: return finish_for<Act::gelu>(f);
    case Act::gelu_tanh: return finish_for<Act::gelu_tanh>(f);
    case Act::silu: return finish_for<Act::silu>(f);
    case Act::relu: return finish_for<Act::relu>(f);
    default: return finish_for<Act::none>(f);
  }
}

MQ_TARGET void add_rows(const float* a, const float* b, int64_t n, float* out) {
  for (int64_t k = 0; k < n; k += kLaneCount) {
    store_first(out + k, add(load_first(a + k, n - k), load_first(b + k, n - k)), n - k);
  }
}

MQ_TARGET void rotate_row(const float* x, const float* cos, const float* sin, int64_t dim, float* out) {
  const int64_t half = dim / 2;
  for (int64_t k = 0; k < half; k += kLaneCount) {
    const int64_t rest = half - k;
    const Lanes a = load_first(x + k, rest), b = load_first(x + half + k, rest);
    const Lanes low = sub(mul(a, load_first(cos + k, rest)), mul(b, load_first(sin + k, rest)));
    const Lanes high = add(mul(b, load_first(cos + half + k, rest)), mul(a, load_first(sin + half + k, rest)));
    store_first(out + k, low, rest);
    store_first(out + half + k, high, rest);
  }
}

constexpr FloatKernels float_table() { return {norm_row, finish_row, add_rows, rotate_row}; }

}  // namespace
}  // namespace mq
