// Element types of arrays and of sums, vectors of elements, and everything else that all units share.
//
// A unit is specialised by macros:
//   DCN_SUFFIX          f16 | bf16 | f32 | f64, the end of each kernel's name
//   DCN_SCALAR          Half | BFloat16 | float | double, the element type of the data
//   DCN_OFFSET_SCALAR   the element type of offsets and masks
//   DCN_VEC             elements that a thread loads or stores at once, a power of two
//   DCN_SAMPLE_BYTES    shared memory per sampling point

#include "dcn/ptx.cuh"

#define DCN_JOIN_(name, suffix) name##_##suffix
#define DCN_JOIN(name, suffix) DCN_JOIN_(name, suffix)

#define DCN_KERNEL(name) DCN_JOIN(name, DCN_SUFFIX)

// Threads of a block, except those of deform_conv2d_fused. __launch_bounds__(kThreads, 2) grants a thread 128
// registers; without the 2, the compiler spills rather than use more than 64.
constexpr int kThreads = 256;
constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

__device__ __forceinline__ int thread_of_block() { return threadIdx.y * blockDim.x + threadIdx.x; }
__device__ __forceinline__ int threads_of_block() { return blockDim.x * blockDim.y; }

// Blocks per multiprocessor of a memory-bound kernel: as many as leave each thread enough registers.
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

// The type of coordinates, weights and sums for data of type T.
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

// Elements that one load or store of up to 16 bytes moves.
template <typename T, int count>
struct alignas(sizeof(T) * count) Vector {
  T at[count];
};

// Atomic addition of a vector to an address that is aligned like it.
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
