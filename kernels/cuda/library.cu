// What the Python side asks of CUDA's runtime itself.

#include "common.cuh"

extern "C" const char* unlocked_error_name(int error) { return cudaGetErrorName(static_cast<cudaError_t>(error)); }

extern "C" const char* unlocked_error_text(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

extern "C" int unlocked_multiprocessors(int device) {
  int value = 0;
  return cudaDeviceGetAttribute(&value, cudaDevAttrMultiProcessorCount, device) == cudaSuccess ? value : 1;
}

// The most bytes that one block may ask for.
extern "C" int unlocked_shared_memory(int device) {
  int value = 0;
  const cudaError_t error = cudaDeviceGetAttribute(&value, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  return error == cudaSuccess ? value : 48 * 1024;
}

// For a test: `Geometry` is laid out twice.
extern "C" int unlocked_geometry_bytes(int) { return static_cast<int>(sizeof(unlocked::Geometry)); }
