// The sizes of a deformable convolution, the order of its rows and columns, and the sampling points of its taps.

#include "dcn/rows.cuh"
#include "dcn/sampling.cuh"

// Strides of offset [N, 2*D*K, oh*ow] and mask [N, D*K, oh*ow], or of their gradients, in elements.
struct SamplingStrides {
  long long offset_image, mask_image;
  int offset_channel, offset_pixel;
  int mask_channel, mask_pixel;
};

struct DeformConvSizes {
  int N, C, H, W;
  int oh, ow, kh, kw;
  int sh, sw, dh, dw;
  int pad_top, pad_left;
  int G, D;
  SamplingStrides stride;
};

// One (row, deformable group, tap): its image, output pixel, and indices of its offset and mask.
struct Tap {
  int image, pixel;     // pixel = a * ow + b
  long long offset_at;  // index of dy in offset; dx is one channel further
  long long mask_at;    // index in mask
};

__device__ __forceinline__ Tap tap_of_pixel(const SamplingStrides& stride, const ImagePixel& at, int group_tap) {
  const long long image = at.image, channel = group_tap, pixel = at.pixel;
  return {at.image, at.pixel,
          image * stride.offset_image + 2 * channel * stride.offset_channel + pixel * stride.offset_pixel,
          image * stride.mask_image + channel * stride.mask_channel + pixel * stride.mask_pixel};
}

__device__ __forceinline__ Tap find_tap(const DeformConvSizes& size, const RowRange& range, int row, int group_tap) {
  return tap_of_pixel(size.stride, find_pixel(range, row, size.oh * size.ow), group_tap);
}

// The sampling point of a tap at (y, x) before its offset is added.
__device__ __forceinline__ SamplePoint<Sum> locate_shifted(const DeformConvSizes& size, const Tap& tap, int y, int x,
                                                           const OffsetScalar* offset) {
  const Sum dy = widen(offset[tap.offset_at]);
  const Sum dx = widen(offset[tap.offset_at + size.stride.offset_channel]);
  return locate(static_cast<Sum>(y) + dy, static_cast<Sum>(x) + dx, size.H, size.W);
}

__device__ __forceinline__ SamplePoint<Sum> locate_tap(const DeformConvSizes& size, const Tap& tap, int group_tap,
                                                       const OffsetScalar* offset) {
  const int k = group_tap % (size.kh * size.kw);
  const int y = tap.pixel / size.ow * size.sh - size.pad_top + k / size.kw * size.dh;
  const int x = tap.pixel % size.ow * size.sw - size.pad_left + k % size.kw * size.dw;
  return locate_shifted(size, tap, y, x, offset);
}

// Index of a sampling point's first neighbour in images [N, H, W]; it may be outside its image.
__device__ __forceinline__ long long first_neighbour(const DeformConvSizes& size, int image, int y0, int x0) {
  return (static_cast<long long>(image) * size.H + y0) * size.W + x0;
}

// Index in columns [rows, G, K, C/G] of channel c of a tap in a row.
__device__ __forceinline__ long long column_index(const DeformConvSizes& size, int row, int k, int c) {
  const int K = size.kh * size.kw, group_channels = size.C / size.G;
  const int g = size.G == 1 ? 0 : c / group_channels;
  return static_cast<long long>(row) * K * size.C + (static_cast<long long>(g) * K + k) * group_channels +
         (c - g * group_channels);
}

// The sampling points that a block prepares together: one (deformable group, tap) of some rows. Tiles with consecutive
// numbers share rows.
struct SampleTile {
  int group_tap, k;
  int first_row, samples;
  int first_channel, channels;  // of the deformable group
};

__device__ __forceinline__ int sample_tiles(const DeformConvSizes& size, const RowRange& range, int tile_rows) {
  return (range.rows + tile_rows - 1) / tile_rows * size.D * size.kh * size.kw;
}

__device__ __forceinline__ SampleTile sample_tile(const DeformConvSizes& size, const RowRange& range, int tile_rows,
                                                  int index) {
  const int K = size.kh * size.kw;
  SampleTile tile;
  tile.group_tap = index % (size.D * K);
  tile.k = tile.group_tap % K;
  tile.first_row = index / (size.D * K) * tile_rows;
  tile.samples = min(tile_rows, range.rows - tile.first_row);
  tile.channels = size.C / size.D;
  tile.first_channel = tile.group_tap / K * tile.channels;
  return tile;
}
