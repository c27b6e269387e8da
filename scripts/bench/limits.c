// What this machine can do at best: fused multiply-adds in registers, and reading memory from one end to the other.
// Compiled by limits.py for the vector width under test; LANES is the number of floats in a vector.
#include <omp.h>
#include <stdint.h>

typedef float Floats __attribute__((vector_size(LANES * 4)));
typedef int64_t Words __attribute__((vector_size(LANES * 4)));

// Independent chains hide the latency of the instruction; more would not fit into 16 registers.
enum { CHAINS = 12, STREAMS = 2, UNROLL = 4 };

// Every thread does `steps` rounds of CHAINS multiply-adds.
float multiply_add(int threads, int64_t steps) {
  float total = 0;
#pragma omp parallel num_threads(threads) reduction(+ : total)
  {
    Floats sum[CHAINS], a = {}, b = {};
    a += 0.999f, b += 1e-3f;
    for (int i = 0; i < CHAINS; ++i) sum[i] = b + (float)i;
    for (int64_t step = 0; step < steps; ++step) {
      for (int i = 0; i < CHAINS; ++i) sum[i] = sum[i] * a + b;
    }
    for (int i = 0; i < CHAINS; ++i) total += sum[i][0];
  }
  return total;
}

// Every thread reads its own share of `count` vectors, front to back, in two streams.
int64_t read_all(int threads, const Words* data, int64_t count) {
  int64_t total = 0;
#pragma omp parallel num_threads(threads) reduction(^ : total)
  {
    const int64_t part = count / threads / STREAMS / UNROLL * UNROLL;
    const Words* mine = data + omp_get_thread_num() * part * STREAMS;
    Words sum[STREAMS] = {};
    for (int64_t i = 0; i < part; i += UNROLL) {
      for (int s = 0; s < STREAMS; ++s) {
        for (int u = 0; u < UNROLL; ++u) sum[s] ^= mine[s * part + i + u];
      }
    }
    for (int s = 0; s < STREAMS; ++s) total ^= sum[s][0];
  }
  return total;
}
