// The part of driver.cpp that calls chains, norms and rotary embeddings.
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <vector>

#include "../../mono_quant/kernels/csrc/chain.h"

extern "C" {
int64_t mq_packed_words(int, int, int64_t, int64_t);
int mq_pack(int, int, int, int64_t, int64_t, int64_t, const int8_t*, int32_t*);
int mq_chain(const void*);
int mq_norm(int, int, int64_t, int64_t, int, const float*, const float*, double, const float*, const float*, float*, float*);
int mq_rotary(int, int, const void*, const float*, const float*, const float*, int64_t, float*);
}

namespace {

uint32_t state = 7;
uint64_t checksum = 0;

uint32_t random_bits() { return state = state * 1664525u + 1013904223u; }

std::vector<float> floats(int64_t n) {
  std::vector<float> data(n);
  for (float& x : data) x = static_cast<float>(random_bits() >> 8) / (1 << 23) - 1;
  return data;
}

void add(int status, const std::vector<float>& data) {
  if (status != 0) std::abort();
  for (size_t i = 0; i < data.size() * 4; ++i) {
    checksum = checksum * 31 + reinterpret_cast<const uint8_t*>(data.data())[i];
  }
}

// A weight with all that belongs to it; the packed words in memory of exactly their size.
struct Weight {
  std::vector<int8_t> codes;
  std::vector<float> scale, bias;
  std::unique_ptr<int32_t, decltype(&std::free)> packed{nullptr, std::free};
  int64_t rows;

  Weight(int isa, int qmax, int64_t rows, int64_t depth, bool pack)
      : codes(rows * depth), scale(floats(rows)), bias(floats(rows)), rows(rows) {
    for (int8_t& code : codes) code = static_cast<int8_t>(random_bits() >> 24);
    const int64_t words = pack ? mq_packed_words(isa, qmax, rows, depth) : 0;
    if (words == 0) return;
    packed.reset(static_cast<int32_t*>(std::aligned_alloc(64, words * 4)));
    if (mq_pack(isa, qmax, 2, 1, rows, depth, codes.data(), packed.get()) != 0) std::abort();
  }
  mq::Part part(bool biased) const {
    return {codes.data(), packed.get(), scale.data(), biased ? bias.data() : nullptr, rows};
  }
};

// Two weights side by side (and a gate of as many), then one.
void chains(int isa, int64_t tokens, int64_t rows, int64_t depth, int64_t qmax, int64_t group, bool gated, bool pack,
            int threads) {
  const int64_t more = rows + 5, inner = rows + more;
  std::vector<Weight> weights;
  for (int i = 0; i < (gated ? 4 : 2); ++i) {
    weights.emplace_back(isa, static_cast<int>(qmax), i % 2 == 0 ? rows : more, depth, pack);
  }
  weights.emplace_back(isa, static_cast<int>(qmax), depth, inner, pack);
  const auto x = floats(tokens * depth), norm = floats(depth);
  std::vector<float> out(tokens * depth);
  struct {
    mq::Chain chain;
    mq::Part parts[5];
  } record = {};
  mq::Chain& chain = record.chain;
  chain.isa = isa, chain.threads = threads, chain.tokens = tokens;
  chain.x = chain.residual = x.data(), chain.out = out.data();
  chain.pre = {mq::NormKind::rms, norm.data(), nullptr, 1e-6};
  chain.post = {mq::NormKind::layer, norm.data(), norm.data(), 1e-5};
  chain.act = static_cast<mq::Act>(1 + rows % 4);
  chain.first = {depth, inner, qmax, group, 2};
  if (gated) chain.gate = chain.first;
  chain.second = {inner, depth, qmax, group, 1};
  for (size_t i = 0; i < weights.size(); ++i) record.parts[i] = weights[i].part(i % 2 == 0);
  add(mq_chain(&record), out);
}

void norms(int isa, int64_t rows, int64_t n, int threads) {
  const auto x = floats(rows * n), residual = floats(rows * n), weight = floats(n);
  std::vector<float> sum(rows * n), out(rows * n);
  add(mq_norm(isa, threads, rows, n, 1, weight.data(), weight.data(), 1e-5, x.data(), residual.data(), sum.data(),
              out.data()),
      out);
  add(mq_norm(isa, threads, rows, n, 2, nullptr, nullptr, 1e-5, x.data(), nullptr, nullptr, out.data()), sum);
}

void rotations(int isa, int64_t dim, int threads) {
  const int64_t sizes[7] = {2, 3, 5, dim, 15 * dim, dim, 3 * dim};
  const auto x = floats(30 * dim), cos = floats(10 * dim), sin = floats(10 * dim);
  std::vector<float> out(30 * dim);
  add(mq_rotary(isa, threads, sizes, x.data(), cos.data(), sin.data(), 5 * dim, out.data()), out);
}

}  // namespace

uint64_t drive_chains(int isas) {
  for (int isa = 0; isa < 6; ++isa) {
    if (!(isas >> isa & 1)) continue;
    for (int64_t depth : {1, 31, 64, 65, 200, 2113}) {
      for (int64_t tokens : {1, 3, 9, 65, 140}) {
        for (int64_t rows : {1, 17, 48}) {
          const int threads = 1 + static_cast<int>((depth + tokens + rows) % 3);
          chains(isa, tokens, rows, depth, 127, 0, rows == 17, true, threads);
          chains(isa, tokens, rows, depth, 127, 64 * (1 + rows % 2), rows == 48, tokens % 2 == 0, threads);
          chains(isa, tokens, rows, depth, 2047, 0, rows == 1, rows == 48, threads);
        }
      }
    }
    for (int64_t n : {1, 15, 16, 63, 64, 65, 129, 1000}) norms(isa, 67, n, 2);
    for (int64_t dim : {2, 14, 32, 34, 128, 2048}) rotations(isa, dim, 2);
  }
  return checksum;
}
