// What the kernels' sources use of CUDA's runtime and language, for a plain C++ compiler.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <tuple>

#define __global__
#define __device__
#define __shared__ static  // one OS thread runs the threads of one block at a time
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __align__(bytes) __attribute__((aligned(bytes)))

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorInvalidConfiguration = 9, cudaErrorLaunchFailure = 719 };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount = 16, cudaDevAttrMaxSharedMemoryPerBlockOptin = 97 };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
using cudaStream_t = void*;

struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
using std::isfinite;
inline float2 make_float2(float x, float y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

namespace emulator {
struct Place {
  dim3 thread, block, block_size, grid_size;
};
extern Place place;  // of the thread that runs
void launch(const char* name, const void* kernel, dim3 grid, dim3 block, size_t shared_bytes, void (*run)(void*), void* arguments,
            size_t argument_bytes);
void* dynamic_shared();
void barrier(const char* file, int line);
uint64_t exchange(unsigned lanes, uint64_t value, int lane_mask, const char* file, int line);
void allow_dynamic_shared(const void* kernel, size_t bytes);

template <typename V>
V shuffle_xor(unsigned lanes, V value, int lane_mask, const char* file, int line) {
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  bits = exchange(lanes, bits, lane_mask, file, line);
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

template <typename... Parameters>
struct Call {
  void (*kernel)(Parameters...);
  std::tuple<Parameters...> arguments;
  static void run(void* self) { std::apply(static_cast<Call*>(self)->kernel, static_cast<Call*>(self)->arguments); }
};

// `kernel<<<grid, block, shared_bytes, stream>>>(arguments...)`, run before it returns.
template <typename... Parameters, typename... Arguments>
void launch_kernel(const char* name, void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t,
                   const Arguments&... arguments) {
  Call<Parameters...> call{kernel, {arguments...}};
  launch(name, reinterpret_cast<const void*>(kernel), grid, block, shared_bytes, Call<Parameters...>::run, &call, sizeof call);
}

// The value as it is now: what is added to it later can't be contracted with its multiplication.
__forceinline__ float rounded(float value) {
  asm("" : "+m"(value));
  return value;
}
}  // namespace emulator

#define threadIdx ::emulator::place.thread
#define blockIdx ::emulator::place.block
#define blockDim ::emulator::place.block_size
#define gridDim ::emulator::place.grid_size
#define __syncthreads() ::emulator::barrier(__FILE__, __LINE__)
#define __shfl_xor_sync(lanes, value, mask) ::emulator::shuffle_xor(lanes, value, mask, __FILE__, __LINE__)

template <typename T>
__forceinline__ T __ldg(const T* address) { return *address; }
__forceinline__ float __fmul_rn(float a, float b) { return emulator::rounded(a * b); }
__forceinline__ float __fadd_rn(float a, float b) { return emulator::rounded(a + b); }
__forceinline__ float __fsub_rn(float a, float b) { return emulator::rounded(a - b); }
__forceinline__ float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }

template <typename To, typename From>
__forceinline__ To same_bits(From value) {
  To result;
  static_assert(sizeof result == sizeof value);
  std::memcpy(&result, &value, sizeof result);
  return result;
}
__forceinline__ float __uint_as_float(unsigned bits) { return same_bits<float>(bits); }
__forceinline__ unsigned __float_as_uint(float value) { return same_bits<unsigned>(value); }

// By names of their own: a torch for CUDA has loaded functions of the usual ones, which the kernels would call instead.
#define cudaSetDevice emulated_cudaSetDevice
#define cudaGetLastError emulated_cudaGetLastError
#define cudaGetErrorName emulated_cudaGetErrorName
#define cudaGetErrorString emulated_cudaGetErrorString
#define cudaDeviceGetAttribute emulated_cudaDeviceGetAttribute
extern "C" {
cudaError_t cudaSetDevice(int device);
cudaError_t cudaGetLastError();
const char* cudaGetErrorName(cudaError_t error);
const char* cudaGetErrorString(cudaError_t error);
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);
}
template <typename Kernel>
cudaError_t cudaFuncSetAttribute(Kernel* kernel, cudaFuncAttribute, int bytes) {
  emulator::allow_dynamic_shared(reinterpret_cast<const void*>(kernel), static_cast<size_t>(bytes));
  return cudaSuccess;
}
