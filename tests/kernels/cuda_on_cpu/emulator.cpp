// Runs CUDA kernels on one CPU thread: a block's threads are fibers that take turns in a random order, at barriers and
// warp collectives only. Every access to memory is watched (the kernels are compiled with -fsanitize=thread and
// -fsanitize=alignment,bounds,..., whose hooks are here): it must lie in a tensor or in the block's shared memory, and
// no two threads may touch the same bytes, one of them writing, without a barrier between them.

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <memory>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "shim/cuda_runtime.h"

namespace emulator {
Place place;

namespace {

constexpr unsigned kMostThreads = 1024, kWarp = 32;
constexpr size_t kStackBytes = 128 << 10, kDefaultShared = 48 << 10, kMostShared = 227 << 10;
constexpr uint16_t kMany = 0xffff;

// What happened last to two neighbouring bytes. Times are epochs: they rise at every barrier, block and launch.
struct Cell {
  uint32_t write = 0, read = 0, first_read = 0; // first_read: the first of the newest launch
  uint16_t writer = 0, reader = 0;              // threads; kMany: several read
};

struct Range {
  uintptr_t begin = 0, end = 0;
  bool shared = false;
  std::vector<Cell> cells;
  bool holds(uintptr_t address) const { return address - begin < end - begin; }
  void resize(const void* start, size_t bytes) {
    begin = reinterpret_cast<uintptr_t>(start);
    end = begin + bytes;
    cells.assign(bytes / 2 + 2, Cell{});
  }
};

enum State { kReady, kAtBarrier, kAtShuffle, kDone };
struct Fiber {
  State state;
  bool started = false;
  jmp_buf context;
  const char* file; // of what it waits at
  int line;
};

struct Warp {
  unsigned arrived, lanes, turn;
  uint64_t values[2][kWarp]; // a lane may come to the next shuffle before its neighbour has read this one's
};

struct Machine {
  std::vector<Range> tensors; // by address, none overlaps another
  Range fixed, dynamic;       // shared memory
  size_t last = 0;            // the tensor found last
  std::vector<std::pair<const void*, size_t>> allowed_shared;
  std::unique_ptr<char[]> stacks{new char[kMostThreads * kStackBytes]};
  Fiber fibers[kMostThreads];
  Warp warps[kMostThreads / kWarp];
  std::vector<unsigned> ready;
  jmp_buf scheduler;
  int running = -1;
  bool aborted = false;
  uint32_t epoch = 0, launch_start = 0, block_start = 0;
  std::mt19937 random{0};
  const char* kernel = "";
  void (*run)(void*) = nullptr;
  void* arguments = nullptr;
  size_t argument_bytes = 0;
  int multiprocessors = 132;
  cudaError_t error = cudaSuccess;
  std::string message;
} machine;

void fail(const std::string& what, cudaError_t error = cudaErrorLaunchFailure) {
  Machine& m = machine;
  if (m.error == cudaSuccess) {
    m.error = error;
    m.message = what + " (kernel " + m.kernel;
    if (m.running >= 0) {
      m.message += ", block (" + std::to_string(place.block.x) + ", " + std::to_string(place.block.y) + "), thread " +
                   std::to_string(m.running);
    }
    m.message += ")";
  }
  if (m.running < 0) return;
  m.aborted = true;
  _longjmp(m.scheduler, 1);
}

void pause() {
  Fiber& fiber = machine.fibers[machine.running];
  if (!_setjmp(fiber.context)) _longjmp(machine.scheduler, 1);
}

void fiber_main() {
  for (;;) {
    machine.run(machine.arguments);
    machine.fibers[machine.running].state = kDone;
    pause();
  }
}

void resume(unsigned thread) {
  Machine& m = machine;
  Fiber& fiber = m.fibers[thread];
  const dim3 size = place.block_size;
  place.thread = dim3(thread % size.x, thread / size.x % size.y, thread / size.x / size.y);
  m.running = static_cast<int>(thread);
  if (!_setjmp(m.scheduler)) {
    if (fiber.started) _longjmp(fiber.context, 1);
    fiber.started = true;
    static ucontext_t context;
    getcontext(&context);
    context.uc_stack.ss_sp = m.stacks.get() + thread * kStackBytes;
    context.uc_stack.ss_size = kStackBytes;
    context.uc_link = nullptr;
    makecontext(&context, fiber_main, 0);
    setcontext(&context);
  }
  m.running = -1;
}

std::string site(const Fiber& fiber) { return std::string(fiber.file) + ":" + std::to_string(fiber.line); }

// Lets the threads go on if all that live are at one barrier.
void release_barrier(unsigned threads) {
  Machine& m = machine;
  const Fiber* first = nullptr;
  for (unsigned t = 0; t < threads; ++t) {
    const Fiber& fiber = m.fibers[t];
    if (fiber.state == kDone) continue;
    if (first == nullptr) first = &fiber;
    if (fiber.state != kAtBarrier) return fail("threads wait for ever: one at the shuffle of " + site(fiber));
    if (fiber.line != first->line || std::strcmp(fiber.file, first->file) != 0)
      return fail("threads wait at different barriers: " + site(*first) + " and " + site(fiber));
  }
  if (first == nullptr) return;
  ++m.epoch;
  for (unsigned t = 0; t < threads; ++t) {
    if (m.fibers[t].state == kDone) continue;
    m.fibers[t].state = kReady;
    m.ready.push_back(t);
  }
}

void run_block(unsigned threads) {
  Machine& m = machine;
  m.block_start = ++m.epoch;
  for (Range* range : {&m.fixed, &m.dynamic}) // float NaN, integer -1
    std::memset(reinterpret_cast<void*>(range->begin), 0xff, range->end - range->begin);
  for (Warp& warp : m.warps) warp.arrived = warp.turn = 0;
  m.ready.clear();
  for (unsigned t = 0; t < threads; ++t) {
    m.fibers[t].state = kReady;
    m.ready.push_back(t);
  }
  m.aborted = false;
  while (!m.ready.empty() && !m.aborted) {
    std::swap(m.ready[m.random() % m.ready.size()], m.ready.back());
    const unsigned thread = m.ready.back();
    m.ready.pop_back();
    resume(thread);
    if (m.ready.empty() && !m.aborted) release_barrier(threads);
  }
  if (m.error == cudaSuccess) return;
  for (Fiber& fiber : m.fibers) fiber.started = false; // what was on their stacks is given up
}

Range* find(uintptr_t address) {
  Machine& m = machine;
  if (m.last < m.tensors.size() && m.tensors[m.last].holds(address)) return &m.tensors[m.last];
  if (m.dynamic.holds(address)) return &m.dynamic;
  if (m.fixed.holds(address)) return &m.fixed;
  const auto after = std::upper_bound(m.tensors.begin(), m.tensors.end(), address,
                                      [](uintptr_t a, const Range& range) { return a < range.begin; });
  if (after == m.tensors.begin() || !(after - 1)->holds(address)) return nullptr;
  m.last = static_cast<size_t>(after - 1 - m.tensors.begin());
  return &m.tensors[m.last];
}

bool inside(uintptr_t address, const void* begin, size_t bytes) {
  return address - reinterpret_cast<uintptr_t>(begin) < bytes;
}

void race(const Range& range, bool writes, const char* done, unsigned thread) {
  const std::string who = thread == kMany ? "several threads have " : "thread " + std::to_string(thread) + " has ";
  fail(std::string("race: ") + (writes ? "writes" : "reads") + (range.shared ? " shared memory" : " a tensor's memory") +
       " that " + who + done);
}

void access(const void* pointer, size_t bytes, bool writes) {
  Machine& m = machine;
  const uintptr_t address = reinterpret_cast<uintptr_t>(pointer);
  if (m.running < 0 || inside(address, m.stacks.get(), kMostThreads * kStackBytes)) return;
  if (inside(address, &place, sizeof place) || inside(address, m.arguments, m.argument_bytes)) return;
  Range* range = find(address);
  if (range == nullptr || address + bytes > range->end)
    return fail(std::string(writes ? "writes" : "reads") + " outside of every tensor and of shared memory");
  const uint32_t start = range->shared ? m.block_start : m.launch_start;
  const uint16_t me = static_cast<uint16_t>(m.running);
  const size_t first = (address - range->begin) / 2, last = (address + bytes - 1 - range->begin) / 2;
  for (size_t k = first; k <= last; ++k) {
    Cell& cell = range->cells[k];
    const auto conflict = [&](uint32_t earliest, uint32_t time, uint16_t thread) {
      return (earliest >= start && earliest < m.block_start) || (time == m.epoch && thread != me);
    };
    if (conflict(cell.write, cell.write, cell.writer)) return race(*range, writes, "written", cell.writer);
    if (!writes) {
      if (cell.first_read < start) cell.first_read = m.epoch;
      cell.reader = cell.read == m.epoch && cell.reader != me ? kMany : me;
      cell.read = m.epoch;
    } else {
      if (conflict(cell.first_read, cell.read, cell.reader)) return race(*range, writes, "read", cell.reader);
      cell.write = m.epoch;
      cell.writer = me;
    }
  }
}

} // namespace

void launch(const char* name, const void* kernel, dim3 grid, dim3 block, size_t shared_bytes, void (*run)(void*),
            void* arguments, size_t argument_bytes) {
  Machine& m = machine;
  if (m.error != cudaSuccess) return;
  m.kernel = name;
  const uint64_t threads = uint64_t(block.x) * block.y * block.z, blocks = uint64_t(grid.x) * grid.y * grid.z;
  if (blocks == 0 || grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535 || threads == 0 || threads > kMostThreads)
    return fail("a grid or a block that CUDA refuses", cudaErrorInvalidConfiguration);
  size_t allowed = kDefaultShared;
  for (const auto& [known, bytes] : m.allowed_shared)
    if (known == kernel) allowed = std::max(allowed, bytes);
  if (shared_bytes > std::min(allowed, kMostShared))
    return fail("more shared memory than was asked for", cudaErrorInvalidValue);
  const std::unique_ptr<float4[]> dynamic(new float4[shared_bytes / sizeof(float4) + 1]);
  m.dynamic.resize(dynamic.get(), shared_bytes);
  m.run = run;
  m.arguments = arguments;
  m.argument_bytes = argument_bytes;
  place.block_size = block;
  place.grid_size = grid;
  m.launch_start = ++m.epoch;
  std::vector<uint64_t> order(blocks);
  for (uint64_t b = 0; b < blocks; ++b) order[b] = b;
  std::shuffle(order.begin(), order.end(), m.random);
  for (const uint64_t b : order) {
    place.block = dim3(static_cast<unsigned>(b % grid.x), static_cast<unsigned>(b / grid.x % grid.y),
                       static_cast<unsigned>(b / grid.x / grid.y));
    run_block(static_cast<unsigned>(threads));
    if (m.error != cudaSuccess) break;
  }
  m.dynamic.resize(nullptr, 0);
}

void* dynamic_shared() { return reinterpret_cast<void*>(machine.dynamic.begin); }

void allow_dynamic_shared(const void* kernel, size_t bytes) { machine.allowed_shared.emplace_back(kernel, bytes); }

void barrier(const char* file, int line) {
  Fiber& fiber = machine.fibers[machine.running];
  fiber.state = kAtBarrier;
  fiber.file = file;
  fiber.line = line;
  pause();
}

uint64_t exchange(unsigned lanes, uint64_t value, int lane_mask, const char* file, int line) {
  Machine& m = machine;
  const unsigned thread = static_cast<unsigned>(m.running), lane = thread % kWarp;
  Fiber& fiber = m.fibers[thread];
  Warp& warp = m.warps[thread / kWarp];
  const unsigned from = lane ^ static_cast<unsigned>(lane_mask), turn = warp.turn;
  if (from >= kWarp || !(lanes >> lane & 1) || !(lanes >> from & 1)) fail("a shuffle with lanes that its mask leaves out");
  if (warp.arrived != 0 && warp.lanes != lanes) fail("a shuffle with different masks");
  warp.lanes = lanes;
  warp.values[turn][lane] = value;
  warp.arrived |= 1u << lane;
  fiber.state = kAtShuffle;
  fiber.file = file;
  fiber.line = line;
  if (warp.arrived == lanes) {
    warp.arrived = 0;
    warp.turn ^= 1;
    for (unsigned other = 0; other < kWarp; ++other) {
      if (!(lanes >> other & 1)) continue;
      m.fibers[thread - lane + other].state = kReady;
      m.ready.push_back(thread - lane + other);
    }
  }
  pause();
  return warp.values[turn][from];
}

} // namespace emulator

using emulator::machine;

// For the Python side. Tensors that overlap become one.
extern "C" void emulator_tensor(const void* start, size_t bytes) {
  auto& tensors = machine.tensors;
  uintptr_t begin = reinterpret_cast<uintptr_t>(start), end = begin + bytes;
  for (const auto& known : tensors)
    if (known.begin <= begin && end <= known.end) return;
  for (size_t k = tensors.size(); k-- > 0;) {
    if (tensors[k].end <= begin || end <= tensors[k].begin) continue;
    begin = std::min(begin, tensors[k].begin);
    end = std::max(end, tensors[k].end);
    tensors.erase(tensors.begin() + static_cast<std::ptrdiff_t>(k));
  }
  const auto after = std::find_if(tensors.begin(), tensors.end(), [&](const auto& known) { return known.begin > begin; });
  tensors.emplace(after)->resize(reinterpret_cast<const void*>(begin), end - begin);
}

extern "C" void emulator_reset(int multiprocessors, unsigned seed, char* shared, char* shared_end) {
  machine.tensors.clear();
  machine.multiprocessors = multiprocessors;
  machine.random.seed(seed);
  machine.fixed.resize(shared, static_cast<size_t>(shared_end - shared));
  machine.fixed.shared = machine.dynamic.shared = true;
  machine.error = cudaSuccess;
}

extern "C" cudaError_t cudaSetDevice(int) { return cudaSuccess; }
extern "C" cudaError_t cudaGetLastError() { return std::exchange(machine.error, cudaSuccess); }
extern "C" const char* cudaGetErrorName(cudaError_t error) {
  return error == cudaErrorLaunchFailure ? "cudaErrorLaunchFailure" : "cudaErrorInvalidConfiguration or InvalidValue";
}
extern "C" const char* cudaGetErrorString(cudaError_t) { return machine.message.c_str(); }
extern "C" cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrMultiProcessorCount ? machine.multiprocessors : static_cast<int>(emulator::kMostShared);
  return cudaSuccess;
}

// The compiler's hooks.
#define ACCESS(bytes)                                                                                        \
  extern "C" void __tsan_read##bytes(void* p) { emulator::access(p, bytes, false); }                          \
  extern "C" void __tsan_write##bytes(void* p) { emulator::access(p, bytes, true); }                          \
  extern "C" void __tsan_unaligned_read##bytes(void* p) { emulator::access(p, bytes, false); }                \
  extern "C" void __tsan_unaligned_write##bytes(void* p) { emulator::access(p, bytes, true); }
ACCESS(1) ACCESS(2) ACCESS(4) ACCESS(8) ACCESS(16)
extern "C" void __tsan_read_range(void* p, size_t bytes) { emulator::access(p, bytes, false); }
extern "C" void __tsan_write_range(void* p, size_t bytes) { emulator::access(p, bytes, true); }
extern "C" void __tsan_init() {}
extern "C" void __tsan_func_entry(void*) {}
extern "C" void __tsan_func_exit() {}

struct Source {
  const char* file;
  unsigned line, column;
};
#define UNDEFINED(name, what)                                                                              \
  extern "C" void __ubsan_handle_##name(Source* at, void*, void*) {                                        \
    emulator::fail(std::string(what) + " at " + at->file + ":" + std::to_string(at->line));                \
  }
UNDEFINED(type_mismatch_v1, "a misaligned or null address")
UNDEFINED(out_of_bounds, "an index beyond its array")
UNDEFINED(add_overflow, "an addition beyond its type")
UNDEFINED(sub_overflow, "a subtraction beyond its type")
UNDEFINED(mul_overflow, "a multiplication beyond its type")
UNDEFINED(negate_overflow, "a negation beyond its type")
UNDEFINED(divrem_overflow, "a division by zero")
UNDEFINED(shift_out_of_bounds, "a shift beyond its type")
