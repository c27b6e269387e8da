// The gates of recurrent layers, over sixteen lanes; see lanes.h for why all paths give their bits.
//
// Included once per instruction set, with MQ_TARGET and the lanes chosen.
#include "functions.h"
#include "recurrent.h"

namespace mq {
namespace {

// The sum of both products in gate `g`, from value `k` on.
MQ_LANE Lanes gate_at(const Step& step, int64_t g, int64_t k) {
  const int64_t place = g * step.size + k, n = step.size - k;
  return add(load_first(step.given + place, n), load_first(step.recurrent + place, n));
}

MQ_LANE void put(const Step& step, int64_t k, Lanes output) {
  store_first(step.state + k, output, step.size - k);
  store_first(step.out + k, output, step.size - k);
}

MQ_TARGET void lstm(const Step& step) {
  for (int64_t k = 0; k < step.size; k += kLaneCount) {
    const Lanes entry = sigmoid(gate_at(step, 0, k)), forget = sigmoid(gate_at(step, 1, k));
    const Lanes candidate = hyperbolic_tangent(gate_at(step, 2, k));
    const Lanes kept = mul(forget, load_first(step.cells + k, step.size - k));
    const Lanes cells = fma(entry, candidate, kept);
    store_first(step.cells + k, cells, step.size - k);
    put(step, k, mul(sigmoid(gate_at(step, 3, k)), hyperbolic_tangent(cells)));
  }
}

MQ_TARGET void gru(const Step& step) {
  for (int64_t k = 0; k < step.size; k += kLaneCount) {
    const int64_t place = 2 * step.size + k, n = step.size - k;
    const Lanes reset = sigmoid(gate_at(step, 0, k)), update = sigmoid(gate_at(step, 1, k));
    const Lanes recurrent = load_first(step.recurrent + place, n);
    const Lanes fresh = hyperbolic_tangent(fma(reset, recurrent, load_first(step.given + place, n)));
    put(step, k, fma(update, sub(load_first(step.state + k, n), fresh), fresh));
  }
}

MQ_TARGET void tanh_step(const Step& step) {
  for (int64_t k = 0; k < step.size; k += kLaneCount) put(step, k, hyperbolic_tangent(gate_at(step, 0, k)));
}

MQ_TARGET void relu_step(const Step& step) {
  for (int64_t k = 0; k < step.size; k += kLaneCount) put(step, k, maximum(zeros(), gate_at(step, 0, k)));
}

constexpr GateKernels kGates = {lstm, gru, tanh_step, relu_step};

}  // namespace
}  // namespace mq
