// Calls every entry of the kernel library on buffers of exactly the right size, for AddressSanitizer and valgrind:
// see scripts/sanitize. Prints a checksum; the checking is theirs.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <vector>

extern "C" {
int mq_isas();
int mq_linear(int, int, int64_t, int, int64_t, int64_t, int64_t, const void*, int, int64_t, const int8_t*,
              const int32_t*, const float*, const void*, int, void*, int64_t);
int64_t mq_packed_words(int, int, int64_t, int64_t);
int mq_pack(int, int, int, int64_t, int64_t, int64_t, const int8_t*, int32_t*);
int mq_half_linear(int, int, int64_t, int64_t, int64_t, const void*, int, int64_t, const void*, const void*, int, void*,
                   int64_t);
int mq_conv(int, int, int64_t, int, const int64_t*, const void*, int, const int8_t*, const int32_t*, const float*,
            const void*, int, void*);
int mq_quantize_rows(int, int64_t, int64_t, const void*, int, int64_t, int, int8_t*, float*, double*);
int mq_to_half(int, int64_t, const void*, int, void*, int64_t*);
int mq_embedding(int, int64_t, int64_t, int64_t, const int64_t*, const int8_t*, const float*, void*, int);
int mq_transpose(int, int64_t, int64_t, int64_t, int64_t, const void*, void*);
int mq_attention(const void*);
}

// In driver_chains.cpp.
uint64_t drive_chains(int isas);

// In driver_layers.cpp.
void drive_layers(int isa);

namespace {

uint32_t state = 1;
uint64_t checksum = 0;

uint32_t random_bits() { return state = state * 1664525u + 1013904223u; }

// Small finite values in any of the three float types.
std::vector<char> floats(int64_t n, int dtype) {
  std::vector<char> data(n * (dtype == 0 ? 4 : 2));
  for (int64_t i = 0; i < n; ++i) {
    if (dtype == 0) {
      reinterpret_cast<float*>(data.data())[i] = static_cast<float>(random_bits() >> 8) / (1 << 23) - 1;
    } else {
      const uint16_t sign = random_bits() >> 16 & 0x8000;
      reinterpret_cast<uint16_t*>(data.data())[i] = sign | ((dtype == 1 ? 0x3800 : 0x3f00) + (random_bits() >> 26));
    }
  }
  return data;
}

std::vector<int8_t> bytes(int64_t n) {
  std::vector<int8_t> data(n);
  for (int8_t& b : data) b = static_cast<int8_t>(random_bits() >> 24);
  return data;
}

void add(int status, const void* data, size_t size) {
  if (status != 0) std::abort();
  for (size_t i = 0; i < size; ++i) checksum = checksum * 31 + static_cast<const uint8_t*>(data)[i];
}

struct Free {
  void operator()(void* memory) const { std::free(memory); }
};
using Words = std::unique_ptr<int32_t, Free>;

// The weights packed, in exactly as much memory as they say; null where a path packs nothing.
Words pack(int isa, int qmax, int64_t groups, int64_t rows, int64_t depth, int threads,
           const std::vector<int8_t>& weight) {
  const int64_t count = groups * mq_packed_words(isa, qmax, rows, depth);
  if (count == 0) return nullptr;
  Words words(static_cast<int32_t*>(std::aligned_alloc(64, count * 4)));
  if (mq_pack(isa, qmax, threads, groups, rows, depth, weight.data(), words.get()) != 0) std::abort();
  return words;
}

void linears(int isa, int64_t tokens, int64_t rows, int64_t depth, int dtype, int threads) {
  const auto x = floats(tokens * depth, dtype), scale = floats(rows, 0), bias = floats(rows, dtype);
  std::vector<char> out(tokens * rows * (dtype == 0 ? 4 : 2));
  const auto weight = bytes(rows * depth);
  const int wide = depth <= 8192 ? 2047 : 511;
  for (int qmax : {127, wide}) {
    const Words packed = pack(isa, qmax, 1, rows, depth, threads, weight);
    for (int64_t group : {0, 64, 128}) {
      if (qmax == wide && group != 0) continue;
      for (const int32_t* words : {static_cast<const int32_t*>(nullptr), static_cast<const int32_t*>(packed.get())}) {
        add(mq_linear(isa, qmax, group, threads, tokens, rows, depth, x.data(), dtype, depth, weight.data(), words,
                      reinterpret_cast<const float*>(scale.data()), bias.data(), dtype, out.data(), rows),
            out.data(), out.size());
        if (packed == nullptr) break;
      }
    }
  }
  if (isa == 0) return;
  const auto half = floats(rows * depth, 1);
  add(mq_half_linear(isa, threads, tokens, rows, depth, x.data(), dtype, depth, half.data(), nullptr, 0, out.data(),
                     rows),
      out.data(), out.size());
}

void convs(int isa, int64_t groups, int dtype, int threads) {
  const int64_t images = 2, rows = 5, height = 9, width = 7, channels = 13;
  // images, groups, rows, height, width, channels, kernel, stride, padding, dilation, out
  const int64_t shape[16] = {images, groups, rows, height, width, channels, 3, 2, 2, 1, 2, 1, 2, 1, 5, 8};
  const auto x = floats(images * height * width * groups * channels, dtype), scale = floats(groups * rows, 0);
  const auto weight = bytes(groups * rows * 3 * 2 * channels);
  std::vector<char> out(images * 5 * 8 * groups * rows * (dtype == 0 ? 4 : 2));
  const Words packed = pack(isa, 127, groups, rows, 3 * 2 * channels, threads, weight);
  for (int64_t group : {0, 64}) {
    for (const int32_t* words : {static_cast<const int32_t*>(nullptr), static_cast<const int32_t*>(packed.get())}) {
      add(mq_conv(isa, 127, group, threads, shape, x.data(), dtype, weight.data(), words,
                  reinterpret_cast<const float*>(scale.data()), nullptr, 0, out.data()),
          out.data(), out.size());
    }
  }
}

void transposes(int64_t rows, int64_t columns, int dtype, int threads) {
  const int64_t images = 3, size = dtype == 0 ? 4 : 2;
  const auto source = floats(images * rows * columns, dtype);
  std::vector<char> target(source.size());
  add(mq_transpose(threads, images, rows, columns, size, source.data(), target.data()), target.data(), target.size());
}

void conversions(int64_t rows, int64_t depth, int dtype, int threads) {
  const auto x = floats(rows * depth, dtype);
  std::vector<int8_t> codes(rows * depth);
  std::vector<float> scale(rows);
  std::vector<double> energy(2 * rows);
  add(mq_quantize_rows(threads, rows, depth, x.data(), dtype, depth, dtype, codes.data(), scale.data(), energy.data()),
      codes.data(), codes.size());
  std::vector<uint16_t> half(rows * depth);
  int64_t counts[4];
  if (dtype != 1) add(mq_to_half(threads, rows * depth, x.data(), dtype, half.data(), counts), half.data(), half.size() * 2);
  const int64_t index[3] = {rows - 1, 0, rows / 2};
  std::vector<char> out(3 * depth * (dtype == 0 ? 4 : 2));
  add(mq_embedding(threads, 3, rows, depth, index, codes.data(), scale.data(), out.data(), dtype), out.data(),
      out.size());
}

// As attention.h has it: strides of dense [batch, heads, length, size], of a mask for all heads.
struct AttentionCall {
  int64_t isa, threads, dtype, batch, heads, key_heads, queries, keys, size, value_size;
  const void* q;
  int64_t q_strides[4];
  const void* k;
  int64_t k_strides[4];
  const void* v;
  int64_t v_strides[4];
  int64_t mask_kind;
  const void* mask;
  int64_t mask_strides[4];
  int64_t causal, window;
  double scale;
  void* out;
  int64_t out_strides[4];
};

void dense(int64_t heads, int64_t length, int64_t size, int64_t* strides) {
  strides[0] = heads * length * size, strides[1] = length * size, strides[2] = size, strides[3] = 1;
}

void attentions(int isa, int dtype, int64_t queries, int64_t keys, int64_t size, int kind, int threads) {
  // many heads of 49 queries: a thread takes several then, and fetches the next one's rows
  const int64_t batch = queries == 49 ? 9 : 2, heads = 4, key_heads = 1 + queries % 2, value_size = size % 7 + 3;
  const auto q = floats(batch * heads * queries * size, dtype), k = floats(batch * key_heads * keys * size, dtype);
  const auto v = floats(batch * key_heads * keys * value_size, dtype);
  const auto mask = floats(batch * queries * keys, 0);
  std::vector<char> bytes_mask(batch * queries * keys), out(batch * heads * queries * value_size * 4);
  for (char& b : bytes_mask) b = random_bits() >> 31;
  AttentionCall call = {isa, threads, dtype, batch, heads, key_heads, queries, keys, size, value_size};
  call.q = q.data(), call.k = k.data(), call.v = v.data(), call.out = out.data();
  dense(heads, queries, size, call.q_strides);
  dense(key_heads, keys, size, call.k_strides);
  dense(key_heads, keys, value_size, call.v_strides);
  dense(heads, queries, value_size, call.out_strides);
  call.mask_kind = kind;
  call.mask = kind == 1 ? mask.data() : bytes_mask.data();
  call.mask_strides[0] = queries * keys, call.mask_strides[2] = keys, call.mask_strides[3] = 1;
  call.causal = size % 2, call.window = size % 2 * (keys % 3) * 50;
  call.scale = 0.25;
  add(mq_attention(&call), out.data(), out.size());
}

}  // namespace

int main() {
  const int isas = mq_isas();
  for (int isa = 0; isa < 6; ++isa) {
    // 5 is the twin of 2 that processors with 4 can run
    if (!(isas >> (isa == 5 ? 4 : isa) & 1)) continue;
    for (int64_t depth : {1, 2, 15, 17, 31, 64, 65, 100, 192, 321, 2049}) {
      for (int64_t rows : {1, 3, 16, 17, 47, 49}) {
        for (int64_t tokens : {1, 2, 5, 7, 13, 61}) linears(isa, tokens, rows, depth, (rows + tokens) % 3, tokens % 3);
      }
    }
    linears(isa, 3, 5, 133144, 0, 1);
    linears(isa, 700, 50, 4100, 0, 2);
    for (int64_t depth : {1, 31, 65, 300}) linears(isa, 1030, 49, depth, depth % 3, 1 + depth % 2);
    for (int dtype = 0; dtype < 3; ++dtype) convs(isa, 1 + dtype, dtype, 1 + dtype);
  }
  for (int isa = 0; isa < 6; ++isa) {
    if (!(isas >> isa & 1)) continue;
    for (int64_t keys : {1, 15, 64, 100, 257, 530}) {
      for (int64_t queries : {1, 2, 13, 49, 200}) {
        for (int64_t size : {1, 16, 33, 80}) attentions(isa, (queries + size) % 3, queries, keys, size, (keys + size) % 3, 1 + queries % 2);
      }
    }
    // more threads than heads
    attentions(isa, 0, 1, 2000, 64, 2, 16);
  }
  for (int isa = 0; isa < 6; ++isa) {
    if (isas >> isa & 1) drive_layers(isa);
  }
  for (int64_t rows : {1, 7, 8, 33, 200}) {
    for (int64_t columns : {1, 8, 31, 65}) transposes(rows, columns, (rows + columns) % 2, 2);
  }
  if (isas >> 1 & 1) {
    for (int64_t depth : {1, 7, 8, 31, 32, 33, 1000}) {
      for (int dtype = 0; dtype < 3; ++dtype) conversions(67, depth, dtype, 1 + dtype);
    }
  }
  checksum = checksum * 31 + drive_chains(isas);
  std::printf("paths %d, checksum %016llx\n", isas, static_cast<unsigned long long>(checksum));
  return 0;
}
