// The functions of cuda/dcn/ptx.cuh in plain C++. Their comments are there; scheduler.h lists what they may use.
#pragma once

inline float half_to_float(unsigned short bits) {
  _Float16 value;
  __builtin_memcpy(&value, &bits, sizeof value);
  return static_cast<float>(value);
}

inline unsigned short float_to_half(float value) {
  const _Float16 rounded = static_cast<_Float16>(value);
  unsigned short bits;
  __builtin_memcpy(&bits, &rounded, sizeof bits);
  return bits;
}

inline float rounded_product(float a, float b) { return a * b; }
inline double rounded_product(double a, double b) { return a * b; }

inline void add_4(float* to, float a, float b, float c, float d) {
  if (reinterpret_cast<unsigned long long>(to) % 16) cuda_on_cpu::fail("add_4: address not 16-byte aligned");
  atomicAdd(to, a);
  atomicAdd(to + 1, b);
  atomicAdd(to + 2, c);
  atomicAdd(to + 3, d);
}

inline void load_16_if(unsigned (&words)[4], const void* from, bool valid) {
  if (valid && reinterpret_cast<unsigned long long>(from) % 16) cuda_on_cpu::fail("load_16_if: not 16-byte aligned");
  if (valid) {
    __builtin_memcpy(words, from, 16);
  } else {
    __builtin_memset(words, 0, 16);
  }
}

inline void store_16(void* to, const unsigned (&words)[4]) {
  if (reinterpret_cast<unsigned long long>(to) % 16) cuda_on_cpu::fail("store_16: not 16-byte aligned");
  __builtin_memcpy(to, words, 16);
}

namespace cuda_on_cpu {

template <int k, class Element>
void multiply_fragments(float (&sums)[4], const unsigned (&a)[4], unsigned b0, unsigned b1, Element element,
                        Site site) {
  struct Fragments {
    unsigned a[4], b[2];
    float sums[4];
  };
  struct Sums {
    float at[4];
  };
  Fragments mine{{a[0], a[1], a[2], a[3]}, {b0, b1}, {sums[0], sums[1], sums[2], sums[3]}};
  Sums result;
  collective(
      0xffffffffu, mine, result,
      [&](const Fragments* const* in, Sums* const* out, unsigned) {
        constexpr int per_word = k / 8;  // elements of a 32-bit register
        float left[16][k], right[k][8];
        for (int lane = 0; lane < 32; ++lane) {
          const int row = lane / 4, column = lane % 4 * per_word;
          for (int e = 0; e < per_word; ++e) {
            for (int i = 0; i < 4; ++i) left[row + i % 2 * 8][column + i / 2 * k / 2 + e] = element(in[lane]->a[i], e);
            for (int i = 0; i < 2; ++i) right[column + i * k / 2 + e][row] = element(in[lane]->b[i], e);
          }
        }
        for (int lane = 0; lane < 32; ++lane) {
          for (int i = 0; i < 4; ++i) {
            float sum = in[lane]->sums[i];
            for (int e = 0; e < k; ++e) sum += left[lane / 4 + i / 2 * 8][e] * right[e][lane % 4 * 2 + i % 2];
            out[lane]->at[i] = sum;
          }
        }
      },
      site);
  for (int i = 0; i < 4; ++i) sums[i] = result.at[i];
}

}  // namespace cuda_on_cpu

inline void multiply_half(float (&sums)[4], const unsigned (&a)[4], unsigned b0, unsigned b1,
                          cuda_on_cpu::Site site = cuda_on_cpu::Site::here("multiply_half")) {
  cuda_on_cpu::multiply_fragments<16>(
      sums, a, b0, b1,
      [](unsigned word, int e) { return half_to_float(static_cast<unsigned short>(word >> (16 * e))); }, site);
}

inline void multiply_bfloat16(float (&sums)[4], const unsigned (&a)[4], unsigned b0, unsigned b1,
                              cuda_on_cpu::Site site = cuda_on_cpu::Site::here("multiply_bfloat16")) {
  cuda_on_cpu::multiply_fragments<16>(
      sums, a, b0, b1, [](unsigned word, int e) { return __uint_as_float((e ? word >> 16 : word & 0xffffu) << 16); },
      site);
}

// Like the hardware, this ignores the lower 13 bits of an operand.
inline void multiply_tf32(float (&sums)[4], const unsigned (&a)[4], unsigned b0, unsigned b1,
                          cuda_on_cpu::Site site = cuda_on_cpu::Site::here("multiply_tf32")) {
  cuda_on_cpu::multiply_fragments<8>(
      sums, a, b0, b1, [](unsigned word, int) { return __uint_as_float(word & 0xffffe000u); }, site);
}

inline float round_to_tf32(float value) {
  const unsigned bits = __float_as_uint(value);
  return (bits & 0x7fffffffu) > 0x7f800000u ? value : __uint_as_float((bits + 0x1000u) & 0xffffe000u);
}

inline void load_matrices(unsigned (&fragment)[4], const void* row,
                          cuda_on_cpu::Site site = cuda_on_cpu::Site::here("load_matrices")) {
  if (reinterpret_cast<unsigned long long>(row) % 16) cuda_on_cpu::fail("load_matrices: row not 16-byte aligned");
  struct Words {
    unsigned at[4];
  };
  Words words;
  cuda_on_cpu::collective(
      0xffffffffu, row, words,
      [](const void* const* const* in, Words* const* out, unsigned) {
        for (int lane = 0; lane < 32; ++lane) {
          for (int i = 0; i < 4; ++i) {
            __builtin_memcpy(&out[lane]->at[i], static_cast<const char*>(*in[8 * i + lane / 4]) + lane % 4 * 4, 4);
          }
        }
      },
      site);
  for (int i = 0; i < 4; ++i) fragment[i] = words.at[i];
}

inline unsigned pack_half(float low, float high) {
  return float_to_half(low) | static_cast<unsigned>(float_to_half(high)) << 16;
}

inline unsigned pack_bfloat16(float low, float high) {
  const auto round = [](float value) {
    const unsigned bits = __float_as_uint(value);
    return (bits & 0x7fffffffu) > 0x7f800000u ? 0x7fffu : (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  };
  return round(low) | round(high) << 16;
}

inline void copy_16_async(void* shared, const void* global, bool valid,
                          cuda_on_cpu::Site site = cuda_on_cpu::Site::here("copy_16_async")) {
  cuda_on_cpu::copy_async(shared, global, 16, valid ? 16 : 0, site);
}

inline void commit_copies() { cuda_on_cpu::copy_async_commit(); }

template <int pending>
inline void wait_for_copies() {
  cuda_on_cpu::copy_async_wait(pending);
}

// Products of a warpgroup (four warps): sums [64, 2 * n] += a [64, 32 bytes] * b [2 * n, 32 bytes]. Tiles have rows of 128
// bytes in shared memory; their 16-byte pieces are permuted as `piece_of` does. Warp w of the group has the rows from
// 16 * w on. In a lane, sums[4 * j + e] belongs to row lane / 4 + 8 * (e / 2) and output 8 * j + lane % 4 * 2 + e % 2.
// Computed at the wait, so that a write to a tile before the wait shows.
inline unsigned long long describe_tile(const unsigned char* tile) {
  const unsigned long long address = reinterpret_cast<unsigned long long>(tile);
  if (address % 1024 >= 128 || address % 32) cuda_on_cpu::fail("describe_tile: tile not 1024-byte aligned");
  return address;
}
inline unsigned long long tile_step(unsigned long long tile, int steps) {
  return tile + 32 * static_cast<unsigned>(steps);
}

namespace cuda_on_cpu {

template <int n, int k, class Element>
void multiply_tiles(float (&sums)[n], unsigned long long a, unsigned long long b, Element element) {
  struct Closure {
    float* sums;
    unsigned long long a, b;
    unsigned warp, lane;
    Element element;
  } closure = {sums, a, b, current->linear / 32 % 4, current->lane, element};
  defer(
      [](const void* deferred) {
        const Closure& c = *static_cast<const Closure*>(deferred);
        const auto load = [&](unsigned long long tile, unsigned row, int i) {
          unsigned long long at = tile + 128 * row + 32 / k * i;
          at ^= ((at >> 7) & 7) << 4;
          unsigned bits = 0;
          __builtin_memcpy(&bits, reinterpret_cast<const void*>(at), 32 / k);
          return c.element(bits);
        };
        for (int j = 0; j < n / 4; ++j) {
          for (unsigned e = 0; e < 4; ++e) {
            float sum = c.sums[4 * j + e];
            for (int i = 0; i < k; ++i) {
              sum += load(c.a, 16 * c.warp + c.lane / 4 + 8 * (e / 2), i) *
                     load(c.b, 8 * static_cast<unsigned>(j) + c.lane % 4 * 2 + e % 2, i);
            }
            c.sums[4 * j + e] = sum;
          }
        }
      },
      &closure, sizeof closure);
}

}  // namespace cuda_on_cpu

template <int n>
void multiply_tiles_half(float (&sums)[n], unsigned long long a, unsigned long long b) {
  cuda_on_cpu::multiply_tiles<n, 16>(sums, a, b,
                                     [](unsigned bits) { return half_to_float(static_cast<unsigned short>(bits)); });
}
template <int n>
void multiply_tiles_bfloat16(float (&sums)[n], unsigned long long a, unsigned long long b) {
  cuda_on_cpu::multiply_tiles<n, 16>(sums, a, b, [](unsigned bits) { return __uint_as_float(bits << 16); });
}
template <int n>
void multiply_tiles_tf32(float (&sums)[n], unsigned long long a, unsigned long long b) {
  cuda_on_cpu::multiply_tiles<n, 8>(sums, a, b, [](unsigned bits) { return __uint_as_float(bits & 0xffffe000u); });
}
template <int n>
void begin_products(float (&)[n]) {}
inline void commit_products() {}
template <int n>
void wait_for_products(float (&)[n]) {
  cuda_on_cpu::run_deferred();
}
inline void show_to_products() {}
