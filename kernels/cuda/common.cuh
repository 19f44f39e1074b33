// What all kernels share: number types, 16-byte vectors, the way a block shares channels and pixels, reductions.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

namespace unlocked {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int kThreads = UNLOCKED_THREADS;              // per block, kernels that write full tensors
constexpr int kReduceThreads = UNLOCKED_REDUCE_THREADS; // per block, kernels that only reduce
constexpr int kHeadThreads = UNLOCKED_HEAD_THREADS;     // per block, the local head
constexpr int kChunk = UNLOCKED_CHUNK;                  // channels per block in channels-last memory

// A type's number in calls from Python (see bindings.py).
enum DataType { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

__device__ __forceinline__ float to_float(float value) { return value; }
__device__ __forceinline__ float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }
__device__ __forceinline__ float to_float(__half value) { return __half2float(value); }

template <typename T>
__device__ __forceinline__ T from_float(float value) {
  if constexpr (sizeof(T) == sizeof(float)) {
    return value;
  } else if constexpr (std::is_same<T, __half>::value) {
    return __float2half_rn(value);
  } else {
    return __float2bfloat16_rn(value);
  }
}

// VEC neighbouring values of type T, moved by one instruction: 16 bytes, or one value. 16-bit values stay packed in
// 32-bit registers until they are read.
template <typename T, int VEC>
struct Pack {
  static_assert(VEC * sizeof(T) == sizeof(uint4), "a vector is 16 bytes");
  uint32_t word[4];

  __device__ __forceinline__ float get(int e) const {
    if constexpr (sizeof(T) == sizeof(float)) {
      return __uint_as_float(word[e]);
    } else if constexpr (std::is_same<T, __half>::value) {
      return __half2float(__ushort_as_half(static_cast<unsigned short>(word[e / 2] >> (e % 2 * 16))));
    } else { // a bfloat16 is the upper half of a float32
      return __uint_as_float(e % 2 ? word[e / 2] & 0xffff0000u : word[e / 2] << 16);
    }
  }
};

template <typename T>
struct Pack<T, 1> {
  T value;
  __device__ __forceinline__ float get(int) const { return to_float(value); }
};

template <typename T, int VEC>
__device__ __forceinline__ Pack<T, VEC> load(const T* address) {
  if constexpr (VEC == 1) {
    return {*address};
  } else {
    const uint4 bits = __ldg(reinterpret_cast<const uint4*>(address));
    return {{bits.x, bits.y, bits.z, bits.w}};
  }
}

__device__ __forceinline__ uint32_t bits_of(__half value) { return __half_as_ushort(value); }
__device__ __forceinline__ uint32_t bits_of(__nv_bfloat16 value) { return __bfloat16_as_ushort(value); }

template <typename T, int VEC>
__device__ __forceinline__ void store(T* address, const float (&values)[VEC]) {
  if constexpr (VEC == 1) {
    *address = from_float<T>(values[0]);
  } else {
    uint32_t word[4];
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      if constexpr (sizeof(T) == sizeof(float)) {
        word[k] = __float_as_uint(values[k]);
      } else {
        word[k] = bits_of(from_float<T>(values[2 * k])) | bits_of(from_float<T>(values[2 * k + 1])) << 16;
      }
    }
    *reinterpret_cast<uint4*>(address) = make_uint4(word[0], word[1], word[2], word[3]);
  }
}

// How a block of THREADS threads shares its work: `across` neighbouring threads cover `channels` channels of one
// pixel with VEC channels each, and the block has `slots` such teams. In contiguous (NCHW) memory a block has one
// channel, and neighbouring threads have neighbouring pixels.
template <int VEC, bool CHANNELS_LAST, int THREADS>
struct Lanes {
  static constexpr int channels = CHANNELS_LAST ? kChunk : 1;
  static constexpr int across = CHANNELS_LAST ? kChunk / VEC : 1;
  static constexpr int slots = THREADS / across;
  static_assert(across <= kWarp && kWarp % across == 0, "a team lies in one warp");
};

// The geometry of a tensor [batch, channels, height, width] and of the work on it; norm_act_geometry.py fills it, field
// by field.
struct Geometry {
  int64_t batch, channels, height, width;
  int64_t grid_h, grid_w;      // windows of one image
  int64_t window_h, window_w;  // pixels of one window
  int64_t cell_h, cell_w;      // pixels of one output value; a window holds whole cells
  int64_t out_h, out_w;        // the output's plane
  int64_t splits;              // teams that share a window, a power of two
  int64_t blocks;              // gridDim.x of the kernel that works on windows
  int64_t groups, group_rows;  // partial sums per channel, and rows (pixels or images) in each
  int64_t channels_last, wide; // memory format; whether 16-byte vectors may be used
};

// Offset of (image, channel) in a tensor with `plane` pixels per image, and the step from one pixel to the next.
template <bool CHANNELS_LAST>
__device__ __forceinline__ int64_t image_offset(int64_t image, int channel, int channels, int64_t plane) {
  return CHANNELS_LAST ? image * plane * channels + channel : (image * channels + channel) * plane;
}

template <bool CHANNELS_LAST>
__device__ __forceinline__ int64_t row_offset(int64_t row, int channel, int channels, int64_t plane) {
  if constexpr (CHANNELS_LAST) return row * channels + channel;
  return (row / plane * channels + channel) * plane + row % plane;
}

// The normalised value, the affine output and the LeakyReLU's slope there. Written with explicit roundings, so that
// the forward and the backward kernels see the same sign.
struct Activation {
  float xhat, slope, value;
};

__device__ __forceinline__ Activation activate(float x, float mean, float rstd, float weight, float bias, float slope) {
  Activation result;
  result.xhat = __fmul_rn(__fsub_rn(x, mean), rstd);
  const float y = __fmaf_rn(result.xhat, weight, bias);
  result.slope = y > 0.0f ? 1.0f : slope;
  result.value = __fmul_rn(y, result.slope);
  return result;
}

// Sum over the warp; every lane gets it, in the same order of additions each time.
template <typename V>
__device__ __forceinline__ V warp_sum(V value) {
#pragma unroll
  for (int step = kWarp / 2; step > 0; step >>= 1) value += __shfl_xor_sync(kAllLanes, value, step);
  return value;
}

// Sums two values over the THREADS / CHANNELS threads that share threadIdx.x % CHANNELS; threads below CHANNELS
// get the totals. `scratch` holds THREADS values; every thread must call.
template <int THREADS, int CHANNELS>
__device__ __forceinline__ float2 sum_by_channel(float2 value, float2* scratch) {
  const int tid = threadIdx.x;
  scratch[tid] = value;
  __syncthreads();
#pragma unroll
  for (int step = THREADS / CHANNELS / 2; step > 0; step >>= 1) {
    if (tid < step * CHANNELS) {
      const float2 other = scratch[tid + step * CHANNELS];
      value.x += other.x;
      value.y += other.y;
      scratch[tid] = value;
    }
    __syncthreads();
  }
  return value;
}

template <typename F>
cudaError_t with_type(int type, F&& function) {
  switch (type) {
    case kFloat32: function(float{}); break;
    case kBFloat16: function(__nv_bfloat16{}); break;
    case kFloat16: function(__half{}); break;
    default: return cudaErrorInvalidValue;
  }
  return cudaGetLastError();
}

// Calls function(T{}, vector width, channels_last) with the last two as compile-time constants.
template <int VALUE>
struct Int {
  static constexpr int value = VALUE;
};

template <typename F>
cudaError_t with_layout(int type, const Geometry& g, F&& function) {
  return with_type(type, [&](auto zero) {
    using T = decltype(zero);
    if (!g.channels_last) {
      function(zero, Int<1>{}, Int<0>{});
    } else if (g.wide) {
      function(zero, Int<16 / sizeof(T)>{}, Int<1>{});
    } else {
      function(zero, Int<1>{}, Int<1>{});
    }
  });
}

inline unsigned channel_chunks(const Geometry& g) {
  const int64_t chunk = g.channels_last ? kChunk : 1;
  return static_cast<unsigned>((g.channels + chunk - 1) / chunk);
}

}  // namespace unlocked
