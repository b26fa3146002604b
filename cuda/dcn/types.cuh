// Element types: what arrays hold, what sums are kept in, and vectors of them.
//
// A unit is specialised by macros:
//   DCN_SUFFIX          f16 | bf16 | f32 | f64, the last part of the kernels' names
//   DCN_SCALAR          Half | BFloat16 | float | double, the element type of the data
//   DCN_OFFSET_SCALAR   the element type of offsets and masks
//   DCN_VEC             elements that are moved at once, a power of two
//   DCN_SAMPLE_BYTES    shared memory of a sampling point

#include "dcn/ptx.cuh"

#define DCN_JOIN_(name, suffix) name##_##suffix
#define DCN_JOIN(name, suffix) DCN_JOIN_(name, suffix)

// Kernels are launched with up to 256 threads; __launch_bounds__(256, 2) leaves the compiler 128 registers, without
// which it would rather spill than use more than 64.
#define DCN_KERNEL(name) DCN_JOIN(name, DCN_SUFFIX)

// Blocks of a kernel that waits for memory rather than computes: as many as leave each thread the registers it needs.
#if __CUDA_ARCH__ >= 1000
constexpr int kManyBlocks = 3;
#else
constexpr int kManyBlocks = 4;
#endif

struct Half {
  unsigned short bits;
};

struct BFloat16 {
  unsigned short bits;
};

// The type of coordinates, weights and sums beside data of type T.
template <typename T>
struct AccumulatorOf {
  using type = float;
};
template <>
struct AccumulatorOf<double> {
  using type = double;
};
template <typename T>
using Accumulator = typename AccumulatorOf<T>::type;

__device__ __forceinline__ float widen(Half value) { return half_to_float(value.bits); }
__device__ __forceinline__ float widen(BFloat16 value) { return __int_as_float(static_cast<int>(value.bits) << 16); }
__device__ __forceinline__ float widen(float value) { return value; }
__device__ __forceinline__ double widen(double value) { return value; }

// Rounds to nearest, ties to even.
template <typename T>
struct Narrow;
template <>
struct Narrow<Half> {
  static __device__ __forceinline__ Half from(float value) { return {float_to_half(value)}; }
};
template <>
struct Narrow<BFloat16> {
  static __device__ __forceinline__ BFloat16 from(float value) {
    const unsigned bits = static_cast<unsigned>(__float_as_int(value));
    const bool is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
    const unsigned rounded = is_nan ? bits | 0x00400000u : bits + 0x7fffu + ((bits >> 16) & 1u);
    return {static_cast<unsigned short>(rounded >> 16)};
  }
};
template <>
struct Narrow<float> {
  static __device__ __forceinline__ float from(float value) { return value; }
};
template <>
struct Narrow<double> {
  static __device__ __forceinline__ double from(double value) { return value; }
};

template <typename T>
__device__ __forceinline__ T narrow(Accumulator<T> value) {
  return Narrow<T>::from(value);
}

template <typename A>
__device__ __forceinline__ A not_a_number() {
  return static_cast<A>(__int_as_float(0x7fffffff));
}

template <typename A>
__device__ __forceinline__ bool is_finite(A value) {
  return value - value == A(0);
}

// Moved by one load or store of up to 16 bytes.
template <typename T, int count>
struct alignas(sizeof(T) * count) Vector {
  T at[count];
};

// Atomic addition of a vector's elements, for an address that is aligned like the vector.
template <int count>
__device__ __forceinline__ void add_vector(float* to, const float (&value)[count]) {
  if constexpr (count % 4 == 0) {
#pragma unroll
    for (int e = 0; e < count; e += 4) add_4(to + e, value[e], value[e + 1], value[e + 2], value[e + 3]);
  } else {
#pragma unroll
    for (int e = 0; e < count; ++e) atomicAdd(to + e, value[e]);
  }
}

template <int count>
__device__ __forceinline__ void add_vector(double* to, const double (&value)[count]) {
#pragma unroll
  for (int e = 0; e < count; ++e) atomicAdd(to + e, value[e]);
}
