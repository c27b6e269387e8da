#include "attention.h"

#include <algorithm>

namespace mq {
namespace {

// Rows for which keys and values are laid out once, at most and at least.
constexpr int64_t kMostRows = 192;
constexpr int64_t kLeastRows = 48;
// With fewer queries than this the heads that have the same keys share them.
constexpr int64_t kSharedQueries = 48;
// Multiplications below which another thread costs more than it brings.
constexpr int64_t kThreadWork = 1 << 18;
constexpr int64_t kLayingRows = 4;
// Multiplications that are worth being asked for: tasks smaller than that are handed out several at a time.
constexpr int64_t kTaskWork = 1 << 23;

const AttentionKernels& kernels_of(Isa isa) {
#ifdef MQ_X86
  if (isa == Isa::avx512 || isa == Isa::avx512vnni) return kAttentionAvx512;
  if (isa != Isa::portable) return kAttentionAvx2;
#endif
  (void)isa;
  return kAttentionPortable;
}

// How the rows of all heads are shared out. Nothing of it changes a result.
struct Plan {
  // Heads of one unit have the same keys; its rows are cut into chunks.
  int64_t heads, units, rows, chunks;
  bool by_block;
  // Spans that a thread takes at a time.
  int64_t at_once;

  Span span(const Attention& a, int64_t task) const {
    const int64_t unit = task / chunks, chunk = task % chunks, per_batch = a.heads / heads;
    return {unit / per_batch, unit % per_batch * heads, rows * chunk / chunks, rows * (chunk + 1) / chunks};
  }
  int64_t most_rows() const { return (rows + chunks - 1) / chunks; }
};

Plan plan_of(const Attention& a, int64_t threads) {
  Plan plan;
  plan.heads = a.queries < kSharedQueries ? a.heads / a.key_heads : 1;
  plan.units = a.batch * a.heads / plan.heads;
  plan.rows = plan.heads * a.queries;
  const int64_t least = (plan.rows + kMostRows - 1) / kMostRows, most = (plan.rows + kLeastRows - 1) / kLeastRows;
  const int64_t wanted = threads > 1 ? (2 * threads + plan.units - 1) / plan.units : 1;
  plan.chunks = std::max(least, std::min(most, wanted));
  // a single token has few heads for many threads; its keys may be many
  plan.by_block = threads > plan.units * plan.chunks && a.blocks() > 1 && plan.most_rows() <= kLeastRows;
  const int64_t spans = plan.units * plan.chunks;
  const int64_t span_work = plan.most_rows() * std::max<int64_t>(1, a.keys) * (a.size + a.value_size);
  plan.at_once = std::max<int64_t>(1, std::min(kTaskWork / span_work, spans / (8 * threads)));
  return plan;
}

bool run_whole(const Attention& a, const AttentionKernels& kernels, const Plan& plan, int threads) {
  const int64_t bytes = kernels.scratch(a, plan.most_rows()), tasks = plan.units * plan.chunks;
  bool ok = true;
#pragma omp parallel num_threads(threads) reduction(&& : ok) if (threads > 1)
  {
    static thread_local Scratch scratch;
    void* memory = scratch.reserve(bytes);
    ok = memory != nullptr;
#pragma omp for schedule(dynamic, plan.at_once)
    for (int64_t task = 0; task < tasks; ++task) {
      if (memory == nullptr) continue;
      const bool has_next = task + 1 < tasks && (task + 1) % plan.at_once != 0;
      const Span span = plan.span(a, task), next = plan.span(a, task + 1);
      kernels.attend(a, span, has_next ? &next : nullptr, memory);
    }
  }
  return ok;
}

bool run_by_block(const Attention& a, const AttentionKernels& kernels, const Plan& plan, int threads) {
  static thread_local Scratch shared;
  const int64_t bytes = kernels.scratch(a, plan.most_rows()), blocks = a.blocks();
  const int64_t spans = plan.units * plan.chunks;
  Parts parts = {nullptr, plan.most_rows(), round_up(a.value_size, 16)};
  parts.data = static_cast<float*>(shared.reserve(spans * blocks * parts.floats() * 4));
  if (parts.data == nullptr) return false;
  const auto parts_of = [&](int64_t i) {
    return Parts{parts.data + i * blocks * parts.floats(), parts.rows, parts.stride};
  };
  bool ok = true;
#pragma omp parallel num_threads(threads) reduction(&& : ok) if (threads > 1)
  {
    static thread_local Scratch scratch;
    void* memory = scratch.reserve(bytes);
    ok = memory != nullptr;
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < spans * blocks; ++task) {
      const int64_t i = task / blocks;
      if (memory == nullptr) continue;
      kernels.attend_block(a, plan.span(a, i), task % blocks, parts_of(i), memory);
    }
#pragma omp for schedule(dynamic)
    for (int64_t i = 0; i < spans; ++i) {
      if (memory != nullptr) kernels.join(a, plan.span(a, i), parts_of(i), memory);
    }
  }
  return ok;
}

}  // namespace

bool attention(const Attention& a) {
  // laying keys and values out costs as much as some queries do, which counts where these are few
  const int64_t rows = a.heads * a.queries + kLayingRows * a.key_heads;
  const int64_t work = a.batch * rows * a.keys * (a.size + a.value_size) / kThreadWork;
  const int64_t threads = std::max<int64_t>(1, std::min(a.threads, work));
  const AttentionKernels& kernels = kernels_of(static_cast<Isa>(a.isa));
  const Plan plan = plan_of(a, threads);
  const auto run = plan.by_block ? run_by_block : run_whole;
  return run(a, kernels, plan, static_cast<int>(threads));
}

}  // namespace mq
