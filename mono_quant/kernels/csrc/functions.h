// The functions of float arithmetic that models need, over sixteen lanes; see lanes.h for why all paths give their bits.
#include "lanes.h"

namespace mq {
namespace {

// Below this e^x comes near subnormal numbers.
constexpr float kLowestExponent = -86.6f;

// e^x where that is a normal number; anything elsewhere, but NaN stays NaN. The polynomial is that of Cephes' expf.
MQ_LANE Lanes normal_exponential(Lanes x) {
  const Lanes n = nearest(mul(x, all(1.44269504f)));
  Lanes r = fnma(n, all(0.693359375f), x);
  r = fnma(n, all(-2.12194440e-4f), r);
  Lanes p = fma(all(1.9875691500e-4f), r, all(1.3981999507e-3f));
  p = fma(p, r, all(8.3334519073e-3f));
  p = fma(p, r, all(4.1665795894e-2f));
  p = fma(p, r, all(1.6666665459e-1f));
  p = fma(p, r, all(5.0000001201e-1f));
  p = fma(p, mul(r, r), add(r, all(1.0f)));
  return lanes_of(add_ints(bits_of(p), shift_left<23>(to_ints(n))));
}

// e^x within 1.2e-7 of it, relatively; 0 below -86.6, and e^88 above 88. NaN stays NaN.
MQ_LANE Lanes exponential(Lanes x) {
  const Lanes lowest = all(kLowestExponent);
  // NaN passes both: they return their second operand
  const Lanes bounded = minimum(all(88.0f), maximum(lowest, x));
  return choose(less(x, lowest), zeros(), normal_exponential(bounded));
}

// The same where no x is above 88.
MQ_LANE Lanes bounded_exponential(Lanes x) {
  return choose(less(x, all(kLowestExponent)), zeros(), normal_exponential(x));
}

// 1 / (1 + e^-x), within 2e-7 of it, relatively, down to -87; 6e-39 below -88.
MQ_LANE Lanes sigmoid(Lanes x) { return divide(all(1.0f), add(exponential(sub(zeros(), x)), all(1.0f))); }

// Within 2e-7 of it, relatively. The polynomial is that of Cephes' tanhf; beyond it 1 - 2 / (e^2x + 1) cancels little.
MQ_LANE Lanes hyperbolic_tangent(Lanes x) {
  const Lanes a = magnitude(x), z = mul(x, x);
  Lanes p = fma(all(-5.70498872745e-3f), z, all(2.06390887954e-2f));
  p = fma(p, z, all(-5.37397155531e-2f));
  p = fma(p, z, all(1.33314422036e-1f));
  p = fma(p, z, all(-3.33332819422e-1f));
  const Lanes near = fma(mul(p, z), x, x);
  const Lanes far = sub(all(1.0f), divide(all(2.0f), add(exponential(add(a, a)), all(1.0f))));
  const Lanes turned = choose(less(x, zeros()), sub(zeros(), far), far);
  return choose(less(a, all(0.625f)), near, turned);
}

// x / (1 + e^-u)
MQ_LANE Lanes gated(Lanes x, Lanes u) {
  return divide(x, add(exponential(sub(zeros(), u)), all(1.0f)));
}

MQ_LANE Lanes silu(Lanes x) { return gated(x, x); }

// The tanh form: x * sigmoid(2 sqrt(2 / pi) (x + 0.044715 x^3)).
MQ_LANE Lanes gelu_tanh(Lanes x) {
  return gated(x, mul(x, fma(mul(x, x), all(0.0713548163f), all(1.5957691216f))));
}

// x * Phi(x), with erfc after Abramowitz and Stegun 7.1.26: an absolute error of 1.5e-7 in it.
MQ_LANE Lanes gelu(Lanes x) {
  const Lanes a = magnitude(x);
  const Lanes z = mul(a, all(0.70710678f));
  const Lanes t = divide(all(1.0f), fma(z, all(0.3275911f), all(1.0f)));
  const Lanes e = exponential(mul(all(-0.5f), mul(x, x)));
  Lanes p = fma(all(1.061405429f), t, all(-1.453152027f));
  p = fma(p, t, all(1.421413741f));
  p = fma(p, t, all(-0.284496736f));
  p = fma(p, t, all(0.254829592f));
  const Lanes tail = mul(mul(mul(p, t), e), mul(a, all(0.5f)));
  return sub(maximum(zeros(), x), tail);
}

}  // namespace
}  // namespace mq
