// The only header with inline PTX. Under DCN_HOST, where tests run the kernels on a CPU, every function computes the
// same thing in plain C++ and the header that stands in for CUDA is already included.

#ifdef DCN_HOST

__device__ __forceinline__ float half_to_float(unsigned short bits) {
  _Float16 value;
  __builtin_memcpy(&value, &bits, sizeof value);
  return static_cast<float>(value);
}

__device__ __forceinline__ unsigned short float_to_half(float value) {
  const _Float16 rounded = static_cast<_Float16>(value);
  unsigned short bits;
  __builtin_memcpy(&bits, &rounded, sizeof bits);
  return bits;
}

__device__ __forceinline__ float rounded_product(float a, float b) { return a * b; }
__device__ __forceinline__ double rounded_product(double a, double b) { return a * b; }

__device__ __forceinline__ void add_4(float* to, float a, float b, float c, float d) {
  if (reinterpret_cast<unsigned long long>(to) % 16) cuda_on_cpu::fail("add_4: address not 16-byte aligned");
  atomicAdd(to, a);
  atomicAdd(to + 1, b);
  atomicAdd(to + 2, c);
  atomicAdd(to + 3, d);
}

#else

#define DCN_SHARED_MEMORY(name) extern __shared__ __align__(16) unsigned char name[]

__device__ __forceinline__ float half_to_float(unsigned short bits) {
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
  return value;
}

__device__ __forceinline__ unsigned short float_to_half(float value) {
  unsigned short bits;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
  return bits;
}

// A product that the compiler does not fuse with an addition: coordinates are rounded alike everywhere.
__device__ __forceinline__ float rounded_product(float a, float b) { return __fmul_rn(a, b); }
__device__ __forceinline__ double rounded_product(double a, double b) { return __dmul_rn(a, b); }

// Atomic addition of four consecutive floats at a 16-byte aligned address of global memory.
__device__ __forceinline__ void add_4(float* to, float a, float b, float c, float d) {
#if __CUDA_ARCH__ >= 900
  asm volatile("red.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(to), "f"(a), "f"(b), "f"(c), "f"(d) : "memory");
#else
  atomicAdd(to, a);
  atomicAdd(to + 1, b);
  atomicAdd(to + 2, c);
  atomicAdd(to + 3, d);
#endif
}

#endif
