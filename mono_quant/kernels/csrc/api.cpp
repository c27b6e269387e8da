// The C interface. Pointers, sizes and strides only: no dependency on Python or torch, loaded with ctypes.
#include "attention.h"
#include "chain.h"
#include "convert.h"
#include "fused_conv.h"
#include "layout.h"
#include "linear.h"
#include "program.h"
#include "recurrent.h"

#include <omp.h>

using namespace mq;

#define MQ_API extern "C" __attribute__((visibility("default")))

namespace {

bool known(int dtype) { return dtype >= 0 && dtype <= 2; }

bool fits(int qmax, int64_t group) { return qmax >= 1 && qmax <= 2047 && group >= 0 && group % kDepthAlign == 0; }

bool known_product(const Chain& chain, const Product& product, int64_t first) {
  if (product.parts == 0) return true;
  if (product.parts < 0 || product.depth < 0 || !fits(static_cast<int>(product.qmax), product.group)) return false;
  int64_t rows = 0;
  for (int64_t i = 0; i < product.parts; ++i) {
    if (chain.parts[first + i].rows < 0) return false;
    rows += chain.parts[first + i].rows;
  }
  return rows == product.rows;
}

}  // namespace

// Changes whenever a signature or a meaning below does.
MQ_API int mq_version() { return 4; }

// One bit per Isa that this processor runs.
MQ_API int mq_isas() {
  int mask = 0;
  for (int isa = 0; isa <= static_cast<int>(Isa::avx512vnni); ++isa) {
    if (runs(static_cast<Isa>(isa))) mask |= 1 << isa;
  }
  return mask;
}

// x [tokens, depth], weight int8 [rows, depth], weight_scale fp32 [rows], bias [rows] or null, out [tokens, rows] in
// the dtype of x; strides in elements, last dimensions dense. `group` values of a token share a scale, all for 0;
// `packed`
// is null or what mq_pack made of the weights for the same isa and qmax. Returns 0, 1 (no kernel or no memory) or 2
// (bad
// argument).
MQ_API int mq_linear(int isa, int qmax, int64_t group, int threads, int64_t tokens, int64_t rows, int64_t depth,
                     const void* x, int x_dtype, int64_t x_stride, const int8_t* weight, const int32_t* packed,
                     const float* weight_scale, const void* bias, int bias_dtype, void* out, int64_t out_stride) {
  if (tokens < 0 || rows < 0 || depth < 0 || !known(x_dtype) || !known(bias_dtype) || !fits(qmax, group)) return 2;
  if (tokens == 0 || rows == 0) return 0;
  Linear layer = {};
  layer.isa = static_cast<Isa>(isa);
  layer.qmax = qmax;
  layer.group = group < depth ? group : 0;
  layer.threads = threads;
  layer.tokens = tokens, layer.rows = rows, layer.depth = depth;
  layer.x = {x, static_cast<DType>(x_dtype), x_stride};
  layer.weight = weight, layer.weight_stride = depth, layer.packed = packed, layer.weight_scale = weight_scale;
  layer.bias = bias, layer.bias_dtype = static_cast<DType>(bias_dtype);
  layer.out = out, layer.out_stride = out_stride;
  return linear(layer) ? 0 : 1;
}

// The same with float16 weights [rows, depth] and float arithmetic.
MQ_API int mq_half_linear(int isa, int threads, int64_t tokens, int64_t rows, int64_t depth, const void* x, int x_dtype,
                          int64_t x_stride, const void* weight, const void* bias, int bias_dtype, void* out,
                          int64_t out_stride) {
  if (tokens < 0 || rows < 0 || depth < 0 || !known(x_dtype) || !known(bias_dtype)) return 2;
  if (tokens == 0 || rows == 0) return 0;
  Linear layer = {};
  layer.isa = static_cast<Isa>(isa);
  layer.half = true;
  layer.threads = threads;
  layer.tokens = tokens, layer.rows = rows, layer.depth = depth;
  layer.x = {x, static_cast<DType>(x_dtype), x_stride};
  layer.weight = static_cast<const int8_t*>(weight), layer.weight_stride = 2 * depth;
  layer.bias = bias, layer.bias_dtype = static_cast<DType>(bias_dtype);
  layer.out = out, layer.out_stride = out_stride;
  return linear(layer) ? 0 : 1;
}

namespace {

FusedConv fused_sizes(int isa, int qmax, int64_t group, int threads, const int64_t* shape) {
  FusedConv conv = {};
  static_assert(sizeof(conv.patches) == 13 * sizeof(int64_t), "Patches is read from the caller's array");
  std::memcpy(&conv.patches, shape + 3, sizeof(conv.patches));
  conv.isa = static_cast<Isa>(isa), conv.qmax = qmax, conv.threads = threads;
  conv.group = group < conv.depth() ? group : 0;
  conv.images = shape[0], conv.rows = shape[2];
  conv.x_stride = shape[1] * conv.patches.channels, conv.out_stride = shape[1] * conv.rows;
  return conv;
}

// All groups of channels of a convolution, of which `conv` describes the first.
bool fused_groups(FusedConv conv, int64_t groups) {
  const int64_t words = packed_words(*product_kernels(conv.isa, false, conv.qmax), conv.rows, conv.depth());
  const auto advance = [&conv](const float*& all) {
    if (all != nullptr) all += conv.rows;
  };
  for (int64_t g = 0; g < groups; ++g) {
    if (!fused_conv(conv)) return false;
    conv.x += conv.patches.channels, conv.out += conv.rows;
    conv.weight += conv.rows * conv.depth();
    if (conv.packed != nullptr) conv.packed += words;
    advance(conv.weight_scale), advance(conv.bias), advance(conv.residual);
    advance(conv.norm.weight), advance(conv.norm.bias), advance(conv.norm.mean), advance(conv.norm.variance);
  }
  return true;
}

}  // namespace

// x [images, height, width, groups * channels], weight int8 [groups * rows, kernel_h * kernel_w * channels] in the
// order kernel row, kernel column, channel; out [images, out_h, out_w, groups * rows]. `shape` holds images, groups,
// rows and the twelve sizes of `Patches` in their order, then out_h and out_w.
MQ_API int mq_conv(int isa, int qmax, int64_t group, int threads, const int64_t* shape, const void* x, int x_dtype,
                   const int8_t* weight, const int32_t* packed, const float* weight_scale, const void* bias,
                   int bias_dtype, void* out) {
  if (!known(x_dtype) || !known(bias_dtype) || !fits(qmax, group)) return 2;
  for (int i = 0; i < 16; ++i) {
    if (shape[i] < 0) return 2;
  }
  const int64_t images = shape[0], groups = shape[1], rows = shape[2];
  Patches patches;
  static_assert(sizeof(patches) == 13 * sizeof(int64_t), "Patches is read from the caller's array");
  std::memcpy(&patches, shape + 3, sizeof(patches));
  const DType dtype = static_cast<DType>(x_dtype), bias_type = static_cast<DType>(bias_dtype);
  Linear layer = {};
  layer.isa = static_cast<Isa>(isa);
  layer.qmax = qmax;
  layer.threads = threads;
  layer.tokens = images * patches.out_h * patches.out_w;
  layer.rows = rows;
  layer.depth = patches.kernel_h * patches.kernel_w * patches.channels;
  layer.group = group < layer.depth ? group : 0;
  layer.patches = &patches;
  layer.weight_stride = layer.depth;
  layer.bias_dtype = bias_type;
  layer.out_stride = groups * rows;
  if (layer.tokens == 0 || rows == 0) return 0;
  const ProductKernels& product = *product_kernels(layer.isa, false, qmax);
  if (dtype == DType::f32 && (bias == nullptr || bias_type == DType::f32) && layer.tokens > product.dot_limit_long) {
    FusedConv conv = fused_sizes(isa, qmax, group, threads, shape);
    conv.x = static_cast<const float*>(x), conv.weight = weight, conv.packed = packed;
    conv.weight_scale = weight_scale, conv.bias = static_cast<const float*>(bias), conv.out = static_cast<float*>(out);
    if (fused_groups(conv, groups)) return 0;
  }
  const int64_t words = packed == nullptr ? 0 : packed_words(product, rows, layer.depth);
  for (int64_t g = 0; g < groups; ++g) {
    layer.x = {static_cast<const char*>(x) + g * patches.channels * size_of(dtype), dtype, groups * patches.channels};
    layer.weight = weight + g * rows * layer.depth;
    layer.packed = packed == nullptr ? nullptr : packed + g * words;
    layer.weight_scale = weight_scale + g * rows;
    layer.bias = bias == nullptr ? nullptr : static_cast<const char*>(bias) + g * rows * size_of(bias_type);
    layer.out = static_cast<char*>(out) + g * rows * size_of(dtype);
    if (!linear(layer)) return 1;
  }
  return 0;
}

// The same for fp32, with batch norm (each pointer null where there is none), residual (which lies as `out` does, or null)
// and ReLU; see fused_conv.h.
MQ_API int mq_fused_conv(int isa, int qmax, int64_t group, int threads, const int64_t* shape, const float* x,
                         const int8_t* weight, const int32_t* packed, const float* weight_scale, const float* bias,
                         const float* norm_weight, const float* norm_bias, const float* mean, const float* variance,
                         double epsilon, const float* residual, int relu, float* out) {
  if (!fits(qmax, group)) return 2;
  for (int i = 0; i < 16; ++i) {
    if (shape[i] < 0) return 2;
  }
  FusedConv conv = fused_sizes(isa, qmax, group, threads, shape);
  if (conv.images * conv.patches.out_h * conv.patches.out_w == 0 || conv.rows == 0) return 0;
  conv.x = x, conv.weight = weight, conv.packed = packed, conv.weight_scale = weight_scale, conv.bias = bias;
  conv.norm = {norm_weight, norm_bias, mean, variance, epsilon};
  conv.residual = residual, conv.relu = relu != 0, conv.out = out;
  return fused_groups(conv, shape[1]) ? 0 : 1;
}

// Words of 32 bits that mq_pack writes for a weight [rows, depth]; 0 where the kernels read weights as they are.
MQ_API int64_t mq_packed_words(int isa, int qmax, int64_t rows, int64_t depth) {
  if (rows < 0 || depth < 0 || !fits(qmax, 0)) return 0;
  return packed_words(*product_kernels(static_cast<Isa>(isa), false, qmax), rows, depth);
}

// weight int8 [groups * rows, depth] to `words`, 64-byte aligned, mq_packed_words for each group.
MQ_API int mq_pack(int isa, int qmax, int threads, int64_t groups, int64_t rows, int64_t depth, const int8_t* weight,
                   int32_t* words) {
  if (groups < 0 || rows < 0 || depth < 0 || !fits(qmax, 0)) return 2;
  const ProductKernels& product = *product_kernels(static_cast<Isa>(isa), false, qmax);
  const int64_t step = packed_words(product, rows, depth);
  if (step == 0) return 1;
  for (int64_t g = 0; g < groups; ++g) pack(product, weight + g * rows * depth, rows, depth, threads, words + g * step);
  return 0;
}

// `record` is a `Chain` whose parts follow it in memory: see chain.h. All pointers are to fp32, dense.
MQ_API int mq_chain(const void* record) {
  Chain all;
  std::memcpy(&all, record, sizeof(all));
  all.parts = reinterpret_cast<const Part*>(static_cast<const char*>(record) + sizeof(all));
  if (all.tokens < 0 || all.first.parts < 1 || !known_product(all, all.first, 0) ||
      !known_product(all, all.gate, all.first.parts) ||
      !known_product(all, all.second, all.first.parts + all.gate.parts)) {
    return 2;
  }
  if (all.second.parts > 0 && all.second.depth != all.first.rows) return 2;
  if (all.gate.parts > 0 && (all.gate.depth != all.first.depth || all.gate.parts != all.first.parts)) return 2;
  for (int64_t i = 0; i < all.gate.parts; ++i) {
    if (all.parts[i].rows != all.parts[all.first.parts + i].rows) return 2;
  }
  if (all.tokens == 0 || all.first.rows == 0 || (all.second.parts > 0 && all.second.rows == 0)) return 0;
  return chain(all) ? 0 : 1;
}

// x [rows, n] to out [rows, n]; with a residual, its sum with x goes to `sum` [rows, n] and is what is normed.
MQ_API int mq_norm(int isa, int threads, int64_t rows, int64_t n, int kind, const float* weight, const float* bias,
                   double eps, const float* x, const float* residual, float* sum, float* out) {
  if (rows < 0 || n < 1 || kind < 1 || kind > 2) return 2;
  norm_rows(static_cast<Isa>(isa), {static_cast<NormKind>(kind), weight, bias, eps}, rows, n, x, residual, sum, out, threads);
  return 0;
}

// x [batch, heads, tokens, dim] with any strides but the last; `sizes` holds those four and three strides. cos and
// sin [batch or 1, tokens, dim], out
// [batch, tokens, heads, dim].
MQ_API int mq_rotary(int isa, int threads, const void* sizes, const float* x, const float* cos, const float* sin,
                     int64_t angle_stride, float* out) {
  int64_t shape[7];
  std::memcpy(shape, sizes, sizeof(shape));
  for (int i = 0; i < 4; ++i) {
    if (shape[i] < 0) return 2;
  }
  if (shape[3] % 2 != 0) return 2;
  rotate(static_cast<Isa>(isa), shape, shape + 4, x, cos, sin, angle_stride, out, threads);
  return 0;
}

// A recurrent layer over time; see recurrent.h. weight int8 [gates * size, size], weight_scale and bias [gates * size], given
// [sum of sizes, gates * size], state and cells [sizes[0], size], out [sum of sizes, size].
MQ_API int mq_recurrent(int isa, int qmax, int64_t group, int threads, int cell, int64_t steps, const int64_t* sizes,
                        int backward, int64_t size, const float* given, const int8_t* weight, const int32_t* packed,
                        const float* weight_scale, const float* bias, float* state, float* cells, float* out,
                        int64_t out_stride) {
  if (!fits(qmax, group) || cell < 0 || cell > 3 || steps < 1 || size < 1) return 2;
  for (int64_t t = 0; t < steps; ++t) {
    if (sizes[t] < 1 || (t > 0 && sizes[t] > sizes[t - 1])) return 2;
  }
  Sequence sequence = {static_cast<Cell>(cell), steps, sizes, backward != 0, given, state, cells, out, out_stride, {}};
  Linear& product = sequence.product;
  product.isa = static_cast<Isa>(isa);
  product.qmax = qmax;
  product.group = group < size ? group : 0;
  product.threads = threads;
  product.depth = size;
  product.weight = weight, product.weight_stride = size, product.packed = packed, product.weight_scale = weight_scale;
  product.bias = bias;
  return run_sequence(sequence) ? 0 : 1;
}

// x [rows, depth] to int8 codes [rows, depth], fp32 scale [rows] and energy double [rows, 2]; see convert.h.
MQ_API int mq_quantize_rows(int threads, int64_t rows, int64_t depth, const void* x, int x_dtype, int64_t x_stride,
                            int scale_dtype, int8_t* codes, float* scale, double* energy) {
  if (rows < 0 || depth < 0 || !known(x_dtype) || !known(scale_dtype)) return 2;
#ifdef MQ_X86
  if (!runs(Isa::avx2)) return 1;
  const Matrix matrix = {x, static_cast<DType>(x_dtype), x_stride};
  quantize_rows({matrix, rows, depth, static_cast<DType>(scale_dtype), codes, scale, energy, threads});
  return 0;
#else
  return 1;
#endif
}

// n floats, fp32 or bf16, to float16; counts[4] gets overflowed, clamped, flushed and non-finite values.
MQ_API int mq_to_half(int threads, int64_t n, const void* source, int dtype, void* target, int64_t* counts) {
  if (n < 0 || !known(dtype) || static_cast<DType>(dtype) == DType::f16) return 2;
#ifdef MQ_X86
  if (!runs(Isa::avx2)) return 1;
  const HalfCounts found = to_half(source, static_cast<DType>(dtype), n, target, threads);
  counts[0] = found.overflowed, counts[1] = found.clamped, counts[2] = found.flushed, counts[3] = found.nonfinite;
  return 0;
#else
  return 1;
#endif
}

// Rows of an int8 table [rows, depth] times their scales, out [count, depth]. Returns 2 for an index out of range.
MQ_API int mq_embedding(int threads, int64_t count, int64_t rows, int64_t depth, const int64_t* index,
                        const int8_t* table, const float* scale, void* out, int dtype) {
  if (count < 0 || rows < 0 || depth < 0 || !known(dtype)) return 2;
#ifdef MQ_X86
  if (!runs(Isa::avx2)) return 1;
  return gather_rows(index, count, table, scale, rows, depth, out, static_cast<DType>(dtype), threads) ? 0 : 2;
#else
  return 1;
#endif
}

// source [images, rows, columns] to target [images, columns, rows]; elements of 2 or 4 bytes.
MQ_API int mq_transpose(int threads, int64_t images, int64_t rows, int64_t columns, int64_t size, const void* source,
                        void* target) {
  if (images < 0 || rows < 0 || columns < 0 || (size != 2 && size != 4)) return 2;
  if (images * rows * columns > 0) transpose(source, images, rows, columns, size, target, threads);
  return 0;
}

// Attention as attention.h describes it: `a` points to a filled `Attention`.
MQ_API int mq_attention(const void* a) {
  Attention call;
  std::memcpy(&call, a, sizeof(call));
  if (!known(static_cast<int>(call.dtype)) || call.batch < 0 || call.queries < 0 || call.keys < 0 || call.size < 1 || call.value_size < 1) return 2;
  if (call.key_heads < 1 || call.heads % call.key_heads != 0 || call.window < 0) return 2;
  if (call.batch == 0 || call.queries == 0 || call.heads == 0) return 0;
  return attention(call) ? 0 : 1;
}

namespace {

// The arguments of mq_norm, of mq_rotary and of mq_fused_conv, in eight-byte fields.
struct NormStep {
  int64_t isa, threads, rows, n, kind;
  const float *weight, *bias;
  double eps;
  const float *x, *residual;
  float *sum, *out;
};

struct RotaryStep {
  int64_t isa, threads, sizes[7];
  const float *x, *cos, *sin;
  int64_t angle_stride;
  float* out;
};

struct ConvStep {
  int64_t isa, qmax, group, threads, sizes[16];
  const float* x;
  const int8_t* weight;
  const int32_t* packed;
  const float *weight_scale, *bias, *norm_weight, *norm_bias, *mean, *variance;
  double eps;
  const float* residual;
  int64_t relu;
  float* out;
};

template <typename T>
T read_as(const int64_t* record) {
  T read;
  std::memcpy(&read, record, sizeof(read));
  return read;
}

int run_step(StepKind kind, const int64_t* record) {
  switch (kind) {
    case StepKind::chain:
      return mq_chain(record);
    case StepKind::attention:
      return mq_attention(record);
    case StepKind::norm: {
      const NormStep a = read_as<NormStep>(record);
      return mq_norm(static_cast<int>(a.isa), static_cast<int>(a.threads), a.rows, a.n, static_cast<int>(a.kind), a.weight,
                     a.bias, a.eps, a.x, a.residual, a.sum, a.out);
    }
    case StepKind::rotary: {
      const RotaryStep a = read_as<RotaryStep>(record);
      return mq_rotary(static_cast<int>(a.isa), static_cast<int>(a.threads), a.sizes, a.x, a.cos, a.sin, a.angle_stride, a.out);
    }
    case StepKind::conv: {
      const ConvStep a = read_as<ConvStep>(record);
      return mq_fused_conv(static_cast<int>(a.isa), static_cast<int>(a.qmax), a.group, static_cast<int>(a.threads), a.sizes, a.x,
                           a.weight, a.packed, a.weight_scale, a.bias, a.norm_weight, a.norm_bias, a.mean, a.variance, a.eps,
                           a.residual, static_cast<int>(a.relu), a.out);
    }
    case StepKind::copy_rows:
      return copy_rows(read_as<CopyRows>(record)) ? 0 : 3;
    case StepKind::add_longs:
      add_longs(read_as<AddLongs>(record));
      return 0;
  }
  return 2;
}

}  // namespace

// `steps` steps as program.h describes them; `bases` are the addresses that their places count from, `longest` the words of the
// longest record. Returns 0, 1 (no kernel or no memory), 2 (bad argument) or 3 (an index is out of range); steps before the one
// that failed have run.
MQ_API int mq_run(const int64_t* program, int64_t steps, const int64_t* bases, int64_t longest) {
  static thread_local Scratch scratch;
  if (steps < 0 || longest < 0) return 2;
  int64_t* record = static_cast<int64_t*>(scratch.reserve(longest * 8));
  return record == nullptr ? 1 : run_steps(program, steps, bases, record, run_step);
}

// The same for `parts` rows of `width` bases, each by one thread. The last base is memory between steps, of which every thread has
// a piece of `arena` bytes. Returns what one of those that failed returned; then some parts may not have run.
MQ_API int mq_run_apart(const int64_t* program, int64_t steps, const int64_t* bases, int64_t parts, int64_t width, int64_t arena,
                        int64_t longest, int threads) {
  if (steps < 0 || longest < 0 || parts < 0 || width < 1 || arena < 0 || threads < 1) return 2;
  int failed = 0;
#pragma omp parallel num_threads(threads)
  {
    static thread_local Scratch scratch;
    int64_t* own = static_cast<int64_t*>(scratch.reserve((width + longest) * 8));
#pragma omp for schedule(dynamic)
    for (int64_t part = 0; part < parts; ++part) {
      int result = 1;
      if (own != nullptr) {
        std::memcpy(own, bases + part * width, width * 8);
        own[width - 1] += omp_get_thread_num() * arena;
        result = run_steps(program, steps, own, own + width, run_step);
      }
      if (result != 0) {
#pragma omp atomic write
        failed = result;
      }
    }
  }
  return failed;
}
