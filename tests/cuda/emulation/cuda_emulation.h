// Enough of CUDA's execution model to run csrc/cuda on a CPU, one block after another: each thread of a block is a
// fiber that runs until it waits for its warp or its block. Deterministic and slow. It shows what a kernel computes,
// not races, and nothing about speed.

#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>
#include <setjmp.h>
#include <ucontext.h>
#include <vector_types.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <vector>

#undef __shared__
#define __shared__ static  // one block runs at a time
#undef __launch_bounds__
#define __launch_bounds__(...)
#undef __grid_constant__
#define __grid_constant__

namespace emulation {

enum class State { READY, AT_WARP, AT_BLOCK, DONE };

// A fiber is made once and runs block after block. It is entered through its context, and after that by jumps, which,
// unlike swapcontext, ask the operating system for nothing (_FORTIFY_SOURCE takes those to another stack for mistakes).
struct Fiber {
  ucontext_t context;
  jmp_buf place;
  bool entered;
  State state;
  double shuffled;
};

constexpr size_t STACK = 256 * 1024;
inline jmp_buf scheduler;
inline std::vector<Fiber> fibers;
inline std::vector<char> stacks;
inline const std::function<void()>* body = nullptr;
inline uint3 thread_index, block_index;
inline dim3 grid_dimension;

inline void wait(State state) {
  Fiber& self = fibers[thread_index.x];
  self.state = state;
  if (_setjmp(self.place) == 0) _longjmp(scheduler, 1);
}

inline void enter() {
  for (;;) {
    (*body)();
    wait(State::DONE);
  }
}

inline void run(size_t thread) {
  thread_index = uint3{static_cast<unsigned>(thread), 0, 0};
  Fiber& fiber = fibers[thread];
  if (_setjmp(scheduler) != 0) return;
  if (fiber.entered) _longjmp(fiber.place, 1);
  fiber.entered = true;
  setcontext(&fiber.context);
}

// Lets go of those fibers of a range that wait at `state` if all that are not done do; whether there were any.
inline bool release(size_t begin, size_t end, State state) {
  bool any = false;
  for (size_t i = begin; i < end; ++i) {
    if (fibers[i].state == State::DONE) continue;
    if (fibers[i].state != state) return false;
    any = true;
  }
  for (size_t i = begin; any && i < end; ++i)
    if (fibers[i].state == state) fibers[i].state = State::READY;
  return any;
}

inline void make_fibers(size_t threads) {
  fibers.resize(threads);
  stacks.resize(threads * STACK);
  for (size_t i = 0; i < threads; ++i) {
    Fiber& fiber = fibers[i];
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = stacks.data() + i * STACK;
    fiber.context.uc_stack.ss_size = STACK;
    makecontext(&fiber.context, enter, 0);
    fiber.entered = false;
  }
}

inline void run_block(size_t threads) {
  for (size_t i = 0; i < threads; ++i) fibers[i].state = State::READY;
  for (;;) {
    for (size_t i = 0; i < threads; ++i)
      if (fibers[i].state == State::READY) run(i);
    bool going = false;
    for (size_t warp = 0; warp < threads; warp += 32) going |= release(warp, warp + 32, State::AT_WARP);
    if (!going) going = release(0, threads, State::AT_BLOCK);
    if (going) continue;
    for (size_t i = 0; i < threads; ++i) {
      if (fibers[i].state == State::DONE) continue;
      std::fputs("a block of threads waits for a thread that will not come\n", stderr);
      std::abort();
    }
    return;
  }
}

inline void launch(dim3 grid, size_t threads, const std::function<void()>& kernel) {
  grid_dimension = grid;
  if (fibers.size() < threads) make_fibers(threads);
  body = &kernel;
  for (unsigned z = 0; z < grid.z; ++z)
    for (unsigned y = 0; y < grid.y; ++y)
      for (unsigned x = 0; x < grid.x; ++x) {
        block_index = uint3{x, y, z};
        run_block(threads);
      }
}

}  // namespace emulation

#define threadIdx emulation::thread_index
#define blockIdx emulation::block_index
#define gridDim emulation::grid_dimension

inline void __syncthreads() { emulation::wait(emulation::State::AT_BLOCK); }
inline void __syncwarp() { emulation::wait(emulation::State::AT_WARP); }

inline double __shfl_xor_sync(unsigned, double x, int distance) {
  const unsigned self = threadIdx.x;
  emulation::fibers[self].shuffled = x;
  __syncwarp();
  const double other = emulation::fibers[self ^ distance].shuffled;
  __syncwarp();
  return other;
}

inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline double __dmul_rn(double a, double b) { return a * b; }
inline double __dadd_rn(double a, double b) { return a + b; }

template <class To, class From>
To same_bits(From from) {
  To to;
  static_assert(sizeof(to) == sizeof(from), "as many bits");
  std::memcpy(&to, &from, sizeof(to));
  return to;
}
inline float __int_as_float(int bits) { return same_bits<float>(bits); }
inline double __longlong_as_double(long long bits) { return same_bits<double>(bits); }

using std::isfinite;
using std::max;
using std::min;
