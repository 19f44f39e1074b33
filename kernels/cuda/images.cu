// The input operation: a micro-batch out of a resident uint8 data set, augmented and normalised, in one kernel. What
// the numbers mean stands in ../images.py ([Note: draws]); the bits are the same as there.

#include "common.cuh"

namespace unlocked {
namespace {

constexpr int kPixelsPerThread = 4;

struct BatchArgs {
  const uint8_t* images;  // [count, channels, height, width]
  const int64_t* labels;  // [count]
  const int64_t* order;   // [order_size]
  const int64_t *start, *epoch; // []
  const float *mean, *inv_std;  // [channels]
  const int32_t* boxes;         // [box_count, 2], or null: nothing is erased
  float* batch;                 // [size, height, width, channels] in memory
  int64_t* targets;             // [size]
  int64_t count, order_size;
  int channels, height, width, box_count;
  uint32_t key, purpose;
  int flip, padding;
  float erase_probability;
};

struct Uniforms {
  float value[4];
};

// Philox 4x32-10 (Salmon et al. 2011) as in ../philox.py: four uniforms in [0, 1) with 24 bits each.
__device__ Uniforms philox_uniforms(int64_t sample, uint32_t epoch, uint32_t block, uint32_t key0, uint32_t key1) {
  uint32_t c0 = static_cast<uint32_t>(sample), c1 = static_cast<uint32_t>(static_cast<uint64_t>(sample) >> 32);
  uint32_t c2 = epoch, c3 = block;
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = static_cast<uint64_t>(0xD2511F53u) * c0, p1 = static_cast<uint64_t>(0xCD9E8D57u) * c2;
    c0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ key0;
    c1 = static_cast<uint32_t>(p1);
    c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ key1;
    c3 = static_cast<uint32_t>(p0);
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  const float unit = 1.0f / 16777216.0f;
  return {{(c0 >> 8) * unit, (c1 >> 8) * unit, (c2 >> 8) * unit, (c3 >> 8) * unit}};
}

// floor(uniform * count), with the product rounded to float32 as on the CPU.
__device__ __forceinline__ int draw(float uniform, int count) {
  return static_cast<int>(__fmul_rn(uniform, static_cast<float>(count)));
}

// blockIdx.x: the entry of the micro-batch. Neighbouring threads write neighbouring values of its image.
__global__ void __launch_bounds__(kThreads) load_batch_kernel(const BatchArgs a) {
  const int64_t entry = blockIdx.x, position = *a.start + entry;
  const int size = a.channels * a.height * a.width;
  float* out = a.batch + entry * size;
  const int begin = blockIdx.y * (kThreads * kPixelsPerThread) + threadIdx.x;
  // Out of range can't be raised from here; the result says so instead of being somebody else's memory.
  const int64_t sample = position >= 0 && position < a.order_size ? a.order[position] : -1;
  if (sample < 0 || sample >= a.count) {
    for (int k = 0; k < kPixelsPerThread; ++k)
      if (begin + k * kThreads < size) out[begin + k * kThreads] = NAN;
    if (begin == 0) a.targets[entry] = -1;
    return;
  }
  const uint32_t epoch = static_cast<uint32_t>(*a.epoch);
  int top = 0, left = 0;
  bool flipped = false;
  if (a.flip || a.padding) {
    const Uniforms u = philox_uniforms(sample, epoch, 0, a.key, a.purpose);
    flipped = a.flip && u.value[0] < 0.5f;
    top = draw(u.value[1], 2 * a.padding + 1) - a.padding;
    left = draw(u.value[2], 2 * a.padding + 1) - a.padding;
  }
  int erase_top = 0, erase_left = 0, erase_bottom = 0, erase_right = 0;
  if (a.boxes != nullptr) {
    const Uniforms u = philox_uniforms(sample, epoch, 1, a.key, a.purpose);
    if (u.value[0] < a.erase_probability) {
      const int32_t* box = a.boxes + 2 * draw(u.value[1], a.box_count);
      erase_top = draw(u.value[2], a.height - box[0] + 1);
      erase_left = draw(u.value[3], a.width - box[1] + 1);
      erase_bottom = erase_top + box[0];
      erase_right = erase_left + box[1];
    }
  }
  const uint8_t* image = a.images + sample * size;
#pragma unroll
  for (int k = 0; k < kPixelsPerThread; ++k) {
    const int at = begin + k * kThreads;
    if (at < size) {
      const int pixel = at / a.channels, channel = at % a.channels;
      const int row = pixel / a.width, column = pixel % a.width;
      const int source_row = row + top, source_column = (flipped ? a.width - 1 - column : column) + left;
      const bool inside = source_row >= 0 && source_row < a.height && source_column >= 0 && source_column < a.width;
      const float value =
          inside ? static_cast<float>(image[(channel * a.height + source_row) * a.width + source_column]) : 0.0f;
      const bool erased = row >= erase_top && row < erase_bottom && column >= erase_left && column < erase_right;
      out[at] = erased ? 0.0f : __fmul_rn(__fsub_rn(value, a.mean[channel]), a.inv_std[channel]);
    }
  }
  if (begin == 0) a.targets[entry] = a.labels[sample];
}

}  // namespace
}  // namespace unlocked

using namespace unlocked;

extern "C" int unlocked_load_batch(int device, cudaStream_t stream, int64_t size, int64_t count, int64_t order_size,
                                   int channels, int height, int width, const void* images, const void* labels,
                                   const void* order, const void* start, const void* epoch, const void* mean,
                                   const void* inv_std, const void* boxes, int box_count, void* batch, void* targets,
                                   int64_t key, int purpose, int flip, int padding, float erase_probability) {
  if (const cudaError_t error = cudaSetDevice(device)) return error;
  BatchArgs a;
  a.images = static_cast<const uint8_t*>(images);
  a.labels = static_cast<const int64_t*>(labels);
  a.order = static_cast<const int64_t*>(order);
  a.start = static_cast<const int64_t*>(start);
  a.epoch = static_cast<const int64_t*>(epoch);
  a.mean = static_cast<const float*>(mean);
  a.inv_std = static_cast<const float*>(inv_std);
  a.boxes = static_cast<const int32_t*>(boxes);
  a.batch = static_cast<float*>(batch);
  a.targets = static_cast<int64_t*>(targets);
  a.count = count;
  a.order_size = order_size;
  a.channels = channels;
  a.height = height;
  a.width = width;
  a.box_count = box_count;
  a.key = static_cast<uint32_t>(key);
  a.purpose = static_cast<uint32_t>(purpose);
  a.flip = flip;
  a.padding = padding;
  a.erase_probability = erase_probability;
  const int per_block = kThreads * kPixelsPerThread;
  const dim3 grid(static_cast<unsigned>(size), static_cast<unsigned>((channels * height * width + per_block - 1) / per_block));
  load_batch_kernel<<<grid, kThreads, 0, stream>>>(a);
  return cudaGetLastError();
}
