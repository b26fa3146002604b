// The deterministic gradient of the input of deformable RoI pooling. Without atomics, each strip of pixels searches the
// bins that it contributes to, and adds up their gradients in a fixed order.
//
// The search needs no lists: the bounds of a region rule out nearly all strips. For the others, a warp computes the
// weights of 32 bins in the strip at once, one bin per lane.

#include "dcn/roi_bins.cuh"
#include "dcn/strip_sums.cuh"

// Inclusive bounds of the pixels that can contribute to the bins of a region; image is -1 if there are none.
struct RegionBounds {
  int image, top, bottom, left, right;
};

struct DeformRoIPoolGradInputParams {
  const Scalar* grad_out;  // [rows, C] for the bins of `range`
  RegionBounds* bounds;    // [R], written by deform_roi_pool_region_bounds
  Scalar* grad_input;      // [N, C, H, W], or [N, H, W, C] if channels_last, written; null to add to sums
  Sum* sums;               // [N, H, W, C], added to if grad_input is null
  DeformRoIPoolBins bins;
  RowRange range;
  int lane_bits;  // 2^lane_bits lanes cover the channel vectors of a bin; the other lanes take other bins
  int channels_last;
};

// The first and the last pixel of an axis that can contribute to a bin; high < low if there are none.
struct PixelRange {
  int low, high;
};

__device__ __forceinline__ PixelRange axis_pixels(const BinAxis& axis, int extent) {
  if (axis.first >= axis.last) return {0, -1};
  const Sum a = sample_position(axis, axis.first), b = sample_position(axis, axis.last - 1);
  const Sum low = a < b ? a : b, high = a < b ? b : a, end = static_cast<Sum>(extent);
  if (!(high >= Sum(-1) && low <= end)) return {0, -1};
  return {low > Sum(0) ? min(static_cast<int>(low), extent - 1) : 0,
          high > Sum(0) ? min(static_cast<int>(high < end ? high : end), extent - 2) + 1 : 0};
}

// Block: (32, 8), one warp per region. Grid: regions.
extern "C" __global__ void __launch_bounds__(kThreads, 2)
    DCN_KERNEL(deform_roi_pool_region_bounds)(const DeformRoIPoolGradInputParams p) {
  const DeformRoIPoolSizes& size = p.bins.size;
  for (long long region = static_cast<long long>(blockIdx.x) * blockDim.y + threadIdx.y; region < size.R;
       region += static_cast<long long>(gridDim.x) * blockDim.y) {
    RegionBounds bounds = {-1, size.H, -1, size.W, -1};
    for (int i = threadIdx.x; i < size.P * size.Q; i += kWarp) {
      const ImagePixel at = {static_cast<int>(region), i};
      const BinAxis y = bin_axis(p.bins, at, false), x = bin_axis(p.bins, at, true);
      const BinShare share = bin_share(p.bins, at, is_nan(y) || is_nan(x), y.samples, x.samples);
      const PixelRange rows = axis_pixels(y, size.H), columns = axis_pixels(x, size.W);
      if (share.image < 0 || rows.high < rows.low || columns.high < columns.low) continue;
      bounds = {share.image, min(bounds.top, rows.low), max(bounds.bottom, rows.high), min(bounds.left, columns.low),
                max(bounds.right, columns.high)};
    }
    for (int step = kWarp / 2; step > 0; step /= 2) {
      bounds.image = max(bounds.image, __shfl_xor_sync(kAllLanes, bounds.image, step));
      bounds.top = min(bounds.top, __shfl_xor_sync(kAllLanes, bounds.top, step));
      bounds.bottom = max(bounds.bottom, __shfl_xor_sync(kAllLanes, bounds.bottom, step));
      bounds.left = min(bounds.left, __shfl_xor_sync(kAllLanes, bounds.left, step));
      bounds.right = max(bounds.right, __shfl_xor_sync(kAllLanes, bounds.right, step));
    }
    if (threadIdx.x == 0) p.bounds[region] = bounds;
  }
}

struct Strip {
  int image, y, x;
};

__device__ __forceinline__ int strips_of_row(const DeformRoIPoolSizes& size) { return (size.W - 1) / kStrip + 1; }

__device__ __forceinline__ Strip find_strip(const DeformRoIPoolSizes& size, long long index) {
  const int in_row = strips_of_row(size);
  const long long row = index / in_row;
  return {static_cast<int>(row / size.H), static_cast<int>(row % size.H), static_cast<int>(index % in_row) * kStrip};
}

__device__ __forceinline__ bool can_touch(const RegionBounds& bounds, const Strip& strip) {
  return bounds.image == strip.image && bounds.top <= strip.y && strip.y <= bounds.bottom &&
         bounds.left - strip.x < kStrip && strip.x <= bounds.right;
}

// Adds the weights of the pixels from `first` on in the samples of an axis.
template <int count>
__device__ __forceinline__ void add_axis_weights(BinAxis axis, int first, int extent, Sum (&weights)[count]) {
  limit_samples(axis, static_cast<Sum>(first) - Sum(1), static_cast<Sum>(first) + Sum(count));
  for (int i = axis.first; i < axis.last; ++i) {
    const ClampedCoordinate<Sum> at = clamp_coordinate(sample_position(axis, i), extent);
    if (!at.inside) continue;
    // Selections instead of an index into `weights` keep the array in registers.
    const int low = at.low - first, high = at.high - first;
#pragma unroll
    for (int k = 0; k < count; ++k) {
      weights[k] += (low == k ? Sum(1) - at.fraction : Sum(0)) + (high == k ? at.fraction : Sum(0));
    }
  }
}

// Computes the weights of a strip's pixels in a bin, with its mask and divided by the number of samples. Returns false
// if all are 0.
__device__ __forceinline__ bool weigh_strip(const DeformRoIPoolBins& bins, const ImagePixel& at, const Strip& strip,
                                            Sum (&weights)[kStrip]) {
  const BinAxis y = bin_axis(bins, at, false);
  Sum row[1] = {};
  add_axis_weights(y, strip.y, bins.size.H, row);
  if (row[0] == Sum(0)) return false;
  const BinAxis x = bin_axis(bins, at, true);
  const BinShare share = bin_share(bins, at, is_nan(y) || is_nan(x), y.samples, x.samples);
  if (share.image < 0) return false;
  add_axis_weights(x, strip.x, bins.size.W, weights);
  bool touches = false;
#pragma unroll
  for (int k = 0; k < kStrip; ++k) {
    weights[k] = weighted(row[0] * weights[k], share.scale);
    touches = touches || weights[k] != Sum(0);
  }
  return touches;
}

// Adds the weighted gradients of the bins from `first` to `end` of a region to the sums of a strip. Called by a whole
// warp; its groups of lanes share the bins. grad_out points at the gradient of bin `first`.
__device__ __forceinline__ void add_region(const DeformRoIPoolGradInputParams& p, const Strip& strip, int region,
                                           int first, int end, const Scalar* grad_out, bool has_channels,
                                           Sum (&sums)[kStrip][DCN_VEC]) {
  const int lane = threadIdx.x;
  for (int base = first; base < end; base += kWarp) {
    Sum weights[kStrip] = {};
    const bool touches = base + lane < end && weigh_strip(p.bins, {region, base + lane}, strip, weights);
    const int row = base - first, C = p.bins.size.C;
    const auto row_of = [=](int source) { return grad_out + static_cast<long long>(row + source) * C; };
    add_rows(weights, touches, p.lane_bits, has_channels, row_of, sums);
  }
}

// Block: (32, 8). Each warp adds up an equal part of the regions in order; the parts are then added in order. Grid:
// strips of pixels by slices of channels.
extern "C" __global__ void __launch_bounds__(kThreads, 2)
    DCN_KERNEL(deform_roi_pool_grad_input)(const DeformRoIPoolGradInputParams p) {
  DCN_SHARED_MEMORY(shared);
  StripSums* const partial = reinterpret_cast<StripSums*>(shared);
  const DeformRoIPoolSizes& size = p.bins.size;
  const int lane = threadIdx.x, warp = threadIdx.y, bins = size.P * size.Q;
  const int lanes = 1 << p.lane_bits, slice = lanes * DCN_VEC, slices = (size.C + slice - 1) / slice;
  const long long strips = static_cast<long long>(size.N) * size.H * strips_of_row(size);

  // Bins are counted from the first of region first_image.
  const long long last_bin = static_cast<long long>(p.range.first_pixel) + p.range.rows;
  const int regions = static_cast<int>((last_bin + bins - 1) / bins);
  const int share = (regions + blockDim.y - 1) / blockDim.y;
  const int first_region = min(warp * share, regions), end_region = min(first_region + share, regions);

  for (long long item = blockIdx.x; item < strips * slices; item += gridDim.x) {
    const Strip strip = find_strip(size, item / slices);
    const int first_channel = static_cast<int>(item % slices) * slice,
              c = first_channel + (lane & (lanes - 1)) * DCN_VEC;
    Sum sums[kStrip][DCN_VEC] = {};
    for (int base = first_region; base < end_region; base += kWarp) {
      const bool near = base + lane < end_region && can_touch(p.bounds[p.range.first_image + base + lane], strip);
      for (unsigned bits = __ballot_sync(kAllLanes, near); bits; bits &= bits - 1) {
        const int region = base + __ffs(static_cast<int>(bits)) - 1;
        const long long from = static_cast<long long>(region) * bins;
        const int first = region == 0 ? p.range.first_pixel : 0;
        const int end = static_cast<int>(min(static_cast<long long>(bins), last_bin - from));
        const Scalar* grad_out = p.grad_out + (from + first - p.range.first_pixel) * size.C + c;
        add_region(p, strip, p.range.first_image + region, first, end, grad_out, c < size.C, sums);
      }
    }
    store_strip(sums, partial);
    __syncthreads();

    const bool rows = !p.grad_input || p.channels_last;
    for (int i = thread_of_block(); i < kStrip * slice; i += threads_of_block()) {
      const int k = rows ? i / slice : i % kStrip, channel = rows ? i % slice : i / kStrip;
      if (k >= size.W - strip.x || channel >= size.C - first_channel) continue;
      const Sum sum = total_of_strip(partial, k, channel, slice);
      const int in_image = strip.y * size.W + strip.x + k, pixels = size.H * size.W;
      const long long at_row = (static_cast<long long>(strip.image) * pixels + in_image) * size.C;
      const long long at_plane = (static_cast<long long>(strip.image) * size.C + first_channel + channel) * pixels;
      if (!p.grad_input) {
        p.sums[at_row + first_channel + channel] += sum;
      } else {
        p.grad_input[rows ? at_row + first_channel + channel : at_plane + in_image] = narrow<Scalar>(sum);
      }
    }
    __syncthreads();
  }
}
