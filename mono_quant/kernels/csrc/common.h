// What the parts of the library share: element types, one path per instruction set, scratch memory.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#define MQ_X86 1
#define MQ_AVX2 __attribute__((target("avx2,fma,f16c")))
#define MQ_AVX512 __attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl")))
#define MQ_VNNI __attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")))
// Older compilers do not know AVX-VNNI; the path is missing then.
#if (defined(__clang__) && __clang_major__ >= 12) || (!defined(__clang__) && __GNUC__ >= 11)
#define MQ_HAS_AVXVNNI 1
#define MQ_AVXVNNI __attribute__((target("avx2,fma,f16c,avxvnni")))
#endif
#endif
#define MQ_INLINE inline __attribute__((always_inline))

namespace mq {

enum class DType : int { f32 = 0, f16 = 1, bf16 = 2 };

inline int64_t size_of(DType dtype) { return dtype == DType::f32 ? 4 : 2; }

// Codes of a token are padded with zeros to a multiple of this, so that no inner loop over codes has a tail.
constexpr int64_t kDepthAlign = 64;

// How far ahead the weights of a single token are fetched, in bytes (measured).
constexpr int64_t kStreamAhead = 4096;

inline int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

// Elements of a row as `at(row)`; rows need not be adjacent.
struct Matrix {
  const void* data;
  DType dtype;
  int64_t stride;

  const void* at(int64_t row) const { return static_cast<const char*>(data) + row * stride * size_of(dtype); }
};

// What quantizing a token, or a group of its values, leaves beside the codes.
struct Token {
  float scale;
  // Added to every integer sum; undoes the offset of unsigned weights.
  int32_t correction;
};

// Finished sums of some tokens with some weight rows, and where they go. Strides are in elements; bias may be null.
struct Tile {
  const int32_t* sums;
  int64_t sums_stride;
  int64_t tokens, columns;
  const Token* token;
  const float* weight_scale;
  const float* bias;
  char* out;
  int64_t out_stride;
  DType dtype;

  char* out_row(int64_t t) const { return out + t * out_stride * size_of(dtype); }
};

// How float rows become codes and sums become outputs.
struct RowKernels {
  // Writes `padded` codes of `code_size` bytes, zeros from `depth` on, and a token for every `group` values.
  void (*quantize)(const void* row, DType dtype, int64_t depth, int64_t padded, int64_t group, int qmax, int code_size,
                   void* codes, Token* token);
  // out[t][n] = float(sum[t][n] + correction[t]) * (scale[t] * weight_scale[n]) + bias[n].
  void (*finish)(const Tile& tile);
  // out[t][n] = total[t][n] * weight_scale[n] + bias[n]; the sums are the fp32 totals of groups.
  void (*finish_totals)(const Tile& tile);
};

// A product of codes and weights on one instruction set. "Words" are 32 bits: one float, two int16 codes or four
// int8 codes; sums are int32, or float where the codes are floats. Weights are addressed in bytes.
struct ProductKernels {
  int code_size;
  int weight_size;
  // Weight rows side by side in a panel; 0 where only `dot` exists.
  int panel_rows;
  int tile_tokens;
  int dot_tokens;
  // Up to this many tokens `dot` is faster than interleaving panels (measured): short rows pay more for adding up
  // the lanes at their end, and rows from memory are fetched ahead by `dot` alone.
  int dot_limit_short, dot_limit_long;
  // The same where panels are there already.
  int packed_limit;
  // With unsigned weights, w + 128, each token needs the correction -128 * sum(codes).
  bool unsigned_weights;
  // Interleaves `rows` <= panel_rows weight rows word by word, zeros beyond them up to a multiple of 16.
  void (*interleave)(const int8_t* weight, int64_t stride, int rows, int64_t depth, int32_t* panel);
  // sums[t][n] (+)= codes[t] . panel[n] for `tokens` <= tile_tokens and round_up(rows, lanes) columns.
  void (*tile)(const int32_t* codes, int64_t stride, int tokens, const int32_t* panel, int rows, int64_t words,
               int32_t* sums, bool accumulate);
  // sums[t * sums_stride + n] = codes[t] . weight[n] for four weight rows and `tokens` <= dot_tokens. Unless `ahead`
  // is 0, weights are fetched ahead: so many bytes behind the ones in use, or what suits a single token.
  void (*dot)(const int8_t* const weight[4], int64_t depth, int64_t ahead, const void* codes, int64_t stride,
              int tokens, int32_t* sums, int64_t sums_stride);
  // The same two for one group of values, and for rows of groups. Every integer sum of a group becomes a float and
  // joins the total of its token: total + float(sum + correction) * scale, each operation rounded.
  void (*group_tile)(const int32_t* codes, int64_t stride, int tokens, const int32_t* panel, int rows, int64_t words,
                     const Token* token, int64_t token_stride, float* totals, bool accumulate);
  void (*group_dot)(const int8_t* const weight[4], int64_t depth, int64_t group, int64_t ahead, const void* codes,
                    int64_t stride, int tokens, const Token* token, int64_t token_stride, float* totals,
                    int64_t totals_stride);
};

extern const RowKernels kRowsPortable, kRowsAvx2, kRowsFloat;
extern const ProductKernels kProductPortable, kProductAvx2, kProductAvx512, kProductVnniWide, kProductVnniBytes;
extern const ProductKernels kProductAvxVnni, kProductAvx512VlVnni;
extern const ProductKernels kProductHalfAvx2, kProductHalfAvx512;

// Order of preference; the numbers are part of the C interface.
enum class Isa : int {
  portable = 0,
  avx2 = 1,
  avxvnni = 2,
  avx512 = 3,
  avx512vnni = 4,
  // The kernels of avxvnni in the encoding of AVX-512, so that they can be tested where that is all there is.
  avx512vl_vnni = 5
};

bool runs(Isa isa);

// Memory that a thread keeps between calls: page faults on fresh memory cost more than small products.
class Scratch {
 public:
  ~Scratch();
  // Returns 64-byte aligned memory or null; the contents of earlier calls are lost.
  void* reserve(size_t bytes);

 private:
  void* data_ = nullptr;
  size_t size_ = 0;
};

// Converts `n` floats of any type to fp32.
void to_floats(const void* source, DType dtype, int64_t n, float* target);
float to_float(const void* source, DType dtype);
void from_float(float value, void* target, DType dtype);

}  // namespace mq
