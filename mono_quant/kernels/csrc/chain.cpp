#include "chain.h"

#include <omp.h>

#include <algorithm>

#include "stage.h"

namespace mq {
namespace {

// Fewer tokens for each thread than this, and threads share the weights' rows rather than the tokens.
constexpr int64_t kFewTokens = 80;

int64_t aligned(int64_t bytes) { return round_up(bytes, 64); }

int64_t floats(int64_t rows, int64_t columns) { return aligned(rows * columns * static_cast<int64_t>(sizeof(float))); }

// Cuts pieces from a piece of memory, or counts their bytes.
class Arena {
 public:
  explicit Arena(void* memory) : start_(static_cast<char*>(memory)) {}
  template <typename T>
  T* take(int64_t bytes) {
    char* at = start_ == nullptr ? nullptr : start_ + used_;
    used_ += aligned(bytes);
    return reinterpret_cast<T*>(at);
  }
  int64_t used() const { return used_; }

 private:
  char* start_;
  int64_t used_ = 0;
};

struct Plan {
  const Chain& chain;
  const FloatKernels& kernels;
  // `second` counts only where the chain has one.
  Stage first, gate, second;

  Plan(const Chain& c, int64_t tokens)
      : chain(c),
        kernels(float_kernels(static_cast<Isa>(c.isa))),
        first(stage(c, 0, 2, 0, tokens)),
        gate(stage(c, 0, 2, c.gate.parts == 0 ? 0 : 1, tokens)),
        second(c.second.parts == 0 ? first : stage(c, 2, 3, 2, tokens)) {}

  // The product `index` of three; those in [begin, end) have the same strips.
  static Stage stage(const Chain& c, int begin, int end, int index, int64_t tokens) {
    const Product* products[] = {&c.first, &c.gate, &c.second};
    const Part* own = c.parts;
    bool packed = true;
    int64_t at = 0;
    for (int i = 0; i < 3; ++i) {
      if (i == index) own = c.parts + at;
      for (int64_t p = 0; p < products[i]->parts; ++p, ++at) {
        packed = packed && (i < begin || i >= end || c.parts[at].packed != nullptr);
      }
    }
    return Stage(c, *products[index], own, packed, tokens);
  }

  bool gated() const { return chain.gate.parts != 0; }
  bool two() const { return chain.second.parts != 0; }
  int64_t width() const { return two() ? chain.second.rows : chain.first.rows; }
  bool normed() const { return chain.post.kind != NormKind::none; }
};

// What a thread has for itself.
struct Work {
  char* product;
  // Outputs of the gate's strip.
  float* gate;
  // A normed row.
  float* row;

  Work(const Plan& plan, Arena& arena)
      : product(arena.take<char>(std::max(plan.first.work_bytes(), plan.second.work_bytes()))),
        gate(arena.take<float>(floats(kBlockTokens, kMaxPanel))),
        row(arena.take<float>(floats(1, plan.chain.first.depth))) {}
};

// What some tokens become on their way through the chain.
struct Rows {
  Codes codes, inner_codes;
  // [tokens, first.rows], where two products follow each other
  float* inner;
  // [tokens, width], where a norm follows
  float* sums;

  Rows(const Plan& plan, int64_t tokens, Arena& arena) : codes(take(plan.first, tokens, arena)) {
    inner_codes = plan.two() ? take(plan.second, tokens, arena) : Codes{nullptr, nullptr};
    inner = plan.two() ? arena.take<float>(floats(tokens, plan.chain.first.rows)) : nullptr;
    sums = plan.normed() ? arena.take<float>(floats(tokens, plan.width())) : nullptr;
  }

  static Codes take(const Stage& stage, int64_t tokens, Arena& arena) {
    char* data = arena.take<char>(stage.code_bytes(tokens));
    return {data, arena.take<Token>(stage.token_bytes(tokens))};
  }
};

// Token `t` of those from `start` on becomes codes.
void enter(const Plan& plan, int64_t start, int64_t t, const Codes& codes, const Work& work) {
  const int64_t depth = plan.chain.first.depth;
  const float* x = plan.chain.x + (start + t) * depth;
  if (plan.chain.pre.kind != NormKind::none) {
    plan.kernels.norm(plan.chain.pre, x, depth, work.row);
    x = work.row;
  }
  plan.first.quantize(x, t, codes);
}

void leave(const Plan& plan, int64_t start, int64_t t, const Rows& rows) {
  const int64_t width = plan.width();
  plan.kernels.norm(plan.chain.post, rows.sums + t * width, width, plan.chain.out + (start + t) * width);
}

// Where the outputs of the last product go, and what is added to them.
Finish last_finish(const Plan& plan, int64_t start, const Rows& rows) {
  const int64_t width = plan.width();
  Finish finish = {};
  finish.out = plan.normed() ? rows.sums : plan.chain.out + start * width;
  finish.out_stride = finish.term_stride = width;
  finish.term = plan.chain.residual == nullptr ? nullptr : plan.chain.residual + start * width;
  return finish;
}

// A finish for the tokens from `t` on and the columns from `column` on.
Finish moved(Finish finish, int64_t t, int64_t column) {
  finish.out += t * finish.out_stride + column;
  if (finish.term != nullptr) finish.term += t * finish.term_stride + column;
  return finish;
}

// Strips [begin, end) of the first product, or of the product of gate and first, for `tokens` tokens.
void first_strips(const Plan& plan, int64_t start, int64_t tokens, int64_t begin, int64_t end, const Codes& codes,
                  const Rows& rows, const Work& work) {
  Finish finish = last_finish(plan, start, rows);
  if (plan.two()) {
    finish = {};
    finish.out = rows.inner;
    finish.out_stride = plan.chain.first.rows;
  }
  finish.act = plan.gated() ? Act::none : plan.chain.act;
  for (int64_t s = begin; s < end; ++s) {
    const Strip strip = plan.first.strip(s);
    const int32_t* next = s + 1 < end ? plan.first.words(plan.first.strip(s + 1)) : nullptr;
    for (int64_t t = 0; t < tokens; t += kBlockTokens) {
      const int64_t count = std::min(kBlockTokens, tokens - t);
      Finish here = moved(finish, t, strip.column);
      const bool once = t + kBlockTokens >= tokens;
      if (plan.gated()) {
        const Strip other = plan.gate.strip(s);
        Finish gate = {};
        gate.act = plan.chain.act;
        gate.out = work.gate;
        gate.out_stride = kMaxPanel;
        plan.gate.multiply(codes, t, count, other, once ? plan.first.words(strip) : nullptr, work.product, gate);
        here.factor = work.gate;
        here.factor_stride = kMaxPanel;
        if (s + 1 < end) next = plan.gate.words(plan.gate.strip(s + 1));
      }
      plan.first.multiply(codes, t, count, strip, once ? next : nullptr, work.product, here);
    }
  }
}

void second_strips(const Plan& plan, int64_t start, int64_t tokens, int64_t begin, int64_t end, const Codes& codes,
                   const Rows& rows, const Work& work) {
  const Finish finish = last_finish(plan, start, rows);
  for (int64_t s = begin; s < end; ++s) {
    const Strip strip = plan.second.strip(s);
    const int32_t* next = s + 1 < end ? plan.second.words(plan.second.strip(s + 1)) : nullptr;
    for (int64_t t = 0; t < tokens; t += kBlockTokens) {
      const int64_t count = std::min(kBlockTokens, tokens - t);
      plan.second.multiply(codes, t, count, strip, t + kBlockTokens >= tokens ? next : nullptr, work.product,
                           moved(finish, t, strip.column));
    }
  }
}

// Threads take blocks of tokens through the whole chain.
bool run_blocks(const Plan& plan, int64_t blocks, int threads) {
  const Chain& chain = plan.chain;
  const int64_t most = (chain.tokens + blocks - 1) / blocks;
  bool ok = true;
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    static thread_local Scratch scratch;
    Arena size(nullptr);
    Rows(plan, most, size), Work(plan, size);
    Arena arena(scratch.reserve(size.used()));
    const Rows rows(plan, most, arena);
    const Work work(plan, arena);
#pragma omp for schedule(dynamic)
    for (int64_t b = 0; b < blocks; ++b) {
      if (rows.codes.data == nullptr) {
#pragma omp atomic write
        ok = false;
        continue;
      }
      const int64_t start = chain.tokens * b / blocks, tokens = chain.tokens * (b + 1) / blocks - start;
      for (int64_t t = 0; t < tokens; ++t) enter(plan, start, t, rows.codes, work);
      first_strips(plan, start, tokens, 0, plan.first.strips(), rows.codes, rows, work);
      if (plan.two()) {
        for (int64_t t = 0; t < tokens; ++t) {
          plan.second.quantize(rows.inner + t * chain.first.rows, t, rows.inner_codes);
        }
        second_strips(plan, start, tokens, 0, plan.second.strips(), rows.inner_codes, rows, work);
      }
      for (int64_t t = 0; plan.normed() && t < tokens; ++t) leave(plan, start, t, rows);
    }
  }
  return ok;
}

// A thread's share of some tokens, where they are enough for all; otherwise each thread has them all for itself.
struct Share {
  int64_t begin, end;
  Share(int64_t count, int rank, int team, bool whole)
      : begin(whole ? 0 : count * rank / team), end(whole ? count : count * (rank + 1) / team) {}
};

// All tokens stay together, and threads take strips of each product.
bool run_strips(const Plan& plan, int threads) {
  static thread_local Scratch scratch;
  const Chain& chain = plan.chain;
  const int64_t tokens = chain.tokens;
  const bool alone = tokens < threads;
  Arena size(nullptr), own_size(nullptr);
  Rows(plan, tokens, size), Work(plan, own_size), Rows(plan, tokens, own_size);
  char* memory = static_cast<char*>(scratch.reserve(size.used() + threads * own_size.used()));
  if (memory == nullptr) return false;
  Arena shared(memory);
  const Rows rows(plan, tokens, shared);
#pragma omp parallel num_threads(threads)
  {
    const int rank = omp_get_thread_num(), team = omp_get_num_threads();
    Arena arena(memory + size.used() + rank * own_size.used());
    const Work work(plan, arena);
    const Rows own(plan, tokens, arena);
    const Rows& codes = alone ? own : rows;
    const Share mine(tokens, rank, team, alone);
    for (int64_t t = mine.begin; t < mine.end; ++t) enter(plan, 0, t, codes.codes, work);
    if (!alone) {
#pragma omp barrier
    }
    const Share strips(plan.first.strips(), rank, team, false);
    first_strips(plan, 0, tokens, strips.begin, strips.end, codes.codes, rows, work);
    if (plan.two()) {
#pragma omp barrier
      for (int64_t t = mine.begin; t < mine.end; ++t) {
        plan.second.quantize(rows.inner + t * chain.first.rows, t, codes.inner_codes);
      }
      if (!alone) {
#pragma omp barrier
      }
      const Share more(plan.second.strips(), rank, team, false);
      second_strips(plan, 0, tokens, more.begin, more.end, codes.inner_codes, rows, work);
    }
    if (plan.normed()) {
#pragma omp barrier
      const Share last(tokens, rank, team, false);
      for (int64_t t = last.begin; t < last.end; ++t) leave(plan, 0, t, rows);
    }
  }
  return true;
}

}  // namespace

bool chain(const Chain& chain) {
  int64_t work = 0;
  for (const Product* product : {&chain.first, &chain.gate, &chain.second}) {
    if (product->parts > 0) work += product->rows * product->depth;
  }
  const int threads = static_cast<int>(std::max<int64_t>(1, std::min(chain.threads, chain.tokens * work / kThreadWork)));
  if (threads > 1 && chain.tokens < kFewTokens * threads) return run_strips(Plan(chain, chain.tokens), threads);
  int64_t blocks = (chain.tokens + kBlockTokens - 1) / kBlockTokens;
  // no thread is left with nothing while another has its last block
  if (blocks < 4 * threads) blocks = std::min(chain.tokens, round_up(blocks, threads));
  const Plan plan(chain, (chain.tokens + blocks - 1) / blocks);
  return run_blocks(plan, blocks, threads);
}

}  // namespace mq
