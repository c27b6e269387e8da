// Scores become weights, and what blocks of keys leave is joined, over sixteen lanes; see attention_lanes.h.
#include <limits>

#include "attention_tiles.h"

namespace mq {
namespace {

constexpr float kHidden = -std::numeric_limits<float>::infinity();

// The keys [first, end) of a block that one row sees, from its beginning; its mask may hide some of them.
struct View {
  int64_t first, end;
  const char* mask;

  // The vectors with a key in view.
  int64_t low() const { return first & -kLaneCount; }
  int64_t high() const { return (end + kLaneCount - 1) & -kLaneCount; }
};

// Scores of some rows, `stride` floats apart, in the keys [begin, end), multiples of sixteen that no view goes beyond.
// `masked` keys from the block's beginning have a mask, where there is one.
struct Scores {
  float* data;
  int64_t stride, begin, end, masked;
};

// Sixteen scores, scaled and masked, that are all in view.
template <MaskKind Kind>
MQ_LANE Lanes masked(Lanes s, Lanes factor, const char* mask, int64_t k) {
  if constexpr (Kind == MaskKind::added) return fma(s, factor, load(reinterpret_cast<const float*>(mask) + k));
  s = mul(s, factor);
  if constexpr (Kind == MaskKind::visible) s = choose(nonzero_bytes(mask + k, kLaneCount), s, all(kHidden));
  return s;
}

// The same where not all are in view; `n` of them have a mask.
template <MaskKind Kind>
MQ_LANE Lanes masked_part(Lanes s, Lanes factor, const View& view, int64_t k, int64_t n) {
  const Lanes hidden = all(kHidden);
  if constexpr (Kind == MaskKind::added) {
    s = fma(s, factor, load_first(reinterpret_cast<const float*>(view.mask) + k, n));
  } else {
    s = mul(s, factor);
  }
  if constexpr (Kind == MaskKind::visible) s = choose(nonzero_bytes(view.mask + k, n), s, hidden);
  return choose(first_lanes(view.first - k), hidden, choose(first_lanes(view.end - k), s, hidden));
}

MQ_LANE void clear(float* from, const float* to) {
  for (; from < to; from += kLaneCount) store(from, zeros());
}

// Scores of R rows become weights in place; `top` gets the largest score of each, and `sum` the sum of its weights.
template <MaskKind Kind, int R>
MQ_LANE void weigh(const Scores& scores, const View* views, float scale, float* row, float* top, float* sum) {
  const int64_t stride = scores.stride;
  View all_views = views[0], common = views[0];
#pragma GCC unroll 4
  for (int i = 1; i < R; ++i) {
    all_views = {smaller(all_views.first, views[i].first), larger(all_views.end, views[i].end), nullptr};
    common = {larger(common.first, views[i].first), smaller(common.end, views[i].end), nullptr};
  }
  const int64_t low = all_views.low(), high = all_views.high();
  Lanes lanes[R];
#pragma GCC unroll 4
  for (int i = 0; i < R; ++i) lanes[i] = all(kHidden);
  for (int64_t k = low; k < high; k += kLaneCount) {
    const bool is_whole = common.first <= k && k + kLaneCount <= common.end;
#pragma GCC unroll 4
    for (int i = 0; i < R; ++i) {
      const Lanes raw = load(row + i * stride + k), factor = all(scale);
      const Lanes s = is_whole ? masked<Kind>(raw, factor, views[i].mask, k)
                               : masked_part<Kind>(raw, factor, views[i], k, scores.masked - k);
      store(row + i * stride + k, s);
      lanes[i] = maximum(lanes[i], s);
    }
  }
  largest_of_each<R>(lanes, top);
  Lanes base[R];
#pragma GCC unroll 4
  for (int i = 0; i < R; ++i) {
    // nothing to be seen: weights of zero
    base[i] = all(top[i] == kHidden ? 0.0f : top[i]);
    lanes[i] = zeros();
  }
  for (int64_t k = low; k < high; k += kLaneCount) {
#pragma GCC unroll 4
    for (int i = 0; i < R; ++i) {
      const Lanes e = bounded_exponential(sub(load(row + i * stride + k), base[i]));
      store(row + i * stride + k, e);
      lanes[i] = add(lanes[i], e);
    }
  }
  total_of_each<R>(lanes, sum);
#pragma GCC unroll 4
  for (int i = 0; i < R; ++i) {
    clear(row + i * stride + scores.begin, row + i * stride + low);
    clear(row + i * stride + high, row + i * stride + scores.end);
  }
}

// The same for any number of rows.
template <MaskKind Kind>
MQ_TARGET void soften(const Scores& scores, const View* views, int64_t rows, float scale, float* top, float* sum) {
  float* row = scores.data;
  int64_t t = 0;
  for (; t + kRowsAtOnce <= rows; t += kRowsAtOnce, row += kRowsAtOnce * scores.stride) {
    weigh<Kind, kRowsAtOnce>(scores, views + t, scale, row, top + t, sum + t);
  }
  for (; t < rows; ++t, row += scores.stride) weigh<Kind, 1>(scores, views + t, scale, row, top + t, sum + t);
}

MQ_LANE float exponential_of(float x) {
  float e[kLaneCount];
  store(e, exponential(all(x)));
  return e[0];
}

// Adds the results of a further block to those of the blocks before it; there are none where the sum is zero.
MQ_TARGET void fold(const Results& part, int64_t rows, int64_t size, const Results& total) {
  for (int64_t t = 0; t < rows; ++t) {
    const float part_top = part.top[t], part_sum = part.sum[t], top = total.top[t], sum = total.sum[t];
    if (part_sum == 0) continue;
    const bool is_first = sum == 0;
    const float best = is_first || part_top > top ? part_top : top;
    const float shrink = is_first ? 0.0f : exponential_of(top - best);
    const float grow = is_first ? 1.0f : exponential_of(part_top - best);
    const float* more = part.sums + t * part.stride;
    float* sums = total.sums + t * total.stride;
    for (int64_t d = 0; d < size; d += kLaneCount) {
      const Lanes grown = mul(load(more + d), all(grow));
      store(sums + d, is_first ? grown : fma(load(sums + d), all(shrink), grown));
    }
    total.sum[t] = (is_first ? 0.0f : sum * shrink) + part_sum * grow;
    total.top[t] = best;
  }
}

// Sums of values become results, `out_stride` floats apart.
MQ_TARGET void finish(const Results& of, int64_t rows, int64_t size, float* out, int64_t out_stride) {
  for (int64_t t = 0; t < rows; ++t, out += out_stride) {
    const float* sums = of.sums + t * of.stride;
    const float sum = of.sum[t];
    // zeros where nothing was to be seen, as torch gives, whatever values lie there; NaN stays
    const Lanes inverse = all(sum == 0 ? 0.0f : 1.0f / sum);
    for (int64_t d = 0; d < size; d += kLaneCount) {
      // the addition makes a negative zero a positive one: which it is depends on the keys that are not seen
      const Lanes x = sum == 0 ? zeros() : fma(load(sums + d), inverse, zeros());
      if (size - d >= kLaneCount) {
        store(out + d, x);
      } else {
        store_first(out + d, x, size - d);
      }
    }
  }
}

}  // namespace
}  // namespace mq
