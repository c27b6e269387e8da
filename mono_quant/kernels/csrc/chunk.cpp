#include "chunk.h"

namespace mq {
namespace {

// One kernel row of a receptive field: `pixel` bytes at every `stride` bytes, zeros outside of the image.
char* copy_pixels(const Patches& p, const char* row, int64_t x, int64_t pixel, int64_t stride, char* target) {
  if (p.dilation_w == 1 && stride == pixel && x >= 0 && x + p.kernel_w <= p.width) {
    std::memcpy(target, row + x * pixel, p.kernel_w * pixel);
    return target + p.kernel_w * pixel;
  }
  for (int64_t i = 0; i < p.kernel_w; ++i, x += p.dilation_w, target += pixel) {
    if (x >= 0 && x < p.width) {
      std::memcpy(target, row + x * stride, pixel);
    } else {
      std::memset(target, 0, pixel);
    }
  }
  return target;
}

void gather(const Linear& layer, int64_t t, char* target) {
  const Patches& p = *layer.patches;
  const int64_t image = t / (p.out_h * p.out_w), y = t / p.out_w % p.out_h, x = t % p.out_w;
  // Several groups share a pixel: it has x.stride values of which this layer sees `channels`.
  const int64_t pixel = p.channels * size_of(layer.x.dtype), stride = layer.x.stride * size_of(layer.x.dtype);
  for (int64_t i = 0; i < p.kernel_h; ++i) {
    const int64_t row = y * p.stride_h - p.padding_h + i * p.dilation_h;
    if (row < 0 || row >= p.height) {
      std::memset(target, 0, p.kernel_w * pixel);
      target += p.kernel_w * pixel;
    } else {
      const char* start = static_cast<const char*>(layer.x.at((image * p.height + row) * p.width));
      target = copy_pixels(p, start, x * p.stride_w - p.padding_w, pixel, stride, target);
    }
  }
}

}  // namespace

bool quantize(const Chunk& chunk, int64_t t) {
  static thread_local Scratch scratch;
  const Linear& layer = chunk.layer;
  const void* row = layer.x.at(chunk.first + t);
  if (layer.patches != nullptr) {
    char* patch = static_cast<char*>(scratch.reserve(layer.depth * size_of(layer.x.dtype)));
    if (patch == nullptr) return false;
    gather(layer, chunk.first + t, patch);
    row = patch;
  }
  Token* token = chunk.tokens_of(t);
  chunk.row_kernels.quantize(row, layer.x.dtype, layer.depth, chunk.padded, layer.group, layer.qmax,
                             chunk.product.code_size, chunk.code_row(t), token);
  if (!chunk.product.unsigned_weights) {
    for (int64_t g = 0; g < chunk.groups; ++g) token[g].correction = 0;
  }
  return true;
}

void finish(const Chunk& chunk, int64_t t, int64_t tokens, int64_t n, int64_t columns, const int32_t* sums,
            int64_t stride) {
  const Linear& layer = chunk.layer;
  const DType dtype = layer.x.dtype;
  char* out = static_cast<char*>(layer.out) + ((chunk.first + t) * layer.out_stride + n) * size_of(dtype);
  const auto run = chunk.groups > 1 ? chunk.row_kernels.finish_totals : chunk.row_kernels.finish;
  const float* weight_scale = layer.weight_scale == nullptr ? nullptr : layer.weight_scale + n;
  run({sums, stride, tokens, columns, chunk.tokens_of(t), weight_scale,
       chunk.bias == nullptr ? nullptr : chunk.bias + n, out, layer.out_stride, dtype});
}

}  // namespace mq
