// What NVRTC itself gives a kernel, for the host compiler: keywords, built-in variables, vector types, intrinsics.
// It is included ahead of a kernel's source, which includes nothing. Vocabulary that is missing here may be added;
// static shared memory stays out on purpose.
#pragma once

#include "scheduler.h"

// ---- keywords

#define __CUDA_ARCH__ 900
#define __global__
#define __device__
#define __host__
#define __constant__
#define __grid_constant__
#define __launch_bounds__(...)
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __align__(n) __attribute__((aligned(n)))
#define __shared__ static_assert(false, "use DCN_SHARED_MEMORY: dynamic shared memory only")
#define DCN_SHARED_MEMORY(name) unsigned char* const name = ::cuda_on_cpu::current->block->shared
#define assert(condition) \
  ((condition) ? void() : ::cuda_on_cpu::fail("assertion '%s' failed at %s:%d", #condition, __FILE__, __LINE__))

using size_t = decltype(sizeof 0);
using ptrdiff_t = decltype(static_cast<char*>(nullptr) - static_cast<char*>(nullptr));

// ---- built-in variables

constexpr int warpSize = 32;
#define threadIdx (::cuda_on_cpu::current->index)
#define blockIdx (::cuda_on_cpu::current->block->index)
#define blockDim (::cuda_on_cpu::current->block->size)
#define gridDim (::cuda_on_cpu::current->block->grid)

// ---- vector types, with CUDA's alignment

#define CUDA_ON_CPU_VECTORS(T, name, align2, align4)                 \
  struct name##1 { T x; };                                           \
  struct alignas(align2) name##2 { T x, y; };                        \
  struct name##3 { T x, y, z; };                                     \
  struct alignas(align4) name##4 { T x, y, z, w; };                  \
  inline name##1 make_##name##1(T x) { return {x}; }                 \
  inline name##2 make_##name##2(T x, T y) { return {x, y}; }         \
  inline name##3 make_##name##3(T x, T y, T z) { return {x, y, z}; } \
  inline name##4 make_##name##4(T x, T y, T z, T w) { return {x, y, z, w}; }

CUDA_ON_CPU_VECTORS(signed char, char, 2, 4)
CUDA_ON_CPU_VECTORS(unsigned char, uchar, 2, 4)
CUDA_ON_CPU_VECTORS(short, short, 4, 8)
CUDA_ON_CPU_VECTORS(unsigned short, ushort, 4, 8)
CUDA_ON_CPU_VECTORS(int, int, 8, 16)
CUDA_ON_CPU_VECTORS(unsigned, uint, 8, 16)
CUDA_ON_CPU_VECTORS(float, float, 8, 16)
CUDA_ON_CPU_VECTORS(long long, longlong, 16, 16)
CUDA_ON_CPU_VECTORS(unsigned long long, ulonglong, 16, 16)
CUDA_ON_CPU_VECTORS(double, double, 16, 16)
#undef CUDA_ON_CPU_VECTORS

// ---- arithmetic: overloads as in CUDA, but none for mixed types

extern "C" {
float floorf(float) noexcept;
float ceilf(float) noexcept;
float truncf(float) noexcept;
float rintf(float) noexcept;
float roundf(float) noexcept;
float fabsf(float) noexcept;
float sqrtf(float) noexcept;
float expf(float) noexcept;
float logf(float) noexcept;
float fminf(float, float) noexcept;
float fmaxf(float, float) noexcept;
float fmaf(float, float, float) noexcept;
double floor(double) noexcept;
double ceil(double) noexcept;
double trunc(double) noexcept;
double rint(double) noexcept;
double round(double) noexcept;
double fabs(double) noexcept;
double sqrt(double) noexcept;
double exp(double) noexcept;
double log(double) noexcept;
double fmin(double, double) noexcept;
double fmax(double, double) noexcept;
double fma(double, double, double) noexcept;
int printf(const char*, ...) __attribute__((format(printf, 1, 2)));
void* memcpy(void*, const void*, size_t) noexcept;
void* memset(void*, int, size_t) noexcept;
}

inline float floor(float x) { return floorf(x); }
inline float ceil(float x) { return ceilf(x); }
inline float trunc(float x) { return truncf(x); }
inline float rint(float x) { return rintf(x); }
inline float round(float x) { return roundf(x); }
inline float fabs(float x) { return fabsf(x); }
inline float sqrt(float x) { return sqrtf(x); }
inline float exp(float x) { return expf(x); }
inline float log(float x) { return logf(x); }
inline float fmin(float a, float b) { return fminf(a, b); }
inline float fmax(float a, float b) { return fmaxf(a, b); }
inline float fma(float a, float b, float c) { return fmaf(a, b, c); }
inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
inline double rsqrt(double x) { return 1.0 / sqrt(x); }
inline int abs(int x) { return x < 0 ? -x : x; }
inline long long abs(long long x) { return x < 0 ? -x : x; }
inline float abs(float x) { return fabsf(x); }
inline double abs(double x) { return fabs(x); }
inline bool isnan(float x) { return __builtin_isnan(x); }
inline bool isnan(double x) { return __builtin_isnan(x); }
inline bool isinf(float x) { return __builtin_isinf(x); }
inline bool isinf(double x) { return __builtin_isinf(x); }
inline bool isfinite(float x) { return __builtin_isfinite(x); }
inline bool isfinite(double x) { return __builtin_isfinite(x); }

#define CUDA_ON_CPU_ORDER(T)                       \
  inline T min(T a, T b) { return b < a ? b : a; } \
  inline T max(T a, T b) { return a < b ? b : a; }

CUDA_ON_CPU_ORDER(int)
CUDA_ON_CPU_ORDER(unsigned)
CUDA_ON_CPU_ORDER(long)
CUDA_ON_CPU_ORDER(unsigned long)
CUDA_ON_CPU_ORDER(long long)
CUDA_ON_CPU_ORDER(unsigned long long)
#undef CUDA_ON_CPU_ORDER
inline float min(float a, float b) { return fminf(a, b); }
inline float max(float a, float b) { return fmaxf(a, b); }
inline double min(double a, double b) { return fmin(a, b); }
inline double max(double a, double b) { return fmax(a, b); }

// ---- bits and conversions

namespace cuda_on_cpu {

template <class To, class From>
To bits(From from) {
  static_assert(sizeof(To) == sizeof(From), "same size");
  To to;
  __builtin_memcpy(&to, &from, sizeof to);
  return to;
}

/** cvt of PTX on an already rounded value: saturates; NaN becomes 0, or the most negative value where 64 bits are
 * involved. */
template <class To, class From>
To saturate(From x) {
  constexpr bool is_signed = To(-1) < To(0);
  constexpr int digits = 8 * sizeof(To) - is_signed;
  constexpr To highest = static_cast<To>(~0ull >> (64 - digits));
  constexpr To lowest = is_signed ? To(-highest - To(1)) : To(0);
  constexpr From limit = From(2) * From(1ull << (digits - 1));
  if (x != x) return sizeof(To) == 8 || sizeof(From) == 8 ? static_cast<To>(1ull << (8 * sizeof(To) - 1)) : To(0);
  if (x >= limit) return highest;
  if (x < (is_signed ? -limit : From(0))) return lowest;
  return static_cast<To>(x);
}

}  // namespace cuda_on_cpu

#define CUDA_ON_CPU_CONVERT(From, from, To, to)                                          \
  inline To __##from##2##to##_rd(From x) { return cuda_on_cpu::saturate<To>(floor(x)); } \
  inline To __##from##2##to##_ru(From x) { return cuda_on_cpu::saturate<To>(ceil(x)); }  \
  inline To __##from##2##to##_rn(From x) { return cuda_on_cpu::saturate<To>(rint(x)); }  \
  inline To __##from##2##to##_rz(From x) { return cuda_on_cpu::saturate<To>(trunc(x)); }

CUDA_ON_CPU_CONVERT(float, float, int, int)
CUDA_ON_CPU_CONVERT(float, float, unsigned, uint)
CUDA_ON_CPU_CONVERT(float, float, long long, ll)
CUDA_ON_CPU_CONVERT(float, float, unsigned long long, ull)
CUDA_ON_CPU_CONVERT(double, double, int, int)
CUDA_ON_CPU_CONVERT(double, double, unsigned, uint)
CUDA_ON_CPU_CONVERT(double, double, long long, ll)
CUDA_ON_CPU_CONVERT(double, double, unsigned long long, ull)
#undef CUDA_ON_CPU_CONVERT

inline float __int2float_rn(int x) { return static_cast<float>(x); }
inline float __uint2float_rn(unsigned x) { return static_cast<float>(x); }
inline double __int2double_rn(int x) { return x; }
inline float __double2float_rn(double x) { return static_cast<float>(x); }
inline int __float_as_int(float x) { return cuda_on_cpu::bits<int>(x); }
inline unsigned __float_as_uint(float x) { return cuda_on_cpu::bits<unsigned>(x); }
inline float __int_as_float(int x) { return cuda_on_cpu::bits<float>(x); }
inline float __uint_as_float(unsigned x) { return cuda_on_cpu::bits<float>(x); }
inline long long __double_as_longlong(double x) { return cuda_on_cpu::bits<long long>(x); }
inline double __longlong_as_double(long long x) { return cuda_on_cpu::bits<double>(x); }

inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __frcp_rn(float a) { return 1.0f / a; }
inline float __fsqrt_rn(float a) { return sqrtf(a); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __expf(float a) { return expf(a); }
inline float __saturatef(float a) { return a > 0.0f ? (a < 1.0f ? a : 1.0f) : 0.0f; }
inline double __fma_rn(double a, double b, double c) { return fma(a, b, c); }
inline double __dadd_rn(double a, double b) { return a + b; }
inline double __dsub_rn(double a, double b) { return a - b; }
inline double __dmul_rn(double a, double b) { return a * b; }
inline double __ddiv_rn(double a, double b) { return a / b; }

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }
inline int __clz(int x) { return x ? __builtin_clz(static_cast<unsigned>(x)) : 32; }
inline int __clzll(long long x) { return x ? __builtin_clzll(static_cast<unsigned long long>(x)) : 64; }
inline unsigned __umulhi(unsigned a, unsigned b) {
  return static_cast<unsigned>((static_cast<unsigned long long>(a) * b) >> 32);
}
inline unsigned __funnelshift_l(unsigned low, unsigned high, unsigned n) {
  return static_cast<unsigned>(((static_cast<unsigned long long>(high) << 32 | low) << (n & 31)) >> 32);
}
inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned n) {
  return static_cast<unsigned>((static_cast<unsigned long long>(high) << 32 | low) >> (n & 31));
}
inline unsigned __byte_perm(unsigned a, unsigned b, unsigned selector) {
  const unsigned long long bytes = static_cast<unsigned long long>(b) << 32 | a;
  unsigned result = 0;
  for (int i = 0; i < 4; ++i) {
    const unsigned pick = selector >> (4 * i);
    unsigned byte = static_cast<unsigned>(bytes >> (8 * (pick & 7))) & 0xff;
    if (pick & 8) byte = byte & 0x80 ? 0xff : 0;
    result |= byte << (8 * i);
  }
  return result;
}

// ---- memory

template <class T>
T __ldg(const T* p) {
  return *p;
}
template <class T>
T __ldcs(const T* p) {
  return *p;
}
template <class T>
T __ldcg(const T* p) {
  return *p;
}
template <class T>
void __stcs(T* p, T value) {
  *p = value;
}
template <class T>
void __stcg(T* p, T value) {
  *p = value;
}

inline void __threadfence() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
inline void __threadfence_block() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }

namespace cuda_on_cpu {

/** Every atomic operation: relaxed as in CUDA, by compare and swap on the bits; returns the old value. */
template <class Bits, class T, class F>
T atomic_update(T* p, F change) {
  static_assert(sizeof(Bits) == sizeof(T), "same size");
  if (current->block->interleaves) interleave();
  if (reinterpret_cast<size_t>(p) % sizeof(T))
    fail("misaligned address of a %d-byte atomic operation", static_cast<int>(sizeof(T)));
  Bits* word = reinterpret_cast<Bits*>(p);
  Bits old = __atomic_load_n(word, __ATOMIC_RELAXED);
  while (!__atomic_compare_exchange_n(word, &old, bits<Bits>(static_cast<T>(change(bits<T>(old)))), true,
                                      __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
  }
  return bits<T>(old);
}

}  // namespace cuda_on_cpu

#define CUDA_ON_CPU_ATOMIC(T, Bits)                                                 \
  inline T atomicExch(T* p, T value) {                                              \
    return cuda_on_cpu::atomic_update<Bits>(p, [=](T) { return value; });           \
  }                                                                                 \
  inline T atomicAdd(T* p, T value) {                                               \
    return cuda_on_cpu::atomic_update<Bits>(p, [=](T old) { return old + value; }); \
  }
#define CUDA_ON_CPU_ATOMIC_INTEGER(T, Bits)                                                           \
  CUDA_ON_CPU_ATOMIC(T, Bits)                                                                         \
  inline T atomicMin(T* p, T value) {                                                                 \
    return cuda_on_cpu::atomic_update<Bits>(p, [=](T old) { return min(old, value); });               \
  }                                                                                                   \
  inline T atomicMax(T* p, T value) {                                                                 \
    return cuda_on_cpu::atomic_update<Bits>(p, [=](T old) { return max(old, value); });               \
  }                                                                                                   \
  inline T atomicOr(T* p, T value) {                                                                  \
    return cuda_on_cpu::atomic_update<Bits>(p, [=](T old) { return old | value; });                   \
  }                                                                                                   \
  inline T atomicAnd(T* p, T value) {                                                                 \
    return cuda_on_cpu::atomic_update<Bits>(p, [=](T old) { return old & value; });                   \
  }                                                                                                   \
  inline T atomicCAS(T* p, T expected, T value) {                                                     \
    return cuda_on_cpu::atomic_update<Bits>(p, [=](T old) { return old == expected ? value : old; }); \
  }

CUDA_ON_CPU_ATOMIC_INTEGER(int, unsigned)
CUDA_ON_CPU_ATOMIC_INTEGER(unsigned, unsigned)
CUDA_ON_CPU_ATOMIC_INTEGER(unsigned long long, unsigned long long)
CUDA_ON_CPU_ATOMIC(float, unsigned)
CUDA_ON_CPU_ATOMIC(double, unsigned long long)
#undef CUDA_ON_CPU_ATOMIC_INTEGER
#undef CUDA_ON_CPU_ATOMIC

// ---- barriers and warp-wide operations: the reports name the caller's line

inline void __syncthreads(cuda_on_cpu::Site site = cuda_on_cpu::Site::here("__syncthreads")) {
  cuda_on_cpu::barrier(false, site);
}
inline int __syncthreads_count(int predicate, cuda_on_cpu::Site site = cuda_on_cpu::Site::here("__syncthreads_count")) {
  return static_cast<int>(cuda_on_cpu::barrier(predicate != 0, site));
}
inline int __syncthreads_or(int predicate, cuda_on_cpu::Site site = cuda_on_cpu::Site::here("__syncthreads_or")) {
  return cuda_on_cpu::barrier(predicate != 0, site) != 0;
}
inline int __syncthreads_and(int predicate, cuda_on_cpu::Site site = cuda_on_cpu::Site::here("__syncthreads_and")) {
  return cuda_on_cpu::barrier(predicate == 0, site) == 0;
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

enum class Shuffle { index, up, down, exclusive_or };

/** shfl.sync of PTX. What a lane outside the mask would have sent is undefined: all bits set. */
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
    case Shuffle::down:
      sent.source = lane + by <= last ? lane + by : lane;
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
inline int __all_sync(unsigned mask, int predicate, cuda_on_cpu::Site site = cuda_on_cpu::Site::here("__all_sync")) {
  return cuda_on_cpu::vote(mask, predicate, site) == mask;
}

#define CUDA_ON_CPU_SHUFFLE(name, mode, T, B)                                                                    \
  inline T name(unsigned mask, T value, B b, int width = 32,                                                     \
                cuda_on_cpu::Site site = cuda_on_cpu::Site::here(#name)) {                                       \
    return cuda_on_cpu::shuffle<cuda_on_cpu::Shuffle::mode>(mask, value, static_cast<unsigned>(b), width, site); \
  }
#define CUDA_ON_CPU_SHUFFLES(T)                            \
  CUDA_ON_CPU_SHUFFLE(__shfl_sync, index, T, int)          \
  CUDA_ON_CPU_SHUFFLE(__shfl_up_sync, up, T, unsigned)     \
  CUDA_ON_CPU_SHUFFLE(__shfl_down_sync, down, T, unsigned) \
  CUDA_ON_CPU_SHUFFLE(__shfl_xor_sync, exclusive_or, T, int)

CUDA_ON_CPU_SHUFFLES(int)
CUDA_ON_CPU_SHUFFLES(unsigned)
CUDA_ON_CPU_SHUFFLES(long long)
CUDA_ON_CPU_SHUFFLES(unsigned long long)
CUDA_ON_CPU_SHUFFLES(float)
CUDA_ON_CPU_SHUFFLES(double)
#undef CUDA_ON_CPU_SHUFFLES
#undef CUDA_ON_CPU_SHUFFLE

#include "ptx.h"
