// Sums of each channel over all pixels, and arrays filled with one value per channel.

#include "dcn/array_job.cuh"

// Channels of a tile of sums.
constexpr int kTile = 32;

// Adds the sums of all threads of a block in a fixed order; the total is thread 0's.
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

// Tile: an image's channel.
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

// Sums of 32 channels over rows, a thread of each group of 32 for every eighth row (at 256 threads).
template <typename Sum, typename Load>
__device__ __forceinline__ Sum sum_of_rows(int rows, unsigned char* shared, Load load) {
  Sum* partial = reinterpret_cast<Sum*>(shared);
  const int x = threadIdx.x % kTile, step = blockDim.x / kTile;
  Sum sum = Sum(0);
  for (int r = threadIdx.x / kTile; r < rows; r += step) sum += load(r);
  partial[threadIdx.x] = sum;
  __syncthreads();
  Sum total = Sum(0);
  if (threadIdx.x < kTile) {
    for (int i = 0; i < step; ++i) total += partial[i * kTile + x];
  }
  __syncthreads();
  return total;
}

// Tile: 32 channels of a part of the rows.
template <typename Scalar>
__device__ __forceinline__ void sum_row_part(const ArrayJob& job, int t, unsigned char* shared) {
  using Sum = Accumulator<Scalar>;
  const int channel_tiles = (job.C + kTile - 1) / kTile, part = t / channel_tiles;
  const int c = t % channel_tiles * kTile + threadIdx.x % kTile, first = part * job.P;
  const Scalar* source = static_cast<const Scalar*>(job.source) + static_cast<long long>(first) * job.C + c;
  const Sum total = sum_of_rows<Sum>(min(job.P, job.range.rows - first), shared, [&](int r) {
    return c < job.C ? widen(source[static_cast<long long>(r) * job.C]) : Sum(0);
  });
  if (threadIdx.x < kTile && c < job.C) {
    static_cast<Sum*>(job.target)[static_cast<long long>(part) * job.C + c] = total;
  }
}

// Tile: 32 channels.
template <typename Scalar>
__device__ __forceinline__ void sum_rows(const ArrayJob& job, int t, unsigned char* shared) {
  using Sum = Accumulator<Scalar>;
  const int c = t * kTile + threadIdx.x % kTile;
  const Sum* source = static_cast<const Sum*>(job.source) + c;
  const Sum total = sum_of_rows<Sum>(
      job.P, shared, [&](int r) { return c < job.C ? source[static_cast<long long>(r) * job.C] : Sum(0); });
  if (threadIdx.x < kTile && c < job.C) static_cast<Scalar*>(job.target)[c] = narrow<Scalar>(total);
}

// Tile: kFill elements.
constexpr int kFill = 4096;

template <typename Scalar>
__device__ __forceinline__ void fill_pixels(const ArrayJob& job, int t) {
  constexpr unsigned vector = 16 / sizeof(Scalar);
  const long long all = static_cast<long long>(job.N) * job.C * job.P, first = static_cast<long long>(t) * kFill;
  const unsigned count = static_cast<unsigned>(min(all - first, static_cast<long long>(kFill)));
  const unsigned first_channel = static_cast<unsigned>(first / job.P % job.C);
  const unsigned first_pixel = static_cast<unsigned>(first % job.P);
  const Scalar* source = static_cast<const Scalar*>(job.source);
  Scalar* target = static_cast<Scalar*>(job.target) + first;
  const auto value_at = [&](unsigned i) { return source[(first_channel + (first_pixel + i) / job.P) % job.C]; };
  // A vector is of one channel, or of consecutive ones.
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
