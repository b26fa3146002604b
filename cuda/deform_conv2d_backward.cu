// Backward pass of deformable convolution, given the gradient of the columns: the columns again (for the weights'
// gradient), the gradients of offsets and masks, and the input's.

#include "dcn/deform_conv2d.cuh"

struct DeformConvBackwardParams {
  const Scalar* input;         // [N, H, W, C]
  const OffsetScalar* offset;  // [N, 2*D*K, oh, ow]
  const OffsetScalar* mask;    // [N, D*K, oh, ow] or null
  const Scalar* grad_columns;  // [rows, G, K, C/G]
  Scalar* columns;             // [rows, G, K, C/G], written, or null
  OffsetScalar* grad_offset;   // [N, 2*D*K, oh, ow], written, or null
  OffsetScalar* grad_mask;     // [N, D*K, oh, ow], written, or null
  Sum* grad_input;             // [N, H, W, C], added to
  long long* keys;             // [rows, D*K, 4], written: the list that a neighbour belongs to, `lists` for none
  Sum* weights;                // [rows, D*K, 4], written
  const long long* order;      // the entries of keys, sorted by list
  const long long* starts;     // [lists + 1]: where in `order` a list begins
  DeformConvSizes size;
  RowRange range;
  long long lists;  // (pixel, deformable group) of the images from range.first_image on
  int tile_rows;    // sampling points that a block prepares at once
};

struct SamplePlan {
  SamplePoint<Sum> point;
  Sum modulation;
  long long first;
};

// Gradients of one sampling point.
struct SampleGradient {
  Sum y, x, modulation;
};

static_assert(sizeof(SamplePlan) + sizeof(SampleGradient) <= DCN_SAMPLE_BYTES, "shared memory per sampling point");

__device__ __forceinline__ SamplePlan plan_sample(const DeformConvBackwardParams& p, int row, int group_tap) {
  const Tap tap = find_tap(p.size, p.range, row, group_tap);
  SamplePlan plan;
  plan.point = locate_tap(p.size, tap, group_tap, p.offset);
  plan.modulation = p.mask ? widen(p.mask[tap.mask_at]) : Sum(1);
  plan.first = first_neighbour(p.size, tap.image, plan.point.y0, plan.point.x0);
  return plan;
}

__device__ __forceinline__ Sum modulated_weight(const SamplePlan& plan, int i) {
  return weighted(bilinear_weight(plan.point, i), plan.modulation);
}

// From the four dot products of the column gradient with the neighbours' channels.
__device__ __forceinline__ SampleGradient differentiate(const SamplePlan& plan, const Sum (&dot)[4]) {
  const Sum ly = plan.point.ly, lx = plan.point.lx;
  SampleGradient gradient;
  gradient.y = weighted(plan.modulation, weighted(Sum(1) - lx, dot[2] - dot[0]) + weighted(lx, dot[3] - dot[1]));
  gradient.x = weighted(plan.modulation, weighted(Sum(1) - ly, dot[1] - dot[0]) + weighted(ly, dot[3] - dot[2]));
  gradient.modulation = Sum(0);
#pragma unroll
  for (int i = 0; i < 4; ++i) gradient.modulation += weighted(bilinear_weight(plan.point, i), dot[i]);
  if (plan.point.is_nan) gradient.y = gradient.x = gradient.modulation = not_a_number<Sum>();
  return gradient;
}

// Block: x (a power of two up to 32) runs over the vectors of a sampling point's channels, y over sampling points; the
// tile is a multiple of y, so that all lanes of a warp reach the shuffles together.
extern "C" __global__ void __launch_bounds__(256, 2)
    DCN_KERNEL(deform_conv2d_grad_samples)(const DeformConvBackwardParams p) {
  DCN_SHARED_MEMORY(shared);
  SamplePlan* plans = reinterpret_cast<SamplePlan*>(shared);
  SampleGradient* gradients = reinterpret_cast<SampleGradient*>(plans + p.tile_rows);
  const int tiles = sample_tiles(p.size, p.range, p.tile_rows);
  for (int t = blockIdx.x; t < tiles; t += gridDim.x) {
    const SampleTile tile = sample_tile(p.size, p.range, p.tile_rows, t);
    for (int s = thread_of_block(); s < tile.samples; s += threads_of_block()) {
      plans[s] = plan_sample(p, tile.first_row + s, tile.group_tap);
    }
    __syncthreads();

    for (int s = threadIdx.y; s < p.tile_rows; s += blockDim.y) {
      Sum dot[4] = {};
      if (s < tile.samples) {
        const SamplePlan& plan = plans[s];
        Sum weight[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) weight[i] = modulated_weight(plan, i);
        for (int v = threadIdx.x * DCN_VEC; v < tile.channels; v += blockDim.x * DCN_VEC) {
          const int c = tile.first_channel + v;
          const long long at = column_index(p.size, tile.first_row + s, tile.k, c);
          const auto grad = *reinterpret_cast<const ScalarVector*>(p.grad_columns + at);
          Sum sums[DCN_VEC] = {};
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            if (plan.point.inside >> i & 1) {
              const auto pixel =
                  *reinterpret_cast<const ScalarVector*>(p.input + neighbour(p.size, plan.first, i) * p.size.C + c);
#pragma unroll
              for (int e = 0; e < DCN_VEC; ++e) {
                const Sum value = widen(pixel.at[e]);
                dot[i] += widen(grad.at[e]) * value;
                sums[e] += weighted(weight[i], value);
              }
            }
          }
          if (p.columns) {
            ScalarVector column;
#pragma unroll
            for (int e = 0; e < DCN_VEC; ++e) {
              column.at[e] = narrow<Scalar>(plan.point.is_nan ? not_a_number<Sum>() : sums[e]);
            }
            *reinterpret_cast<ScalarVector*>(p.columns + at) = column;
          }
        }
      }
      for (int lanes = blockDim.x / 2; lanes > 0; lanes /= 2) {
#pragma unroll
        for (int i = 0; i < 4; ++i) dot[i] += __shfl_xor_sync(0xffffffffu, dot[i], lanes);
      }
      if (s < tile.samples && threadIdx.x == 0) gradients[s] = differentiate(plans[s], dot);
    }
    __syncthreads();

    for (int s = thread_of_block(); s < tile.samples; s += threads_of_block()) {
      const Tap tap = find_tap(p.size, p.range, tile.first_row + s, tile.group_tap);
      if (p.grad_offset) {
        p.grad_offset[tap.offset_at] = narrow<OffsetScalar>(gradients[s].y);
        p.grad_offset[tap.offset_at + p.size.offset_channel] = narrow<OffsetScalar>(gradients[s].x);
      }
      if (p.grad_mask) p.grad_mask[tap.mask_at] = narrow<OffsetScalar>(gradients[s].modulation);
    }
    __syncthreads();
  }
}

// Block and grid as above.
extern "C" __global__ void __launch_bounds__(256, 2)
    DCN_KERNEL(deform_conv2d_grad_input)(const DeformConvBackwardParams p) {
  DCN_SHARED_MEMORY(shared);
  SamplePlan* plans = reinterpret_cast<SamplePlan*>(shared);
  const int tiles = sample_tiles(p.size, p.range, p.tile_rows);
  for (int t = blockIdx.x; t < tiles; t += gridDim.x) {
    const SampleTile tile = sample_tile(p.size, p.range, p.tile_rows, t);
    for (int s = thread_of_block(); s < tile.samples; s += threads_of_block()) {
      plans[s] = plan_sample(p, tile.first_row + s, tile.group_tap);
    }
    __syncthreads();

    for (int s = threadIdx.y; s < tile.samples; s += blockDim.y) {
      const SamplePlan& plan = plans[s];
      for (int v = threadIdx.x * DCN_VEC; v < tile.channels; v += blockDim.x * DCN_VEC) {
        const int c = tile.first_channel + v;
        const auto grad = *reinterpret_cast<const ScalarVector*>(p.grad_columns +
                                                                 column_index(p.size, tile.first_row + s, tile.k, c));
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const Sum weight = modulated_weight(plan, i);
          if (weight != Sum(0)) {
            Sum value[DCN_VEC];
#pragma unroll
            for (int e = 0; e < DCN_VEC; ++e) value[e] = weight * widen(grad.at[e]);
            add_vector(p.grad_input + neighbour(p.size, plan.first, i) * p.size.C + c, value);
          }
        }
      }
    }
    __syncthreads();
  }
}

// The input's gradient without atomics, in an order that is always the same: first every sampling point writes down
// which pixels it adds to, then each pixel collects. Grid: threads of sampling points.
extern "C" __global__ void __launch_bounds__(256, 2)
    DCN_KERNEL(deform_conv2d_list_neighbours)(const DeformConvBackwardParams p) {
  const int group_taps = p.size.D * p.size.kh * p.size.kw, K = p.size.kh * p.size.kw;
  const long long samples = static_cast<long long>(p.range.rows) * group_taps;
  const long long first_pixel = first_neighbour(p.size, p.range.first_image, 0, 0);
  const long long threads = static_cast<long long>(gridDim.x) * threads_of_block();
  for (long long s = static_cast<long long>(blockIdx.x) * threads_of_block() + thread_of_block(); s < samples;
       s += threads) {
    const int group_tap = static_cast<int>(s % group_taps);
    const SamplePlan plan = plan_sample(p, static_cast<int>(s / group_taps), group_tap);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const Sum weight = modulated_weight(plan, i);
      const long long pixel = neighbour(p.size, plan.first, i) - first_pixel;
      p.keys[4 * s + i] = weight != Sum(0) ? pixel * p.size.D + group_tap / K : p.lists;
      p.weights[4 * s + i] = weight;
    }
  }
}

// Block: x over the channel vectors of a deformable group, y over lists.
extern "C" __global__ void __launch_bounds__(256, 2)
    DCN_KERNEL(deform_conv2d_collect_input)(const DeformConvBackwardParams p) {
  const int K = p.size.kh * p.size.kw, group_taps = p.size.D * K, channels = p.size.C / p.size.D;
  const long long first_pixel = first_neighbour(p.size, p.range.first_image, 0, 0);
  for (long long list = static_cast<long long>(blockIdx.x) * blockDim.y + threadIdx.y; list < p.lists;
       list += static_cast<long long>(gridDim.x) * blockDim.y) {
    const long long begin = p.starts[list], end = p.starts[list + 1];
    if (begin == end) continue;
    const int first_channel = static_cast<int>(list % p.size.D) * channels;
    Sum* pixel = p.grad_input + (first_pixel + list / p.size.D) * p.size.C;
    for (int v = threadIdx.x * DCN_VEC; v < channels; v += blockDim.x * DCN_VEC) {
      const int c = first_channel + v;
      Sum sums[DCN_VEC] = {};
      for (long long at = begin; at < end; ++at) {
        const long long entry = p.order[at], sample = entry / 4;
        const int row = static_cast<int>(sample / group_taps), k = static_cast<int>(sample % group_taps) % K;
        const auto grad = *reinterpret_cast<const ScalarVector*>(p.grad_columns + column_index(p.size, row, k, c));
#pragma unroll
        for (int e = 0; e < DCN_VEC; ++e) sums[e] += p.weights[entry] * widen(grad.at[e]);
      }
#pragma unroll
      for (int e = 0; e < DCN_VEC; ++e) pixel[c + e] += sums[e];
    }
  }
}
