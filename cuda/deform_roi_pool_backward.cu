// Backward pass of deformable RoI pooling bin by bin: the gradients of the bin's offset and mask, and atomic additions
// to the gradient of the input.

#include "dcn/roi_bins.cuh"

struct DeformRoIPoolBackwardParams {
  const Scalar* input;        // [N, H, W, C], or null without grad_offset and grad_mask
  const Scalar* grad_out;     // [R, C, P, Q], or [R, P, Q, C] if channels_last
  OffsetScalar* grad_offset;  // [R, 2, P, Q], written, or null
  OffsetScalar* grad_mask;    // [R, P, Q], written, or null
  Sum* grad_input;            // [N, H, W, C], added to, or null
  DeformRoIPoolBins bins;
  int lane_bits;  // 2^lane_bits lanes cover the channel vectors of a pixel; the other lanes take other pixels
  int tile_bins;
  int channels_last;
};

// Dot products of a bin's gradient with its value before the mask and with the derivatives of that value along y and x.
struct alignas(16) BinDots {
  Sum value, slope_y, slope_x;
};

static_assert(sizeof(BinDots) == 4 * sizeof(Sum), "as the launch plan allocates");

__device__ __forceinline__ void write_gradients(const DeformRoIPoolBackwardParams& p, const ImagePixel& at,
                                                const BinShare& share, Sum height, Sum width, const BinDots& dots) {
  const DeformRoIPoolSizes& size = p.bins.size;
  const bool is_nan = share.image < 0;
  if (p.grad_mask) {
    const Sum grad = is_nan ? not_a_number<Sum>() : share.per_sample * dots.value;
    p.grad_mask[mask_index(size, at)] = narrow<OffsetScalar>(grad);
  }
  if (p.grad_offset) {
    const Sum scale = static_cast<Sum>(size.gamma) * share.scale;
    // A slope of 0 stays 0 for an infinite factor as well.
    const auto offset_gradient = [](Sum factor, Sum slope) {
      return slope != Sum(0) ? weighted(factor, slope) : Sum(0);
    };
    const Sum grad_x = is_nan ? not_a_number<Sum>() : offset_gradient(scale * width, dots.slope_x);
    const Sum grad_y = is_nan ? not_a_number<Sum>() : offset_gradient(scale * height, dots.slope_y);
    p.grad_offset[offset_index(size, at)] = narrow<OffsetScalar>(grad_x);
    p.grad_offset[offset_index(size, at) + size.P * size.Q] = narrow<OffsetScalar>(grad_y);
  }
}

// Block: (32, 8), one warp per bin. Grid: tiles of bins; a block takes all their channels, slice by slice.
// Vector additions (sm_90) need few registers, so three blocks fit on a multiprocessor.
extern "C" __global__ void __launch_bounds__(kThreads, __CUDA_ARCH__ < 900 ? 2 : 3)
    DCN_KERNEL(deform_roi_pool_backward)(const DeformRoIPoolBackwardParams p) {
  DCN_SHARED_MEMORY(shared);
  WarpPixels& pixels_of_warp = reinterpret_cast<WarpPixels*>(shared)[threadIdx.y];
  BinDots* const dots_of_row = reinterpret_cast<BinDots*>(shared + blockDim.y * sizeof(WarpPixels));
  ScalarVector* const tile = reinterpret_cast<ScalarVector*>(dots_of_row + p.tile_bins);
  const DeformRoIPoolSizes& size = p.bins.size;
  const bool is_sampled = p.grad_offset || p.grad_mask;
  const int lane = threadIdx.x, lanes = 1 << p.lane_bits, slice = lanes * DCN_VEC;
  const long long tiles = row_tiles(size, p.tile_bins), channel_stride = static_cast<long long>(size.P) * size.Q;
  for (long long t = blockIdx.x; t < tiles; t += gridDim.x) {
    const RowRange range = row_tile(size, p.tile_bins, t);
    for (int first_channel = 0; first_channel < size.C; first_channel += slice) {
      if (!p.channels_last) {
        for_vectors_of_tile(size, range, first_channel, lanes, tile, [&](ScalarVector& grad, long long index) {
#pragma unroll
          for (int e = 0; e < DCN_VEC; ++e) grad.at[e] = p.grad_out[index + e * channel_stride];
        });
        __syncthreads();
      }
      const int c = first_channel + (lane & (lanes - 1)) * DCN_VEC;
      const bool has_channels = c < size.C;
      for (int row = threadIdx.y; row < range.rows; row += blockDim.y) {
        const ImagePixel at = find_pixel(range, row, size.P * size.Q);
        const WarpBin bin = find_bin(p.bins, at);
        const long long image = static_cast<long long>(bin.share.image) * size.H * size.W * size.C + c;
        ScalarVector grad = {};
        if (has_channels) {
          grad = p.channels_last ? *reinterpret_cast<const ScalarVector*>(p.grad_out + row_index(size, at, c))
                                 : tile[row * (lanes + 1) + (lane & (lanes - 1))];
        }
        BinDots dots = {Sum(0), Sum(0), Sum(0)};
        for_pixels_of_bin<true>(bin, size.H, size.W, pixels_of_warp, [&](const BinPixel* pixels, int count) {
          if (!has_channels) return;
          for (int i = lane >> p.lane_bits; i < count; i += kWarp >> p.lane_bits) {
            const BinPixel pixel = pixels[i];
            const long long index = image + static_cast<long long>(pixel.at) * size.C;
            if (is_sampled) {
              const auto values = *reinterpret_cast<const ScalarVector*>(p.input + index);
              Sum dot = Sum(0);
#pragma unroll
              for (int e = 0; e < DCN_VEC; ++e) dot += widen(grad.at[e]) * widen(values.at[e]);
              dots.value += weighted(pixel.weight, dot);
              dots.slope_y += weighted(pixel.slope_y, dot);
              dots.slope_x += weighted(pixel.slope_x, dot);
            }
            const Sum factor = weighted(pixel.weight, bin.share.scale);
            if (p.grad_input && factor != Sum(0)) {
              Sum value[DCN_VEC];
#pragma unroll
              for (int e = 0; e < DCN_VEC; ++e) value[e] = factor * widen(grad.at[e]);
              add_vector(p.grad_input + index, value);
            }
          }
        });
        if (!is_sampled) continue;
        for (int step = kWarp / 2; step > 0; step /= 2) {
          dots.value += __shfl_xor_sync(kAllLanes, dots.value, step);
          dots.slope_y += __shfl_xor_sync(kAllLanes, dots.slope_y, step);
          dots.slope_x += __shfl_xor_sync(kAllLanes, dots.slope_x, step);
        }
        const Sum width = __shfl_sync(kAllLanes, bin.axis.region, kHalf);
        if (lane != 0) continue;
        // No barrier: the same thread comes here for this row in every slice.
        if (first_channel > 0) {
          dots.value += dots_of_row[row].value;
          dots.slope_y += dots_of_row[row].slope_y;
          dots.slope_x += dots_of_row[row].slope_x;
        }
        if (first_channel + slice < size.C) {
          dots_of_row[row] = dots;
        } else {
          write_gradients(p, at, bin.share, bin.axis.region, width, dots);
        }
      }
      if (!p.channels_last) __syncthreads();
    }
  }
}
