// Forward pass of deformable RoI pooling: each bin of a region averages bilinear samples of the image on a grid that
// the bin's offset shifts.

#include "dcn/roi_bins.cuh"

struct DeformRoIPoolForwardParams {
  const Scalar* input;  // [N, H, W, C]
  Scalar* output;       // [R, C, P, Q], or [R, P, Q, C] if channels_last
  DeformRoIPoolBins bins;
  int lane_bits;  // 2^lane_bits lanes cover the channel vectors of a pixel; the other lanes take other pixels
  int tile_bins;
  int channels_last;
};

// Block: (32, 8), one warp per bin. Grid: tiles of bins and channels. Neighbouring bins share a block because they
// share pixels, which then hit the L1 cache.
extern "C" __global__ void __launch_bounds__(kThreads, 3)
    DCN_KERNEL(deform_roi_pool_forward)(const DeformRoIPoolForwardParams p) {
  DCN_SHARED_MEMORY(shared);
  WarpPixels& pixels_of_warp = reinterpret_cast<WarpPixels*>(shared)[threadIdx.y];
  ScalarVector* const tile = reinterpret_cast<ScalarVector*>(shared + blockDim.y * sizeof(WarpPixels));
  const DeformRoIPoolSizes& size = p.bins.size;
  const int lane = threadIdx.x, lanes = 1 << p.lane_bits, slice = lanes * DCN_VEC,
            slices = (size.C + slice - 1) / slice;
  const long long tiles = row_tiles(size, p.tile_bins) * slices;
  for (long long t = blockIdx.x; t < tiles; t += gridDim.x) {
    const RowRange range = row_tile(size, p.tile_bins, t / slices);
    const int first_channel = static_cast<int>(t % slices) * slice, c = first_channel + (lane & (lanes - 1)) * DCN_VEC;
    const bool has_channels = c < size.C;
    for (int row = threadIdx.y; row < range.rows; row += blockDim.y) {
      const ImagePixel at = find_pixel(range, row, size.P * size.Q);
      const WarpBin bin = find_bin(p.bins, at);
      const Scalar* image = p.input + static_cast<long long>(bin.share.image) * size.H * size.W * size.C + c;
      Sum sums[DCN_VEC] = {};
      for_pixels_of_bin<false>(bin, size.H, size.W, pixels_of_warp, [&](const BinPixel* pixels, int count) {
        if (!has_channels) return;
#pragma unroll 2
        for (int i = lane >> p.lane_bits; i < count; i += kWarp >> p.lane_bits) {
          const Sum weight = pixels[i].weight;
          const auto values =
              *reinterpret_cast<const ScalarVector*>(image + static_cast<long long>(pixels[i].at) * size.C);
#pragma unroll
          for (int e = 0; e < DCN_VEC; ++e) sums[e] += weight * widen(values.at[e]);
        }
      });
      for (int step = lanes; step < kWarp; step *= 2) {
#pragma unroll
        for (int e = 0; e < DCN_VEC; ++e) sums[e] += __shfl_xor_sync(kAllLanes, sums[e], step);
      }
      if (!has_channels || lane >= lanes) continue;
      ScalarVector pooled;
#pragma unroll
      for (int e = 0; e < DCN_VEC; ++e) {
        pooled.at[e] = narrow<Scalar>(bin.share.image < 0 ? not_a_number<Sum>() : weighted(bin.share.scale, sums[e]));
      }
      if (p.channels_last) {
        *reinterpret_cast<ScalarVector*>(p.output + row_index(size, at, c)) = pooled;
      } else {
        tile[row * (lanes + 1) + lane] = pooled;
      }
    }
    if (p.channels_last) continue;
    __syncthreads();
    const long long channel_stride = static_cast<long long>(size.P) * size.Q;
    for_vectors_of_tile(size, range, first_channel, lanes, tile, [&](const ScalarVector& pooled, long long index) {
#pragma unroll
      for (int e = 0; e < DCN_VEC; ++e) p.output[index + e * channel_stride] = pooled.at[e];
    });
    __syncthreads();
  }
}
