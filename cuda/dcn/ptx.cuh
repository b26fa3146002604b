// Functions that need inline PTX: the only header with any.

#ifdef __CUDACC__  // The emulator under tests/ brings versions in plain C++.

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

// A product that the compiler does not fuse with an addition, so that all kernels round coordinates alike.
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

// Loads 16 bytes of read-only memory, or zeros if not valid. A predicate replaces the branch.
__device__ __forceinline__ void load_16_if(unsigned (&words)[4], const void* from, bool valid) {
  words[0] = words[1] = words[2] = words[3] = 0;
  asm("{\n  .reg .pred valid;\n  setp.ne.u32 valid, %5, 0;\n  @valid ld.global.nc.v4.u32 {%0, %1, %2, %3}, [%4];\n}"
      : "+r"(words[0]), "+r"(words[1]), "+r"(words[2]), "+r"(words[3])
      : "l"(from), "r"(static_cast<unsigned>(valid)));
}

// Stores 16 bytes to global memory at once. The compiler may split an ordinary store of a vector.
__device__ __forceinline__ void store_16(void* to, const unsigned (&words)[4]) {
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};"
               :
               : "l"(to), "r"(words[0]), "r"(words[1]), "r"(words[2]), "r"(words[3])
               : "memory");
}

// Rounds to nearest, ties away from zero.
__device__ __forceinline__ float round_to_tf32(float value) {
#if __CUDA_ARCH__ >= 800
  unsigned rounded;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(rounded) : "f"(value));
  return __uint_as_float(rounded);
#else
  const unsigned bits = __float_as_uint(value);
  return (bits & 0x7fffffffu) > 0x7f800000u ? value : __uint_as_float((bits + 0x1000u) & 0xffffe000u);
#endif
}

// The rest needs sm_80.

__device__ __forceinline__ unsigned shared_address(const void* shared) {
  return static_cast<unsigned>(__cvta_generic_to_shared(shared));
}

// Tensor core products of a warp: sums [16, 8] += a [16, k] * b [k, 8]. A row of a and a column of b have 32 bytes: k
// is 16 for 16-bit elements and 8 for TF32. Fragments have the order in which load_matrices returns them.
#define DCN_MULTIPLY(name, instruction)                                                                      \
  __device__ __forceinline__ void name(float (&sums)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) { \
    asm volatile(instruction " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"              \
                 : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])                                \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));                            \
  }
#if __CUDA_ARCH__ >= 800
DCN_MULTIPLY(multiply_half, "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32")
DCN_MULTIPLY(multiply_bfloat16, "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32")
DCN_MULTIPLY(multiply_tf32, "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32")

// Two floats as 16-bit elements, `low` in the lower half.
__device__ __forceinline__ unsigned pack_half(float low, float high) {
  unsigned packed;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}

__device__ __forceinline__ unsigned pack_bfloat16(float low, float high) {
  unsigned packed;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}

// Loads four matrices of eight rows of 16 bytes. Lane l passes the address of row l % 8 of matrix l / 8, and receives
// the 32-bit word l % 4 of row l / 4 of each matrix.
__device__ __forceinline__ void load_matrices(unsigned (&fragment)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(fragment[0]), "=r"(fragment[1]), "=r"(fragment[2]), "=r"(fragment[3])
               : "r"(shared_address(row))
               : "memory");
}

// Copies 16 bytes from global to shared memory, or zeros if not valid. They are visible to the thread after a wait, and
// to other threads after a barrier that follows it.
__device__ __forceinline__ void copy_16_async(void* shared, const void* global, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global),
               "r"(valid ? 16 : 0)
               : "memory");
}

__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

template <int pending>
__device__ __forceinline__ void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
}
#endif
#undef DCN_MULTIPLY

// The rest exists in compute capability 9.0 alone, compiled for sm_90a.
#ifdef __CUDA_ARCH_FEAT_SM90_ALL

// Descriptor of a tile of K-major rows of 128 bytes, in groups of eight rows, swizzled over 128 bytes.
__device__ __forceinline__ unsigned long long describe_tile(const unsigned char* tile) {
  constexpr unsigned long long swizzle_128 = 1ull << 62, group_step = (1024ull >> 4) << 32, unused_step = 1ull << 16;
  return ((shared_address(tile) & 0x3ffffu) >> 4) | unused_step | group_step | swizzle_128;
}

// The descriptor of the tile's rows from byte 32 * steps on.
__device__ __forceinline__ unsigned long long tile_step(unsigned long long tile, int steps) { return tile + 2 * steps; }

// clang-format off
#define DCN_NAMES_32                                                                                  \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, "   \
  "%21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define DCN_NAMES_64                                                                                  \
  DCN_NAMES_32 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "   \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define DCN_SUMS_8(i)                                                                                 \
  "+f"(sums[i]), "+f"(sums[i + 1]), "+f"(sums[i + 2]), "+f"(sums[i + 3]),                             \
  "+f"(sums[i + 4]), "+f"(sums[i + 5]), "+f"(sums[i + 6]), "+f"(sums[i + 7])
#define DCN_SUMS_32(i) DCN_SUMS_8(i), DCN_SUMS_8(i + 8), DCN_SUMS_8(i + 16), DCN_SUMS_8(i + 24)

#define DCN_MULTIPLY_TILES(name, shape, types, order)                                                 \
  __device__ __forceinline__ void name(float (&sums)[32], unsigned long long a, unsigned long long b) { \
    asm volatile("{\n  .reg .pred adds;\n  setp.eq.u32 adds, 0, 0;\n  wgmma.mma_async.sync.aligned.m64n64" shape types \
                 " {" DCN_NAMES_32 "}, %32, %33, adds, 1, 1" order ";\n}"                              \
                 : DCN_SUMS_32(0) : "l"(a), "l"(b));                                                  \
  }                                                                                                   \
  __device__ __forceinline__ void name(float (&sums)[64], unsigned long long a, unsigned long long b) { \
    asm volatile("{\n  .reg .pred adds;\n  setp.eq.u32 adds, 0, 0;\n  wgmma.mma_async.sync.aligned.m64n128" shape types \
                 " {" DCN_NAMES_64 "}, %64, %65, adds, 1, 1" order ";\n}"                              \
                 : DCN_SUMS_32(0), DCN_SUMS_32(32) : "l"(a), "l"(b));                                 \
  }
DCN_MULTIPLY_TILES(multiply_tiles_half, "k16", ".f32.f16.f16", ", 0, 0")
DCN_MULTIPLY_TILES(multiply_tiles_bfloat16, "k16", ".f32.bf16.bf16", ", 0, 0")
DCN_MULTIPLY_TILES(multiply_tiles_tf32, "k8", ".f32.tf32.tf32", "")
#undef DCN_MULTIPLY_TILES
#undef DCN_SUMS_32
#undef DCN_SUMS_8
#undef DCN_NAMES_64
#undef DCN_NAMES_32
// clang-format on

// Keeps the compiler from moving uses of the sums across this point.
template <int n>
__device__ __forceinline__ void pin(float (&sums)[n]) {
#pragma unroll
  for (int i = 0; i < n; ++i) asm volatile("" : "+f"(sums[i])::"memory");
}

// Called before the first product of a group.
template <int n>
__device__ __forceinline__ void begin_products(float (&sums)[n]) {
  pin(sums);
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

__device__ __forceinline__ void commit_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

template <int n>
__device__ __forceinline__ void wait_for_products(float (&sums)[n]) {
  asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
  pin(sums);
}

// Makes a thread's writes to shared memory visible to products that start after a following barrier.
__device__ __forceinline__ void show_to_products() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
#endif

#endif  // __CUDACC__
