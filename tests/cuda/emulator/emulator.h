// The part of CUDA C++ that the kernels use, for the host compiler. It is included before the source of a kernel. Add
// here what a new kernel needs; static shared memory is left out on purpose.
#pragma once

#include "scheduler.h"

// ---- keywords

#define __CUDA_ARCH__ 900
#define __global__
#define __device__
#define __launch_bounds__(...)
#define __forceinline__ inline __attribute__((always_inline))
#define __shared__ static_assert(false, "use DCN_SHARED_MEMORY: dynamic shared memory only")
#define DCN_SHARED_MEMORY(name) unsigned char* const name = ::cuda_on_cpu::current->block->shared
#define assert(condition) \
  ((condition) ? void() : ::cuda_on_cpu::fail("assertion '%s' failed at %s:%d", #condition, __FILE__, __LINE__))

using size_t = decltype(sizeof 0);

// ---- built-in variables

#define threadIdx (::cuda_on_cpu::current->index)
#define blockIdx (::cuda_on_cpu::current->block->index)
#define blockDim (::cuda_on_cpu::current->block->size)
#define gridDim (::cuda_on_cpu::current->block->grid)

// ---- vector types

struct alignas(16) int4 {
  int x, y, z, w;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }

// ---- arithmetic: overloads as in CUDA, but none for mixed types

extern "C" {
float floorf(float) noexcept;
float ceilf(float) noexcept;
double floor(double) noexcept;
double ceil(double) noexcept;
int printf(const char*, ...) __attribute__((format(printf, 1, 2)));
void* memcpy(void*, const void*, size_t) noexcept;
}

inline float floor(float x) { return floorf(x); }
inline float ceil(float x) { return ceilf(x); }

#define CUDA_ON_CPU_ORDER(T)                       \
  inline T min(T a, T b) { return b < a ? b : a; } \
  inline T max(T a, T b) { return a < b ? b : a; }

CUDA_ON_CPU_ORDER(int)
CUDA_ON_CPU_ORDER(unsigned)
CUDA_ON_CPU_ORDER(long long)
#undef CUDA_ON_CPU_ORDER

// ---- bits

namespace cuda_on_cpu {

template <class To, class From>
To bits(From from) {
  static_assert(sizeof(To) == sizeof(From), "same size");
  To to;
  __builtin_memcpy(&to, &from, sizeof to);
  return to;
}

}  // namespace cuda_on_cpu

inline int __float_as_int(float x) { return cuda_on_cpu::bits<int>(x); }
inline unsigned __float_as_uint(float x) { return cuda_on_cpu::bits<unsigned>(x); }
inline float __int_as_float(int x) { return cuda_on_cpu::bits<float>(x); }
inline float __uint_as_float(unsigned x) { return cuda_on_cpu::bits<float>(x); }

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline unsigned __umulhi(unsigned a, unsigned b) {
  return static_cast<unsigned>((static_cast<unsigned long long>(a) * b) >> 32);
}

// ---- memory

template <class T>
T __ldcg(const T* p) {
  return *p;
}

inline void __threadfence() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }

namespace cuda_on_cpu {

/** Atomic addition: relaxed as in CUDA, by compare and swap on the bits. Returns the old value. */
template <class Bits, class T>
T atomic_add(T* p, T value) {
  if (current->block->interleaves) interleave();
  if (reinterpret_cast<size_t>(p) % sizeof(T))
    fail("misaligned address of a %d-byte atomic operation", static_cast<int>(sizeof(T)));
  Bits* word = reinterpret_cast<Bits*>(p);
  Bits old = __atomic_load_n(word, __ATOMIC_RELAXED);
  while (!__atomic_compare_exchange_n(word, &old, bits<Bits>(static_cast<T>(bits<T>(old) + value)), true,
                                      __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
  }
  return bits<T>(old);
}

}  // namespace cuda_on_cpu

inline unsigned atomicOr(unsigned* p, unsigned value) {
  if (cuda_on_cpu::current->block->interleaves) cuda_on_cpu::interleave();
  if (reinterpret_cast<size_t>(p) % 4) cuda_on_cpu::fail("misaligned address of a 4-byte atomic operation");
  return __atomic_fetch_or(p, value, __ATOMIC_RELAXED);
}
inline int atomicAdd(int* p, int value) { return cuda_on_cpu::atomic_add<unsigned>(p, value); }
inline unsigned atomicAdd(unsigned* p, unsigned value) { return cuda_on_cpu::atomic_add<unsigned>(p, value); }
inline float atomicAdd(float* p, float value) { return cuda_on_cpu::atomic_add<unsigned>(p, value); }
inline double atomicAdd(double* p, double value) { return cuda_on_cpu::atomic_add<unsigned long long>(p, value); }

// ---- barriers and warp-wide operations; reports name the caller's line

inline void __syncthreads(cuda_on_cpu::Site site = cuda_on_cpu::Site::here("__syncthreads")) {
  cuda_on_cpu::barrier(site);
}

namespace cuda_on_cpu {

inline unsigned vote(unsigned mask, int predicate, Site site) {
  const bool mine = predicate != 0;
  unsigned result = 0;
  collective(
      mask, mine, result,
      [](const bool* const* in, unsigned* const* out, unsigned lanes) {
        unsigned ballot = 0;
        for (int lane = 0; lane < 32; ++lane)
          if (in[lane] && *in[lane]) ballot |= 1u << lane;
        for (int lane = 0; lane < 32; ++lane)
          if (lanes >> lane & 1) *out[lane] = ballot;
      },
      site);
  return result;
}

enum class Shuffle { index, up, exclusive_or };

/** shfl.sync of PTX. A value from a lane outside the mask is undefined: all bits are set. */
template <Shuffle mode, class T>
T shuffle(unsigned mask, T value, unsigned b, int width, Site site) {
  if (width < 1 || width > 32 || (width & (width - 1)))
    fail("%s at %s:%d: width %d is not a power of two up to 32", site.name, site.file, site.line, width);
  struct Sent {
    T value;
    int source;
  };
  const int lane = static_cast<int>(current->lane);
  const int first = lane & -width, last = first | (width - 1), by = static_cast<int>(b & 31);
  Sent sent{value, lane};
  switch (mode) {
    case Shuffle::index:
      sent.source = first | (by & (width - 1));
      break;
    case Shuffle::up:
      sent.source = lane - by >= first ? lane - by : lane;
      break;
    case Shuffle::exclusive_or:
      sent.source = (lane ^ by) <= last ? lane ^ by : lane;
      break;
  }
  T received;
  collective(
      mask, sent, received,
      [](const Sent* const* in, T* const* out, unsigned) {
        for (int to = 0; to < 32; ++to) {
          if (!in[to]) continue;
          const Sent* from = in[in[to]->source];
          if (from)
            *out[to] = from->value;
          else
            __builtin_memset(out[to], 0xff, sizeof(T));
        }
      },
      site);
  return received;
}

}  // namespace cuda_on_cpu

inline void __syncwarp(unsigned mask = 0xffffffffu, cuda_on_cpu::Site site = cuda_on_cpu::Site::here("__syncwarp")) {
  const char nothing = 0;
  char none;
  cuda_on_cpu::collective(mask, nothing, none, [](const char* const*, char* const*, unsigned) {}, site);
}
inline unsigned __ballot_sync(unsigned mask, int predicate,
                              cuda_on_cpu::Site site = cuda_on_cpu::Site::here("__ballot_sync")) {
  return cuda_on_cpu::vote(mask, predicate, site);
}
inline int __any_sync(unsigned mask, int predicate, cuda_on_cpu::Site site = cuda_on_cpu::Site::here("__any_sync")) {
  return cuda_on_cpu::vote(mask, predicate, site) != 0;
}

#define CUDA_ON_CPU_SHUFFLE(name, mode, T, B)                                                                    \
  inline T name(unsigned mask, T value, B b, int width = 32,                                                     \
                cuda_on_cpu::Site site = cuda_on_cpu::Site::here(#name)) {                                       \
    return cuda_on_cpu::shuffle<cuda_on_cpu::Shuffle::mode>(mask, value, static_cast<unsigned>(b), width, site); \
  }
#define CUDA_ON_CPU_SHUFFLES(T)                            \
  CUDA_ON_CPU_SHUFFLE(__shfl_sync, index, T, int)          \
  CUDA_ON_CPU_SHUFFLE(__shfl_up_sync, up, T, unsigned)     \
  CUDA_ON_CPU_SHUFFLE(__shfl_xor_sync, exclusive_or, T, int)

CUDA_ON_CPU_SHUFFLES(int)
CUDA_ON_CPU_SHUFFLES(float)
CUDA_ON_CPU_SHUFFLES(double)
#undef CUDA_ON_CPU_SHUFFLES
#undef CUDA_ON_CPU_SHUFFLE

#include "ptx.h"
