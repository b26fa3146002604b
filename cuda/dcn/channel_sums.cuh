// Sums of each channel over all pixels, and arrays filled with one value per channel or with zeros.

#include "dcn/array_job.cuh"

// Channels of a tile of a sum over rows.
constexpr int kSumTileChannels = 32;

// Returns the sum over all threads of a block, added in a fixed order.
template <typename Sum>
__device__ __forceinline__ Sum block_sum(Sum value, unsigned char* shared) {
  Sum* partial = reinterpret_cast<Sum*>(shared);
  partial[threadIdx.x] = value;
  __syncthreads();
  for (int stride = blockDim.x / 2; stride > 0; stride /= 2) {
    if (threadIdx.x < stride) partial[threadIdx.x] += partial[threadIdx.x + stride];
    __syncthreads();
  }
  const Sum total = partial[0];
  __syncthreads();
  return total;
}

// Tile: a channel of an image.
template <typename Scalar>
__device__ __forceinline__ void sum_pixels(const ArrayJob& job, int t, unsigned char* shared) {
  using Sum = Accumulator<Scalar>;
  const Scalar* pixels = static_cast<const Scalar*>(job.source) + static_cast<long long>(t) * job.P;
  constexpr int vector = 16 / sizeof(Scalar);
  const int in_vectors = is_aligned(pixels, 16) ? job.P / vector * vector : 0;
  Sum sum = Sum(0);
  for (int i = threadIdx.x * vector; i < in_vectors; i += blockDim.x * vector) {
    const auto values = *reinterpret_cast<const Vector<Scalar, vector>*>(pixels + i);
#pragma unroll
    for (int e = 0; e < vector; ++e) sum += widen(values.at[e]);
  }
  for (int i = in_vectors + threadIdx.x; i < job.P; i += blockDim.x) sum += widen(pixels[i]);
  const Sum total = block_sum(sum, shared);
  if (threadIdx.x == 0) static_cast<Sum*>(job.target)[t] = total;
}

// Returns the sums of a tile's channels over rows to its first threads. Each thread adds up every `step`-th row.
template <typename Sum, typename Load>
__device__ __forceinline__ Sum sum_of_rows(int rows, unsigned char* shared, Load load) {
  Sum* partial = reinterpret_cast<Sum*>(shared);
  const int x = threadIdx.x % kSumTileChannels, step = blockDim.x / kSumTileChannels;
  Sum sum = Sum(0);
  for (int r = threadIdx.x / kSumTileChannels; r < rows; r += step) sum += load(r);
  partial[threadIdx.x] = sum;
  __syncthreads();
  Sum total = Sum(0);
  if (threadIdx.x < kSumTileChannels) {
    for (int i = 0; i < step; ++i) total += partial[i * kSumTileChannels + x];
  }
  __syncthreads();
  return total;
}

// Tile: kSumTileChannels channels of a part of the rows.
template <typename Scalar>
__device__ __forceinline__ void sum_row_part(const ArrayJob& job, int t, unsigned char* shared) {
  using Sum = Accumulator<Scalar>;
  const int channel_tiles = (job.C + kSumTileChannels - 1) / kSumTileChannels, part = t / channel_tiles;
  const int c = t % channel_tiles * kSumTileChannels + threadIdx.x % kSumTileChannels, first = part * job.P;
  const Scalar* source = static_cast<const Scalar*>(job.source) + static_cast<long long>(first) * job.C + c;
  const Sum total = sum_of_rows<Sum>(min(job.P, job.range.rows - first), shared, [&](int r) {
    return c < job.C ? widen(source[static_cast<long long>(r) * job.C]) : Sum(0);
  });
  if (threadIdx.x < kSumTileChannels && c < job.C) {
    static_cast<Sum*>(job.target)[static_cast<long long>(part) * job.C + c] = total;
  }
}

// Tile: kSumTileChannels channels.
template <typename Scalar>
__device__ __forceinline__ void sum_rows(const ArrayJob& job, int t, unsigned char* shared) {
  using Sum = Accumulator<Scalar>;
  const int c = t * kSumTileChannels + threadIdx.x % kSumTileChannels;
  const Sum* source = static_cast<const Sum*>(job.source) + c;
  const Sum total = sum_of_rows<Sum>(
      job.P, shared, [&](int r) { return c < job.C ? source[static_cast<long long>(r) * job.C] : Sum(0); });
  if (threadIdx.x < kSumTileChannels && c < job.C) static_cast<Scalar*>(job.target)[c] = narrow<Scalar>(total);
}

// Tile: kFillTileElements elements.
constexpr int kFillTileElements = 4096;

template <typename Scalar>
__device__ __forceinline__ void fill_pixels(const ArrayJob& job, int t) {
  constexpr unsigned vector = 16 / sizeof(Scalar);
  const long long all = static_cast<long long>(job.N) * job.C * job.P,
                  first = static_cast<long long>(t) * kFillTileElements;
  const unsigned count = static_cast<unsigned>(min(all - first, static_cast<long long>(kFillTileElements)));
  const unsigned first_channel = static_cast<unsigned>(first / job.P % job.C);
  const unsigned first_pixel = static_cast<unsigned>(first % job.P);
  const Scalar* source = static_cast<const Scalar*>(job.source);
  Scalar* target = static_cast<Scalar*>(job.target) + first;
  const auto value_at = [&](unsigned i) { return source[(first_channel + (first_pixel + i) / job.P) % job.C]; };
  // A vector belongs to one channel, or to consecutive channels of one pixel each.
  if (is_aligned(target, 16) && (job.P == 1 ? job.C : job.P) % vector == 0) {
#pragma unroll 1
    for (unsigned i = threadIdx.x * vector; i < count; i += blockDim.x * vector) {
      Vector<Scalar, vector> elements;
#pragma unroll
      for (unsigned e = 0; e < vector; ++e) elements.at[e] = value_at(job.P == 1 ? i + e : i);
      *reinterpret_cast<Vector<Scalar, vector>*>(target + i) = elements;
    }
  } else {
#pragma unroll 1
    for (unsigned i = threadIdx.x; i < count; i += blockDim.x) target[i] = value_at(i);
  }
}

// Tile: kFillTileElements elements.
template <typename Sum>
__device__ __forceinline__ void write_zeros(const ArrayJob& job, int t) {
  constexpr unsigned vector = 16 / sizeof(Sum);
  const long long all = static_cast<long long>(job.N) * job.C * job.P,
                  first = static_cast<long long>(t) * kFillTileElements;
  const unsigned count = static_cast<unsigned>(min(all - first, static_cast<long long>(kFillTileElements)));
  Sum* target = static_cast<Sum*>(job.target) + first;
  const unsigned in_vectors = is_aligned(target, 16) ? count / vector * vector : 0;
#pragma unroll 1
  for (unsigned i = threadIdx.x * vector; i < in_vectors; i += blockDim.x * vector) {
    *reinterpret_cast<Vector<Sum, vector>*>(target + i) = {};
  }
#pragma unroll 1
  for (unsigned i = in_vectors + threadIdx.x; i < count; i += blockDim.x) target[i] = Sum(0);
}
