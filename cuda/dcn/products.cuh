// Products of two tiles in shared memory: sums[row, output] += the dot product of 128 bytes of a row of `a` and a row
// of `b`, for kTileRows rows of `a` and `outputs` rows of `b`. All threads of a block (kThreads of the class) take
// part. Each class distributes the sums over them in its own way: `visit` calls a function with (row / 8, row % 8,
// output, sum) for each sum that a thread holds in a slice of kSlice outputs.

#include "dcn/types.cuh"

constexpr int kTileRows = 128;
constexpr int kRowBytes = 128;
constexpr int kPieces = kRowBytes / 16;
constexpr int kSlice = 64;

// The address of the 16-byte piece i of a row. Pieces are permuted so that neither the same piece of eight rows, which
// load_matrices reads, nor the eight pieces of a row, which are written together, conflict on a bank.
__device__ __forceinline__ unsigned char* piece_of(unsigned char* tile, int row, int i) {
  return tile + row * kRowBytes + ((i ^ (row & 7)) << 4);
}

template <typename T>
constexpr bool is_half = false;
template <>
constexpr bool is_half<Half> = true;

// One instruction of the tensor cores.
template <typename T>
__device__ __forceinline__ void multiply(float (&sums)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
  if constexpr (sizeof(T) == sizeof(float)) {
    multiply_tf32(sums, a, b0, b1);
  } else if constexpr (is_half<T>) {
    multiply_half(sums, a, b0, b1);
  } else {
    multiply_bfloat16(sums, a, b0, b1);
  }
}

// An operand of the tensor cores: a float is rounded to TF32, 16-bit elements are taken as they are.
template <typename T>
__device__ __forceinline__ unsigned tensor_operand(unsigned bits) {
  return sizeof(T) == sizeof(float) ? __float_as_uint(round_to_tf32(__uint_as_float(bits))) : bits;
}

// Sums in fragments of 16 rows by 8 outputs. A warp has kI x kJ fragments.
template <int outputs>
struct TensorSums {
  static constexpr int kThreads = 256;
  static constexpr bool kIsAsync = false;
  static constexpr int kAcross = outputs >= 128 ? 4 : 2, kDown = 8 / kAcross;  // warps
  static constexpr int kI = kTileRows / kDown / 16, kJ = outputs / kAcross / 8;
  float at[kI][kJ][4];
  int row, output, lane;  // the warp's first row and output

  __device__ __forceinline__ TensorSums() : at{} {
    const int warp = threadIdx.x / 32;
    lane = threadIdx.x % 32;
    row = warp / kAcross * kI * 16;
    output = warp % kAcross * kJ * 8;
  }

  // Two pieces of 16 rows of `a` and of 16 rows of `b`, of which words 0 and 1 belong to the first eight outputs.
  __device__ __forceinline__ void load_a(unsigned (&fragment)[4], unsigned char* a, int i, int pair) const {
    load_matrices(fragment, piece_of(a, row + 16 * i + lane % 16, 2 * pair + lane / 16));
  }
  __device__ __forceinline__ void load_b(unsigned (&fragment)[4], unsigned char* b, int j, int pair) const {
    load_matrices(fragment, piece_of(b, output + 8 * j + lane % 8 + lane / 16 * 8, 2 * pair + lane / 8 % 2));
  }

  template <typename Visit>
  __device__ __forceinline__ void visit(int slice, Visit function) const {
    static_assert(kSlice % (kJ * 8) == 0, "a warp's outputs lie in one slice");
    if (output / kSlice != slice) return;
#pragma unroll
    for (int i = 0; i < kI; ++i) {
#pragma unroll
      for (int j = 0; j < kJ; ++j) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          function(row / 8 + 2 * i + e / 2, lane / 4, output % kSlice + 8 * j + lane % 4 * 2 + e % 2, at[i][j][e]);
        }
      }
    }
  }
};

// Products of 16-bit elements (exact) or of floats as TF32. Rows of `a` are stored as operands.
template <typename T, int outputs>
struct TensorProduct : TensorSums<outputs> {
  using TensorSums<outputs>::kI;
  using TensorSums<outputs>::kJ;
  static constexpr bool kRoundsA = true;

  __device__ __forceinline__ void add(unsigned char* a, unsigned char* b, int pair) {
    unsigned left[kI][4];
#pragma unroll
    for (int i = 0; i < kI; ++i) this->load_a(left[i], a, i, pair);
#pragma unroll
    for (int j = 0; j < kJ; j += 2) {
      unsigned right[4];
      this->load_b(right, b, j, pair);
#pragma unroll
      for (int e = 0; e < 4; ++e) right[e] = tensor_operand<T>(right[e]);
#pragma unroll
      for (int i = 0; i < kI; ++i) {
        multiply<T>(this->at[i][j], left[i], right[0], right[1]);
        multiply<T>(this->at[i][j + 1], left[i], right[2], right[3]);
      }
    }
  }
};

// Floats as sums of two TF32 numbers, which keep 21 bits together. A number that is not finite is only in `large`;
// `finite` is `large` with 0 instead, because the product of infinity with a `small` of 0 would be NaN.
struct SplitFragment {
  unsigned large[4], small[4], finite[4];

  __device__ __forceinline__ explicit SplitFragment(const unsigned (&bits)[4]) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const float value = __uint_as_float(bits[e]), rounded = round_to_tf32(value);
      const bool is_number = is_finite(rounded);
      large[e] = __float_as_uint(rounded);
      finite[e] = is_number ? large[e] : 0u;
      small[e] = is_number ? __float_as_uint(round_to_tf32(value - rounded)) : 0u;
    }
  }
};

// Products of floats at nearly float32 accuracy: three TF32 products, the smaller ones added first.
template <typename T, int outputs>
struct SplitTensorProduct : TensorSums<outputs> {
  using TensorSums<outputs>::kI;
  using TensorSums<outputs>::kJ;
  static constexpr bool kRoundsA = false;

  __device__ __forceinline__ void add(unsigned char* a, unsigned char* b, int pair) {
#pragma unroll
    for (int i = 0; i < kI; ++i) {
      unsigned bits[4];
      this->load_a(bits, a, i, pair);
      const SplitFragment left(bits);
#pragma unroll
      for (int j = 0; j < kJ; j += 2) {
        this->load_b(bits, b, j, pair);
        const SplitFragment right(bits);
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          float (&sums)[4] = this->at[i][j + h];
          multiply_tf32(sums, left.small, right.finite[2 * h], right.finite[2 * h + 1]);
          multiply_tf32(sums, left.finite, right.small[2 * h], right.small[2 * h + 1]);
          multiply_tf32(sums, left.large, right.large[2 * h], right.large[2 * h + 1]);
        }
      }
    }
  }
};

// Products of floats by fused multiply-adds. A thread has every sixteenth row and every kStep-th output.
template <typename T, int outputs>
struct FmaProduct {
  static constexpr int kThreads = outputs > 64 ? 512 : 256;
  static constexpr bool kIsAsync = false, kRoundsA = false;
  static constexpr int kStep = kThreads / 16, kI = kTileRows / 16, kJ = outputs / kStep;
  float at[kI][kJ];

  __device__ __forceinline__ FmaProduct() : at{} {}

  __device__ __forceinline__ void add(unsigned char* a, unsigned char* b, int pair) {
    using Piece = Vector<float, 4>;
    const int row = threadIdx.x % 16, output = threadIdx.x / 16;
    // Not unrolled, so that few registers hold factors.
#pragma unroll 1
    for (int half = 0; half < 2; ++half) {
      Piece right[kJ];
#pragma unroll
      for (int j = 0; j < kJ; ++j) {
        right[j] = *reinterpret_cast<const Piece*>(piece_of(b, output + kStep * j, 2 * pair + half));
      }
#pragma unroll
      for (int i = 0; i < kI; ++i) {
        const Piece left = *reinterpret_cast<const Piece*>(piece_of(a, row + 16 * i, 2 * pair + half));
#pragma unroll
        for (int e = 0; e < 4; ++e) {
#pragma unroll
          for (int j = 0; j < kJ; ++j) at[i][j] += left.at[e] * right[j].at[e];
        }
      }
    }
  }

  template <typename Visit>
  __device__ __forceinline__ void visit(int slice, Visit function) const {
    const int row = threadIdx.x % 16, output = threadIdx.x / 16;
#pragma unroll
    for (int j = 0; j < kJ; ++j) {
      if (kStep * j / kSlice != slice) continue;
#pragma unroll
      for (int i = 0; i < kI; ++i) function(row / 8 + 2 * i, row % 8, (output + kStep * j) % kSlice, at[i][j]);
    }
  }
};

// One instruction of a warpgroup.
template <typename T, int n>
__device__ __forceinline__ void multiply_tiles(float (&sums)[n], unsigned long long a, unsigned long long b) {
  if constexpr (sizeof(T) == sizeof(float)) {
    multiply_tiles_tf32(sums, a, b);
  } else if constexpr (is_half<T>) {
    multiply_tiles_half(sums, a, b);
  } else {
    multiply_tiles_bfloat16(sums, a, b);
  }
}

// TensorProduct with the instructions of compute capability 9.0. They read both tiles from shared memory and run
// asynchronously. Tiles are 1024-byte aligned; rows of both are stored as operands.
template <typename T, int outputs>
struct WarpgroupProduct {
  static constexpr bool kRoundsA = true, kIsAsync = true;
  static constexpr int kDown = 2, kAcross = outputs > 128 ? 2 : 1;  // warpgroups
  static constexpr int kThreads = 128 * kDown * kAcross, kOutputs = outputs / kAcross;
  float at[kOutputs / 2];
  int row, output;  // the warpgroup's first row and output

  __device__ __forceinline__ WarpgroupProduct() : at{} {
    // The shuffle tells the compiler that the value is the same in all lanes.
    const int group = __shfl_sync(kAllLanes, static_cast<int>(threadIdx.x / 128), 0);
    row = group % kDown * 64;
    output = group / kDown * kOutputs;
  }

  __device__ __forceinline__ void start(const unsigned char* a, const unsigned char* b) {
    const unsigned long long left = describe_tile(a + row * kRowBytes), right = describe_tile(b + output * kRowBytes);
    begin_products(at);
#pragma unroll
    for (int pair = 0; pair < kPieces / 2; ++pair) {
      multiply_tiles<T>(at, tile_step(left, pair), tile_step(right, pair));
    }
    commit_products();
  }

  __device__ __forceinline__ void finish() { wait_for_products(at); }

  template <typename Visit>
  __device__ __forceinline__ void visit(int slice, Visit function) const {
    const int warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
#pragma unroll
    for (int part = 0; part < kOutputs / kSlice; ++part) {
      if (output / kSlice + part != slice) continue;
#pragma unroll
      for (int j = 0; j < kSlice / 8; ++j) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          function(row / 8 + 2 * warp + e / 2, lane / 4, 8 * j + lane % 4 * 2 + e % 2,
                   at[4 * (kSlice / 8 * part + j) + e]);
        }
      }
    }
  }
};
