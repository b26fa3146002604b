// The interface between a kernel compiled for the host and the scheduler (scheduler.cpp) that runs its threads.
// No standard header is included: a kernel is self-contained for NVRTC too, and every test pays for compilation.
//
// One OS thread runs a block, and each CUDA thread of it is a fiber that runs alone until it waits. The host versions of
// PTX instructions (ptx.h) may use:
//
//   current             the running thread: its index, lane, linear number and block
//   collective(...)     the rendezvous of the lanes of a mask, for every warp-wide instruction
//   copy_async(...)     cp.async, with commit and wait
//   defer(...)          work that the hardware does asynchronously, with wait
//   fail(...)           reports a misuse: the launch raises KernelFault
//   Site::here(name)    file and line of the caller for reports, if it is a default argument
//
// A failure abandons fibers without unwinding them, so these functions may own nothing that has a destructor.
#pragma once

namespace cuda_on_cpu {

struct Index3 {
  unsigned x, y, z;
};

/** A place in the source where threads meet, and the name of the function that they call there. */
struct Site {
  const char* name;
  const char* file;
  int line;

  static constexpr Site here(const char* name, const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    return {name, file, line};
  }
};

struct Block {
  Index3 index, size, grid;
  unsigned char* shared;
  unsigned shared_bytes;
  bool interleaves;
};

struct Thread {
  Index3 index;
  unsigned linear, lane;
  const Block* block;
};

/** Never null while a kernel runs. Every call that may wait changes it. */
extern __thread const Thread* current __attribute__((tls_model("initial-exec")));

[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

/** Waits for all threads of the block. */
void barrier(Site site);

using Combine = void (*)(const void* closure, const void* const* in, void* const* out, unsigned mask);

void rendezvous(unsigned mask, const void* in, void* out, Combine combine, const void* closure, Site site);

/** Under the random schedule, lets another thread run now and then. Called where threads may race by design. */
void interleave();

/** Copies at the wait, so that a missing wait shows. Zeros follow the first `valid` bytes. */
void copy_async(void* shared, const void* global, unsigned bytes, unsigned valid, Site site);
void copy_async_commit();
void copy_async_wait(unsigned pending);

constexpr unsigned DEFERRED_BYTES = 48;

/** Calls run(closure) when the thread waits for it, on a copy of the closure of at most DEFERRED_BYTES. */
void defer(void (*run)(const void* closure), const void* closure, unsigned bytes);
void run_deferred();

/**
 * Waits for exactly the lanes of `mask` at one call site. The last lane to arrive calls
 * combine(const In* const in[32], Out* const out[32], mask) for all. Entries of lanes outside the mask are null.
 */
template <class In, class Out, class F>
void collective(unsigned mask, const In& in, Out& out, const F& combine, Site site) {
  rendezvous(
      mask, &in, &out,
      [](const void* closure, const void* const* ins, void* const* outs, unsigned lanes) {
        const In* typed_in[32];
        Out* typed_out[32];
        for (int lane = 0; lane < 32; ++lane) {
          typed_in[lane] = static_cast<const In*>(ins[lane]);
          typed_out[lane] = static_cast<Out*>(outs[lane]);
        }
        (*static_cast<const F*>(closure))(typed_in, typed_out, lanes);
      },
      &combine, site);
}

using Body = void (*)(const void* params);

struct LaunchConfig {
  unsigned grid, block_x, block_y, shared_bytes;
  int schedule;
  unsigned os_threads;
  unsigned long long seed;
};

/** Runs the grid. Returns null, or the report of the first failure, valid until this OS thread launches again. */
const char* launch(Body body, const void* params, const LaunchConfig& config);

template <class Function>
struct KernelParams;
template <class P>
struct KernelParams<void (*)(P)> {
  static_assert(__is_trivially_copyable(P), "a kernel's parameter struct is plain data");
  static_assert(sizeof(P) <= 4096, "a kernel takes at most 4096 bytes of parameters");
  using type = P;
};

}  // namespace cuda_on_cpu

#define CUDA_ON_CPU_ENTRY(kernel)                                                                                   \
  extern "C" unsigned kernel##_params_size() { return sizeof(cuda_on_cpu::KernelParams<decltype(&kernel)>::type); } \
  extern "C" const char* kernel##_run(const void* params, const cuda_on_cpu::LaunchConfig* config) {                \
    using Params = cuda_on_cpu::KernelParams<decltype(&kernel)>::type;                                              \
    return cuda_on_cpu::launch([](const void* p) { kernel(*static_cast<const Params*>(p)); }, params, *config);     \
  }
