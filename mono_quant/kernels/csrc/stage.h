// One product of a chain on one path: its tokens as codes, its weights in strips.
#pragma once

#include "chain.h"
#include "multiply.h"

namespace mq {

// Tokens as codes, [tokens, padded] of the product's code size, and [tokens, groups] scales.
struct Codes {
  char* data;
  Token* token;
};

// A strip is some weight rows of one part: a panel, or so many as dot products take at once.
struct Strip {
  const Part* part;
  // The first row in the part, the rows, and the column of the first one's outputs.
  int64_t row, rows, column;
};

class Stage {
 public:
  // `tokens` is how many pass by together; `packed` whether panels are there for this product and what shares its strips.
  Stage(const Chain& chain, const Product& product, const Part* parts, bool packed, int64_t tokens);

  const Product& product() const { return product_; }
  int64_t strips() const { return strips_; }
  Strip strip(int64_t index) const;

  int64_t code_bytes(int64_t tokens) const;
  int64_t token_bytes(int64_t tokens) const;
  // What a thread needs to multiply.
  int64_t work_bytes() const;

  void quantize(const float* row, int64_t t, const Codes& codes) const;
  // Outputs of the tokens [first, first + tokens) with a strip; `finish` says what becomes of the sums and where they go,
  // with its pointers at the first token and the strip's first column.
  void multiply(const Codes& codes, int64_t first, int64_t tokens, const Strip& strip, const int32_t* next, char* work,
                Finish finish) const;
  // The strip's words where they are packed and panels are read from there, or null.
  const int32_t* words(const Strip& strip) const;

 private:
  void by_tiles(const Codes& codes, int64_t first, int64_t tokens, const Strip& strip, const int32_t* next, char* work,
                int32_t* sums) const;
  void by_dots(const Codes& codes, int64_t first, int64_t tokens, const Strip& strip, int32_t* sums) const;
  void interleave(const Strip& strip, int64_t k, int64_t depth, int32_t* panel) const;

  const Product& product_;
  const Part* parts_;
  const ProductKernels* kernels_;
  const RowKernels* rows_;
  const FloatKernels* floats_;
  int64_t padded_, group_, groups_, strips_, strip_rows_;
  bool dot_;
};

}  // namespace mq
