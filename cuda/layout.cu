// Between images [N, C, P] (P pixels, channels apart) and rows [N * P, C] (channels together), and sums over pixels.

#include "dcn/types.cuh"
#include "dcn/rows.cuh"

using Scalar = DCN_SCALAR;
using Sum = Accumulator<Scalar>;

struct LayoutParams {
  const void* source;  // pixels_to_rows, channel_sums: Scalar [N, C, P]; rows_to_pixels: Sum [rows, C]
  const Scalar* bias;  // [C] or null, added by rows_to_pixels
  void* target;        // pixels_to_rows: Scalar [rows, C]; rows_to_pixels: Scalar [N, C, P]; channel_sums: Scalar [C]
  int N, C, P;
  RowRange range;  // the rows to move
};

constexpr int kTile = 32;

// Index in [N, C, P] of channel c of a row.
__device__ __forceinline__ long long image_index(const LayoutParams& p, int row, int c) {
  const ImagePixel at = find_pixel(p.range, row, p.P);
  return (static_cast<long long>(at.image) * p.C + c) * p.P + at.pixel;
}

// Block: (32, 8) threads move tiles of 32 rows by 32 channels through shared memory, so that both sides are read and
// written in whole lines. Grid: tiles.
extern "C" __global__ void __launch_bounds__(256, 2) DCN_KERNEL(pixels_to_rows)(const LayoutParams p) {
  DCN_SHARED_MEMORY(shared);
  Scalar(*tile)[kTile + 1] = reinterpret_cast<Scalar(*)[kTile + 1]>(shared);
  const Scalar* source = static_cast<const Scalar*>(p.source);
  Scalar* target = static_cast<Scalar*>(p.target);
  const int x = threadIdx.x, channel_tiles = (p.C + kTile - 1) / kTile;
  const long long tiles = static_cast<long long>((p.range.rows + kTile - 1) / kTile) * channel_tiles;
  for (long long t = blockIdx.x; t < tiles; t += gridDim.x) {
    const int row = static_cast<int>(t / channel_tiles) * kTile, channel = static_cast<int>(t % channel_tiles) * kTile;
    const int rows = min(kTile, p.range.rows - row), channels = min(kTile, p.C - channel);
    for (int c = threadIdx.y; c < channels; c += blockDim.y) {
      if (x < rows) tile[c][x] = source[image_index(p, row + x, channel + c)];
    }
    __syncthreads();
    for (int r = threadIdx.y; r < rows; r += blockDim.y) {
      if (x < channels) {
        target[static_cast<long long>(row + r) * p.C + channel + x] = tile[x][r];
      }
    }
    __syncthreads();
  }
}

extern "C" __global__ void __launch_bounds__(256, 2) DCN_KERNEL(rows_to_pixels)(const LayoutParams p) {
  DCN_SHARED_MEMORY(shared);
  Sum(*tile)[kTile + 1] = reinterpret_cast<Sum(*)[kTile + 1]>(shared);
  const Sum* source = static_cast<const Sum*>(p.source);
  Scalar* target = static_cast<Scalar*>(p.target);
  const int x = threadIdx.x, channel_tiles = (p.C + kTile - 1) / kTile;
  const long long tiles = static_cast<long long>((p.range.rows + kTile - 1) / kTile) * channel_tiles;
  for (long long t = blockIdx.x; t < tiles; t += gridDim.x) {
    const int row = static_cast<int>(t / channel_tiles) * kTile, channel = static_cast<int>(t % channel_tiles) * kTile;
    const int rows = min(kTile, p.range.rows - row), channels = min(kTile, p.C - channel);
    for (int r = threadIdx.y; r < rows; r += blockDim.y) {
      if (x < channels) {
        tile[x][r] = source[static_cast<long long>(row + r) * p.C + channel + x];
      }
    }
    __syncthreads();
    for (int c = threadIdx.y; c < channels; c += blockDim.y) {
      if (x < rows) {
        const Sum bias = p.bias ? widen(p.bias[channel + c]) : Sum(0);
        target[image_index(p, row + x, channel + c)] = narrow<Scalar>(tile[c][x] + bias);
      }
    }
    __syncthreads();
  }
}

// Sums each channel of [N, C, P] over images and pixels, in a fixed order. Block: (256, 1) threads. Grid: channels.
extern "C" __global__ void __launch_bounds__(256, 2) DCN_KERNEL(channel_sums)(const LayoutParams p) {
  DCN_SHARED_MEMORY(shared);
  Sum* partial = reinterpret_cast<Sum*>(shared);
  const Scalar* source = static_cast<const Scalar*>(p.source);
  Scalar* target = static_cast<Scalar*>(p.target);
  for (int c = blockIdx.x; c < p.C; c += gridDim.x) {
    Sum sum = Sum(0);
    for (int n = 0; n < p.N; ++n) {
      const Scalar* pixels = source + (static_cast<long long>(n) * p.C + c) * p.P;
      for (int i = threadIdx.x; i < p.P; i += blockDim.x) sum += widen(pixels[i]);
    }
    partial[threadIdx.x] = sum;
    __syncthreads();
    for (int stride = blockDim.x / 2; stride > 0; stride /= 2) {
      if (threadIdx.x < stride) partial[threadIdx.x] += partial[threadIdx.x + stride];
      __syncthreads();
    }
    if (threadIdx.x == 0) target[c] = narrow<Scalar>(partial[0]);
    __syncthreads();
  }
}
