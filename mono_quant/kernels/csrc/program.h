// Several calls one after another, written down once with the places of their tensors left open: what a graph runs again and
// again costs one call from outside.
#pragma once

#include "common.h"

namespace mq {

enum class StepKind : int64_t { chain = 0, attention = 1, norm = 2, rotary = 3, copy_rows = 4, add_longs = 5, conv = 6 };

// Word `word` of a record is the address `bases[base] + bytes`.
struct Place {
  int64_t word, base, bytes;
};

// One call: its kind, then `places` places and `words` words of a record, as the function of that kind reads it.
struct StepHead {
  StepKind kind;
  int64_t words, places;
};

// source [batch, heads, tokens, size] to the rows `index` of target [batch, heads, rows, size], all of them in order where index
// is null; strides in bytes, a row of `bytes` lies dense.
struct CopyRows {
  int64_t batch, heads, tokens, rows, bytes;
  const char* source;
  int64_t source_batch, source_head, source_row;
  const int64_t* index;
  char* target;
  int64_t target_batch, target_head, target_row;
};

// out[i] = a[i * a_step] + b[i * b_step] + constant; b may be null.
struct AddLongs {
  int64_t count;
  const int64_t* a;
  int64_t a_step;
  const int64_t* b;
  int64_t b_step, constant;
  int64_t* out;
};

// Returns false for an index out of range, and then has written nothing.
bool copy_rows(const CopyRows& copy);
void add_longs(const AddLongs& add);

// Calls `call(kind, record)` for `count` steps in order, until one does not return 0; returns what the last one did.
template <typename Call>
int run_steps(const int64_t* step, int64_t count, const int64_t* bases, int64_t* record, const Call& call) {
  for (int64_t i = 0; i < count; ++i) {
    StepHead head;
    std::memcpy(&head, step, sizeof(head));
    step += sizeof(head) / 8;
    const int64_t* places = step;
    step += head.places * (sizeof(Place) / 8);
    std::memcpy(record, step, head.words * 8);
    step += head.words;
    for (int64_t p = 0; p < head.places; ++p) {
      Place place;
      std::memcpy(&place, places + p * (sizeof(Place) / 8), sizeof(place));
      record[place.word] = bases[place.base] + place.bytes;
    }
    const int result = call(head.kind, record);
    if (result != 0) return result;
  }
  return 0;
}

}  // namespace mq
