// Deformable RoI pooling: each bin of a region averages bilinear samples of the image, on a grid that its offset
// shifts.

#include "dcn/types.cuh"
#include "dcn/rows.cuh"
#include "dcn/sampling.cuh"

using Scalar = DCN_SCALAR;
using OffsetScalar = DCN_OFFSET_SCALAR;
using Sum = Accumulator<Scalar>;
using ScalarVector = Vector<Scalar, DCN_VEC>;

struct DeformRoIPoolSizes {
  int N, C, H, W;
  int R, P, Q;
  int sampling_ratio;  // samples of a bin along an axis; 0: as many as it has pixels
  double spatial_scale, gamma;
};

struct DeformRoIPoolParams {
  const Scalar* input;         // [N, H, W, C]
  const Sum* rois;             // [R, 5]: image, x1, y1, x2, y2
  const OffsetScalar* offset;  // [R, 2, P, Q], x first, or null
  const OffsetScalar* mask;    // [R, P, Q] or null
  const Scalar* grad_out;      // [bins, C]
  Sum* output;                 // [bins, C], written
  OffsetScalar* grad_offset;   // [R, 2, P, Q], written, or null
  OffsetScalar* grad_mask;     // [R, P, Q], written, or null
  Sum* grad_input;             // [N, H, W, C], added to
  DeformRoIPoolSizes size;
  RowRange range;  // the bins of this call: "image" is the region, "pixel" is p * Q + q
};

// The samples of a bin along one axis: at start + (i + 1/2) * length / samples.
struct BinAxis {
  Sum start, length;
  Sum region;  // length of the whole region
  int samples;
  int first, last;  // the samples that can lie in the image
};

struct Bin {
  int image;
  BinAxis y, x;
  Sum scale;       // mask / number of samples
  Sum per_sample;  // 1 / number of samples
  bool is_nan;     // its region is not finite or of no image, or its offset is NaN
};

// A region that is larger than this many samples per bin has them further apart.
constexpr int kMostSamples = 1 << 24;

__device__ __forceinline__ Sum sample_position(const BinAxis& axis, int i) {
  return axis.start + rounded_product(static_cast<Sum>(i) + Sum(0.5), axis.length) / static_cast<Sum>(axis.samples);
}

// Samples that are clearly outside of the image need not be looked at: a region may be far larger than it.
__device__ __forceinline__ void limit_samples(BinAxis& axis, int extent) {
  axis.first = 0;
  axis.last = axis.samples;
  const Sum step = axis.length / static_cast<Sum>(axis.samples);
  if (axis.samples <= 4 || step == Sum(0)) return;
  const Sum a = (Sum(-1) - axis.start) / step, b = (static_cast<Sum>(extent) - axis.start) / step;
  const Sum lowest = (a < b ? a : b) - Sum(2), highest = (a < b ? b : a) + Sum(2);
  const Sum samples = static_cast<Sum>(axis.samples);
  axis.first = lowest >= samples ? axis.samples : lowest > Sum(0) ? static_cast<int>(lowest) : 0;
  axis.last = highest <= Sum(0) ? 0 : highest < samples ? static_cast<int>(highest) : axis.samples;
}

__device__ __forceinline__ BinAxis bin_axis(const DeformRoIPoolSizes& size, Sum from, Sum to, Sum offset, int bin,
                                            int bins, int extent) {
  const Sum scale = static_cast<Sum>(size.spatial_scale);
  const Sum start = rounded_product(scale, from) - Sum(0.5), end = rounded_product(scale, to) - Sum(0.5);
  BinAxis axis;
  axis.region = end - start;
  axis.length = axis.region / static_cast<Sum>(bins);
  const Sum shift = rounded_product(rounded_product(static_cast<Sum>(size.gamma), axis.region), offset);
  axis.start = start + rounded_product(static_cast<Sum>(bin), axis.length) + shift;
  axis.samples = size.sampling_ratio;
  if (axis.samples == 0) {
    const Sum pixels = ceil(axis.length);
    axis.samples = pixels < Sum(kMostSamples) ? (pixels > Sum(0) ? static_cast<int>(pixels) : 0) : kMostSamples;
  }
  limit_samples(axis, extent);
  return axis;
}

__device__ __forceinline__ long long offset_index(const DeformRoIPoolSizes& size, const ImagePixel& at) {
  return 2LL * at.image * size.P * size.Q + at.pixel;
}

__device__ __forceinline__ long long mask_index(const DeformRoIPoolSizes& size, const ImagePixel& at) {
  return static_cast<long long>(at.image) * size.P * size.Q + at.pixel;
}

__device__ __forceinline__ Bin find_bin(const DeformRoIPoolParams& p, const ImagePixel& at) {
  const Sum* roi = p.rois + 5LL * at.image;
  Sum dx = Sum(0), dy = Sum(0);
  if (p.offset) {
    dx = widen(p.offset[offset_index(p.size, at)]);
    dy = widen(p.offset[offset_index(p.size, at) + p.size.P * p.size.Q]);
  }
  Bin bin;
  bin.y = bin_axis(p.size, roi[2], roi[4], dy, at.pixel / p.size.Q, p.size.P, p.size.H);
  bin.x = bin_axis(p.size, roi[1], roi[3], dx, at.pixel % p.size.Q, p.size.Q, p.size.W);
  const bool has_image = roi[0] >= Sum(0) && roi[0] < static_cast<Sum>(p.size.N);
  bin.image = has_image ? static_cast<int>(roi[0]) : 0;
  bin.is_nan = !has_image || !is_finite(bin.y.region) || !is_finite(bin.x.region) || bin.y.start != bin.y.start ||
               bin.x.start != bin.x.start;
  if (bin.is_nan) bin.y.last = bin.y.first;
  const Sum samples = static_cast<Sum>(bin.y.samples) * static_cast<Sum>(bin.x.samples);
  bin.per_sample = samples > Sum(1) ? Sum(1) / samples : Sum(1);
  bin.scale = p.mask ? weighted(bin.per_sample, widen(p.mask[mask_index(p.size, at)])) : bin.per_sample;
  return bin;
}

// Calls visit(pixel, weight, weight_y, weight_x) for each neighbour of each sample that lies in the image: the index of
// the neighbour in [N, H, W], its bilinear weight and the weight's derivatives.
template <typename Visit>
__device__ __forceinline__ void for_each_neighbour(const DeformRoIPoolSizes& size, const Bin& bin, Visit visit) {
  for (int i = bin.y.first; i < bin.y.last; ++i) {
    const ClampedCoordinate<Sum> y = clamp_coordinate(sample_position(bin.y, i), size.H);
    if (!y.inside) continue;
    for (int j = bin.x.first; j < bin.x.last; ++j) {
      const ClampedCoordinate<Sum> x = clamp_coordinate(sample_position(bin.x, j), size.W);
      if (!x.inside) continue;
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const Sum vertical = k & 2 ? y.fraction : Sum(1) - y.fraction;
        const Sum horizontal = k & 1 ? x.fraction : Sum(1) - x.fraction;
        const long long row = static_cast<long long>(bin.image) * size.H + (k & 2 ? y.high : y.low);
        visit(row * size.W + (k & 1 ? x.high : x.low), vertical * horizontal, (k & 2 ? y.slope : -y.slope) * horizontal,
              (k & 1 ? x.slope : -x.slope) * vertical);
      }
    }
  }
}

// All kernels. Block: x (a power of two up to 32) runs over the channel vectors of a bin, y over bins: neighbouring
// bins of a region, whose work is the same. Grid: so few bins a block that the hardware evens out regions of unlike
// size.

extern "C" __global__ void __launch_bounds__(256, 2) DCN_KERNEL(deform_roi_pool_forward)(const DeformRoIPoolParams p) {
  for (int row = blockIdx.x * blockDim.y + threadIdx.y; row < p.range.rows; row += gridDim.x * blockDim.y) {
    const Bin bin = find_bin(p, find_pixel(p.range, row, p.size.P * p.size.Q));
    for (int c = threadIdx.x * DCN_VEC; c < p.size.C; c += blockDim.x * DCN_VEC) {
      Sum sums[DCN_VEC] = {};
      for_each_neighbour(p.size, bin, [&](long long pixel, Sum weight, Sum, Sum) {
        if (weight == Sum(0)) return;
        const auto values = *reinterpret_cast<const ScalarVector*>(p.input + pixel * p.size.C + c);
#pragma unroll
        for (int e = 0; e < DCN_VEC; ++e) sums[e] += weight * widen(values.at[e]);
      });
      Sum* output = p.output + static_cast<long long>(row) * p.size.C + c;
#pragma unroll
      for (int e = 0; e < DCN_VEC; ++e) output[e] = bin.is_nan ? not_a_number<Sum>() : weighted(bin.scale, sums[e]);
    }
  }
}

extern "C" __global__ void __launch_bounds__(256, 2)
    DCN_KERNEL(deform_roi_pool_grad_bins)(const DeformRoIPoolParams p) {
  for (int first = blockIdx.x * blockDim.y; first < p.range.rows; first += gridDim.x * blockDim.y) {
    // All lanes of a warp reach the shuffles together: threads beyond the last bin work on it again.
    const int row = min(first + static_cast<int>(threadIdx.y), p.range.rows - 1);
    const ImagePixel at = find_pixel(p.range, row, p.size.P * p.size.Q);
    const Bin bin = find_bin(p, at);
    Sum value = Sum(0), slope_y = Sum(0), slope_x = Sum(0);
    for (int c = threadIdx.x * DCN_VEC; c < p.size.C; c += blockDim.x * DCN_VEC) {
      const auto grad = *reinterpret_cast<const ScalarVector*>(p.grad_out + static_cast<long long>(row) * p.size.C + c);
      for_each_neighbour(p.size, bin, [&](long long pixel, Sum weight, Sum weight_y, Sum weight_x) {
        const auto values = *reinterpret_cast<const ScalarVector*>(p.input + pixel * p.size.C + c);
        Sum dot = Sum(0);
#pragma unroll
        for (int e = 0; e < DCN_VEC; ++e) dot += widen(grad.at[e]) * widen(values.at[e]);
        value += weighted(weight, dot);
        slope_y += weighted(weight_y, dot);
        slope_x += weighted(weight_x, dot);
      });
    }
    for (int lanes = blockDim.x / 2; lanes > 0; lanes /= 2) {
      value += __shfl_xor_sync(0xffffffffu, value, lanes);
      slope_y += __shfl_xor_sync(0xffffffffu, slope_y, lanes);
      slope_x += __shfl_xor_sync(0xffffffffu, slope_x, lanes);
    }
    if (threadIdx.x != 0 || first + static_cast<int>(threadIdx.y) >= p.range.rows) continue;
    if (p.grad_mask) {
      const Sum grad = bin.is_nan ? not_a_number<Sum>() : bin.per_sample * value;
      p.grad_mask[mask_index(p.size, at)] = narrow<OffsetScalar>(grad);
    }
    if (p.grad_offset) {
      const Sum scale = static_cast<Sum>(p.size.gamma) * bin.scale;
      const Sum grad_x = bin.is_nan ? not_a_number<Sum>() : weighted(scale * bin.x.region, slope_x);
      const Sum grad_y = bin.is_nan ? not_a_number<Sum>() : weighted(scale * bin.y.region, slope_y);
      p.grad_offset[offset_index(p.size, at)] = narrow<OffsetScalar>(grad_x);
      p.grad_offset[offset_index(p.size, at) + p.size.P * p.size.Q] = narrow<OffsetScalar>(grad_y);
    }
  }
}

extern "C" __global__ void __launch_bounds__(256, 2)
    DCN_KERNEL(deform_roi_pool_grad_input)(const DeformRoIPoolParams p) {
  for (int row = blockIdx.x * blockDim.y + threadIdx.y; row < p.range.rows; row += gridDim.x * blockDim.y) {
    const Bin bin = find_bin(p, find_pixel(p.range, row, p.size.P * p.size.Q));
    for (int c = threadIdx.x * DCN_VEC; c < p.size.C; c += blockDim.x * DCN_VEC) {
      const auto grad = *reinterpret_cast<const ScalarVector*>(p.grad_out + static_cast<long long>(row) * p.size.C + c);
      for_each_neighbour(p.size, bin, [&](long long pixel, Sum weight, Sum, Sum) {
        const Sum factor = weighted(weight, bin.scale);
        if (factor == Sum(0)) return;
        Sum value[DCN_VEC];
#pragma unroll
        for (int e = 0; e < DCN_VEC; ++e) value[e] = factor * widen(grad.at[e]);
        add_vector(p.grad_input + pixel * p.size.C + c, value);
      });
    }
  }
}

// The input's gradient without atomics, in an order that is always the same: each pixel looks at every bin.
// Block: x over the channel vectors of a pixel, y over pixels.
extern "C" __global__ void __launch_bounds__(256, 2)
    DCN_KERNEL(deform_roi_pool_collect_input)(const DeformRoIPoolParams p) {
  const long long pixels = static_cast<long long>(p.size.N) * p.size.H * p.size.W;
  for (long long pixel = static_cast<long long>(blockIdx.x) * blockDim.y + threadIdx.y; pixel < pixels;
       pixel += static_cast<long long>(gridDim.x) * blockDim.y) {
    for (int c = threadIdx.x * DCN_VEC; c < p.size.C; c += blockDim.x * DCN_VEC) {
      Sum sums[DCN_VEC] = {};
      for (int row = 0; row < p.range.rows; ++row) {
        const ImagePixel at = find_pixel(p.range, row, p.size.P * p.size.Q);
        if (p.rois[5LL * at.image] != static_cast<Sum>(pixel / (p.size.H * p.size.W))) continue;
        const Bin bin = find_bin(p, at);
        Sum factor = Sum(0);
        for_each_neighbour(p.size, bin, [&](long long neighbour, Sum weight, Sum, Sum) {
          if (neighbour == pixel) factor += weighted(weight, bin.scale);
        });
        if (factor == Sum(0)) continue;
        const auto grad =
            *reinterpret_cast<const ScalarVector*>(p.grad_out + static_cast<long long>(row) * p.size.C + c);
#pragma unroll
        for (int e = 0; e < DCN_VEC; ++e) sums[e] += factor * widen(grad.at[e]);
      }
      Sum* target = p.grad_input + pixel * p.size.C + c;
#pragma unroll
      for (int e = 0; e < DCN_VEC; ++e) target[e] += sums[e];
    }
  }
}
