// Moving images [N, C, P] (P pixels, channels apart) to rows [N * P, C] (channels together) and back, and summing over
// pixels. A launch does several jobs of this kind: its blocks take the tiles of all jobs in turn.

#include "dcn/types.cuh"
#include "dcn/rows.cuh"

enum LayoutTask {
  kNothing,
  kPixelsToRows,  // Scalar [N, C, P] to Scalar [rows, C]
  kRowsToPixels,  // Sum [rows, C] plus bias to Scalar [N, C, P]
  kSumPixels,     // Scalar [N, C, P] to Sum [N, C]
  kSumRows,       // Sum [P, C] to Scalar [C]
  kSumRowParts,   // Scalar [rows, C] to Sum [parts, C], a part being P rows
  kFillPixels,    // Scalar [N, C, P] with Scalar [C]
};

struct LayoutJob {
  const void* source;
  const void* bias;  // Scalar [C] or null, for kRowsToPixels
  void* target;
  int task;
  int N, C, P;
  RowRange range;  // the rows to move
  int tiles;
};

constexpr int kLayoutJobs = 4;

struct LayoutParams {
  LayoutJob jobs[kLayoutJobs];
};

constexpr int kTile = 32;

// What the tiles need of shared memory, in elements of type Sum.
constexpr int kLayoutShared = kTile * (kTile + 1);

// Index in [N, C, P] of channel c of a row.
__device__ __forceinline__ long long image_index(const LayoutJob& job, int row, int c) {
  const ImagePixel at = find_pixel(job.range, row, job.P);
  return (static_cast<long long>(at.image) * job.C + c) * job.P + at.pixel;
}

// Tiles of 32 rows by 32 channels go through shared memory, so that both sides are read and written in whole lines.
template <typename Scalar>
__device__ __forceinline__ void transpose_tile(const LayoutJob& job, int t, unsigned char* shared) {
  using Sum = Accumulator<Scalar>;
  Sum(*tile)[kTile + 1] = reinterpret_cast<Sum(*)[kTile + 1]>(shared);
  const int channel_tiles = (job.C + kTile - 1) / kTile;
  const int row = t / channel_tiles * kTile, channel = t % channel_tiles * kTile;
  const int rows = min(kTile, job.range.rows - row), channels = min(kTile, job.C - channel);
  const int x = threadIdx.x % kTile, y = threadIdx.x / kTile, step = blockDim.x / kTile;
  if (job.task == kPixelsToRows) {
    const Scalar* source = static_cast<const Scalar*>(job.source);
    Scalar* target = static_cast<Scalar*>(job.target);
    for (int c = y; c < channels; c += step) {
      if (x < rows) tile[c][x] = widen(source[image_index(job, row + x, channel + c)]);
    }
    __syncthreads();
    for (int r = y; r < rows; r += step) {
      if (x < channels) {
        target[static_cast<long long>(row + r) * job.C + channel + x] = narrow<Scalar>(tile[x][r]);
      }
    }
  } else {
    const Sum* source = static_cast<const Sum*>(job.source);
    const Scalar* bias = static_cast<const Scalar*>(job.bias);
    Scalar* target = static_cast<Scalar*>(job.target);
    for (int r = y; r < rows; r += step) {
      if (x < channels) tile[x][r] = source[static_cast<long long>(row + r) * job.C + channel + x];
    }
    __syncthreads();
    for (int c = y; c < channels; c += step) {
      if (x < rows) {
        const Sum added = bias ? widen(bias[channel + c]) : Sum(0);
        target[image_index(job, row + x, channel + c)] = narrow<Scalar>(tile[c][x] + added);
      }
    }
  }
  __syncthreads();
}

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
__device__ __forceinline__ void sum_pixels(const LayoutJob& job, int t, unsigned char* shared) {
  using Sum = Accumulator<Scalar>;
  const Scalar* pixels = static_cast<const Scalar*>(job.source) + static_cast<long long>(t) * job.P;
  Sum sum = Sum(0);
  for (int i = threadIdx.x; i < job.P; i += blockDim.x) sum += widen(pixels[i]);
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
__device__ __forceinline__ void sum_row_part(const LayoutJob& job, int t, unsigned char* shared) {
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
__device__ __forceinline__ void sum_rows(const LayoutJob& job, int t, unsigned char* shared) {
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
__device__ __forceinline__ void fill_pixels(const LayoutJob& job, int t) {
  const Scalar* source = static_cast<const Scalar*>(job.source);
  Scalar* target = static_cast<Scalar*>(job.target);
  const long long first = static_cast<long long>(t) * kFill, end = static_cast<long long>(job.N) * job.C * job.P;
  for (long long i = first + threadIdx.x; i < min(end, first + kFill); i += blockDim.x) {
    target[i] = source[i / job.P % job.C];
  }
}

__device__ __forceinline__ long long layout_tiles(const LayoutParams& p) {
  long long tiles = 0;
#pragma unroll
  for (int i = 0; i < kLayoutJobs; ++i) tiles += p.jobs[i].tiles;
  return tiles;
}

// One tile of one job. Block: 256 threads in one row, all with the same t.
template <typename Scalar>
__device__ __forceinline__ void do_layout_tile(const LayoutParams& p, long long t, unsigned char* shared) {
#pragma unroll
  for (int i = 0; i < kLayoutJobs; ++i) {
    const LayoutJob& job = p.jobs[i];
    if (t >= 0 && t < job.tiles) {
      const int tile = static_cast<int>(t);
      switch (job.task) {
        case kPixelsToRows:
        case kRowsToPixels:
          transpose_tile<Scalar>(job, tile, shared);
          break;
        case kSumPixels:
          sum_pixels<Scalar>(job, tile, shared);
          break;
        case kSumRows:
          sum_rows<Scalar>(job, tile, shared);
          break;
        case kSumRowParts:
          sum_row_part<Scalar>(job, tile, shared);
          break;
        case kFillPixels:
          fill_pixels<Scalar>(job, tile);
          break;
      }
    }
    t -= job.tiles;
  }
}
