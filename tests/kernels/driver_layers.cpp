// Calls the entries for convolutions with what follows them and for recurrent layers, as driver.cpp does the others.
#include <cstdint>
#include <cstdlib>
#include <vector>

extern "C" {
int mq_fused_conv(int, int, int64_t, int, const int64_t*, const float*, const int8_t*, const int32_t*, const float*,
                  const float*, const float*, const float*, const float*, const float*, double, const float*, int, float*);
int mq_recurrent(int, int, int64_t, int, int, int64_t, const int64_t*, int, int64_t, const float*, const int8_t*,
                 const int32_t*, const float*, const float*, float*, float*, float*, int64_t);
int mq_run_apart(const int64_t*, int64_t, const int64_t*, int64_t, int64_t, int64_t, int64_t, int);
}

namespace {

uint32_t state = 7;

uint32_t random_bits() { return state = state * 1664525u + 1013904223u; }

std::vector<float> floats(int64_t n) {
  std::vector<float> data(n);
  for (float& value : data) value = static_cast<float>(random_bits() >> 8) / (1 << 24) + 0.01f;
  return data;
}

std::vector<int8_t> bytes(int64_t n) {
  std::vector<int8_t> data(n);
  for (int8_t& b : data) b = static_cast<int8_t>(random_bits() >> 24);
  return data;
}

// Where the library has no kernel (1) the caller has another way.
void check(int status, int isa) {
  if (status != 0 && !(isa == 0 && status == 1)) std::abort();
}

struct Sizes {
  int64_t groups, rows, channels, kernel, stride, padding, dilation;
};

void conv(int isa, const Sizes& s, int qmax, int64_t group, int threads) {
  const int64_t images = 2, height = 9, width = 11, reach = s.dilation * (s.kernel - 1) + 1;
  const int64_t out_h = (height + 2 * s.padding - reach) / s.stride + 1;
  const int64_t out_w = (width + 2 * s.padding - reach) / s.stride + 1;
  const int64_t shape[16] = {images,    s.groups,  s.rows,    height,     width,      s.channels, s.kernel, s.kernel,
                             s.stride,  s.stride,  s.padding, s.padding,  s.dilation, s.dilation, out_h,    out_w};
  const int64_t rows = s.groups * s.rows, places = images * out_h * out_w;
  const auto x = floats(images * height * width * s.groups * s.channels), residual = floats(places * rows);
  const auto weight = bytes(rows * s.kernel * s.kernel * s.channels);
  const auto scale = floats(rows), bias = floats(rows), gamma = floats(rows), mean = floats(rows), var = floats(rows);
  std::vector<float> out(places * rows);
  check(mq_fused_conv(isa, qmax, group, threads, shape, x.data(), weight.data(), nullptr, scale.data(), bias.data(),
                      gamma.data(), bias.data(), mean.data(), var.data(), 1e-5, residual.data(), 1, out.data()),
        isa);
  check(mq_fused_conv(isa, qmax, group, threads, shape, x.data(), weight.data(), nullptr, scale.data(), nullptr, nullptr,
                      nullptr, nullptr, nullptr, 0, nullptr, 0, out.data()),
        isa);
}

void recurrent(int isa, int cell, int64_t size, bool backward, int64_t group, int threads) {
  const std::vector<int64_t> sizes = {21, 21, 7, 2, 1};
  const int64_t gates = cell == 0 ? 4 : cell == 1 ? 3 : 1, places = 52;
  const auto given = floats(places * gates * size), scale = floats(gates * size), bias = floats(gates * size);
  const auto weight = bytes(gates * size * size);
  auto last = floats(sizes[0] * size), cells = floats(sizes[0] * size);
  std::vector<float> out(places * size);
  if (mq_recurrent(isa, 127, group, threads, cell, 5, sizes.data(), backward, size, given.data(), weight.data(), nullptr,
                   scale.data(), bias.data(), last.data(), cells.data(), out.data(), size) != 0) {
    std::abort();
  }
}

// Numbers are added by two steps, the first of which leaves its sums in memory of a thread's own.
void parts(int64_t count, int threads) {
  constexpr int64_t kNumbers = 9, kAddLongs = 5, kWords = 7, kBases = 3;
  // kind, words, places; of these the word, its base and an offset; count, a, its step, b, its step, constant, out
  const std::vector<int64_t> program = {
      kAddLongs, kWords, 2, 1, 0, 0, 6, 2, 0, kNumbers, 0, 1, 0, 0, 5, 0,
      kAddLongs, kWords, 3, 1, 2, 0, 3, 0, 0, 6, 1, 0, kNumbers, 0, 1, 0, 1, 0, 0};
  std::vector<int64_t> given(count * kNumbers), out(count * kNumbers), between(threads * kNumbers), bases;
  for (int64_t& number : given) number = random_bits();
  const auto address = [](const int64_t* place) { return reinterpret_cast<int64_t>(place); };
  for (int64_t i = 0; i < count; ++i) {
    for (const int64_t base : {address(given.data() + i * kNumbers), address(out.data() + i * kNumbers), address(between.data())}) {
      bases.push_back(base);
    }
  }
  if (mq_run_apart(program.data(), 2, bases.data(), count, kBases, kNumbers * 8, kWords, threads) != 0) std::abort();
  for (size_t i = 0; i < given.size(); ++i) {
    if (out[i] != 2 * given[i] + 5) std::abort();
  }
}

}  // namespace

void drive_layers(int isa) {
  const Sizes sizes[] = {{1, 5, 3, 7, 2, 3, 1},   {1, 50, 64, 3, 1, 1, 1}, {1, 17, 128, 3, 2, 1, 2}, {1, 49, 130, 1, 1, 0, 1},
                         {1, 33, 20, 1, 2, 1, 1}, {2, 9, 64, 3, 1, 1, 1},  {4, 1, 1, 3, 1, 1, 1}};
  for (const Sizes& s : sizes) {
    for (int qmax : {127, 2047}) {
      for (int64_t group : {0, 64, 128}) conv(isa, s, qmax, group, 1 + static_cast<int>(group) / 64);
    }
  }
  for (int64_t count : {0, 1, 7, 32}) parts(count, 1 + static_cast<int>(count) % 4);
  for (int cell = 0; cell < 4; ++cell) {
    for (int64_t size : {1, 16, 67, 130}) recurrent(isa, cell, size, size % 2, size == 130 ? 64 : 0, 1 + cell % 2);
  }
}
