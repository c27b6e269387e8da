// Recurrent layers over time: the product with the last output, then the gates, step after step in one call.
#pragma once

#include "linear.h"

namespace mq {

enum class Cell : int { lstm = 0, gru = 1, tanh = 2, relu = 3 };

inline int64_t gates_of(Cell cell) { return cell == Cell::lstm ? 4 : cell == Cell::gru ? 3 : 1; }

// One step of some sequences; all are rows of `size` values, or of all gates side by side.
struct Step {
  int64_t size;
  // Products of the input and of the last output [gates * size], with their biases.
  const float* given;
  const float* recurrent;
  // Old in, new out; only an LSTM has cells.
  float* state;
  float* cells;
  float* out;
};

// As torch has them: gates in the order input, forget, cell, output, and reset, update, new.
struct GateKernels {
  void (*lstm)(const Step& step);
  void (*gru)(const Step& step);
  void (*tanh)(const Step& step);
  void (*relu)(const Step& step);
};

extern const GateKernels kGatesPortable, kGatesAvx2, kGatesAvx512;

struct Sequence {
  Cell cell;
  // Sequences at each step, never more than at the one before; the steps lie one after another in `given` and `out`.
  int64_t steps;
  const int64_t* sizes;
  bool backward;
  const float* given;
  // [sizes[0], size] each: the initial states become the last ones.
  float* state;
  float* cells;
  float* out;
  int64_t out_stride;
  // The product with the last output; tokens, inputs and outputs of it are set here.
  Linear product;
};

// False where there is no memory.
bool run_sequence(const Sequence& sequence);

}  // namespace mq
