// 32-bit words of two 16-bit elements or one float. Four words make a 16-byte load or store.

#include "dcn/types.cuh"

using Words = Vector<unsigned, 4>;

template <typename T>
struct Word;

template <>
struct Word<Half> {
  static constexpr int kElements = 2;
  static __device__ __forceinline__ float get(unsigned word, int e) {
    return half_to_float(static_cast<unsigned short>(e ? word >> 16 : word));
  }
  static __device__ __forceinline__ unsigned put(const float (&value)[2]) { return pack_half(value[0], value[1]); }
};

template <>
struct Word<BFloat16> {
  static constexpr int kElements = 2;
  static __device__ __forceinline__ float get(unsigned word, int e) {
    return __uint_as_float(e ? word & 0xffff0000u : word << 16);
  }
  static __device__ __forceinline__ unsigned put(const float (&value)[2]) { return pack_bfloat16(value[0], value[1]); }
};

template <>
struct Word<float> {
  static constexpr int kElements = 1;
  static __device__ __forceinline__ float get(unsigned word, int) { return __uint_as_float(word); }
  static __device__ __forceinline__ unsigned put(const float (&value)[1]) { return __float_as_uint(value[0]); }
};
