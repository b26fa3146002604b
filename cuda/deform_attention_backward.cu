// Backward pass of multi-scale deformable attention and deformable aggregation row by row: the gradients of locations
// and weights, and atomic additions to the gradient of the value.

#include "dcn/deform_attention.cuh"
#include "dcn/sample_gradients.cuh"

struct DeformAttentionBackwardParams {
  const Scalar* value;           // [N, S, M, D], or null without grad_locations and grad_weights
  const Scalar* grad_out;        // [N, Lq, M, D]
  OffsetScalar* grad_locations;  // with the strides of the locations, written, or null
  OffsetScalar* grad_weights;    // with the strides of the weights, written, or null
  Sum* grad_value;               // [N, S, M, D], added to, or null
  DeformAttentionPoints points;
  RowLanes lanes;
};

// Block: (32, 8). Grid: rows, a few to each warp.
extern "C" __global__ void __launch_bounds__(kThreads, 2)
    DCN_KERNEL(deform_attention_backward)(const DeformAttentionBackwardParams p) {
  DCN_SHARED_MEMORY(shared);
  Level* const levels = reinterpret_cast<Level*>(shared);
  PointSample* const all_samples = reinterpret_cast<PointSample*>(levels + kMaxLevels);
  SampleDots* const all_dots = reinterpret_cast<SampleDots*>(all_samples + blockDim.y * kWarpPoints);
  const int lane = threadIdx.x, row_lanes = 1 << p.lanes.row_bits, of_row = lane & (row_lanes - 1);
  const int lanes = 1 << p.lanes.lane_bits, shares = row_lanes >> p.lanes.lane_bits, of_point = of_row & (lanes - 1);
  const int together = kPointsPerLane << p.lanes.row_bits;
  const int own = threadIdx.y * kWarpPoints + (lane >> p.lanes.row_bits) * together;
  PointSample* const samples = all_samples + own;
  SampleDots* const dots = all_dots + own;
  load_levels(p.points, levels);

  const bool is_sampled = p.grad_locations || p.grad_weights;
  const int D = p.points.D, K = p.points.K, slice = lanes * DCN_VEC;
  const long long pixel_stride = static_cast<long long>(p.points.M) * D;
  const long long rows = static_cast<long long>(p.points.N) * p.points.Lq * p.points.M;
  const int warp_rows = kWarp >> p.lanes.row_bits;
  const long long items = (rows + warp_rows - 1) / warp_rows;
  for (long long item = static_cast<long long>(blockIdx.x) * blockDim.y + threadIdx.y; item < items;
       item += static_cast<long long>(gridDim.x) * blockDim.y) {
    const long long row = item * warp_rows + (lane >> p.lanes.row_bits);
    const bool has_row = row < rows;
    const QueryHead at = find_query(p.points, has_row ? row : 0);
    const long long image = image_index(p.points, at);
    const Scalar* const grad_out = p.grad_out + (has_row ? row : 0) * D;
    const int first_channel = of_point * DCN_VEC, end_channel = has_row ? D : 0;
    const ScalarVector first_grad = load_vector_if(grad_out + first_channel, first_channel < end_channel);
    for (int first = 0; first < K; first += together) {
      const int count = min(together, K - first);
#pragma unroll
      for (int j = 0; j < kPointsPerLane; ++j) {
        const int i = of_row + j * row_lanes;
        if (!has_row || i >= count) continue;
        samples[i] = weigh_point(find_point(p.points, levels, at, first + i));
      }
      __syncwarp();
      // All lanes of the warp take part in the sums, whether or not they have a point.
      for (int base = 0; base < count; base += shares) {
        const int i = base + (of_row >> p.lanes.lane_bits);
        const bool has_point = has_row && i < count;
        Sum dot[4] = {};
        if (has_point) {
          const PointSample sample = samples[i];
          for (int c = first_channel; c < end_channel; c += slice) {
            const ScalarVector grad = c == first_channel ? first_grad : load_vector(grad_out + c);
            const long long from = image + sample.pixel * pixel_stride + c;
            if (is_sampled) {
#pragma unroll
              for (int n = 0; n < 4; ++n) {
                const ScalarVector pixel =
                    load_vector_if(p.value + from + neighbour_step(n, sample.W) * pixel_stride, sample.inside >> n & 1);
#pragma unroll
                for (int e = 0; e < DCN_VEC; ++e) dot[n] += widen(grad.at[e]) * widen(pixel.at[e]);
              }
            }
            if (p.grad_value) {
#pragma unroll
              for (int n = 0; n < 4; ++n) {
                if (sample.weight[n] == Sum(0)) continue;
                Sum added[DCN_VEC];
#pragma unroll
                for (int e = 0; e < DCN_VEC; ++e) added[e] = sample.weight[n] * widen(grad.at[e]);
                add_vector(p.grad_value + from + neighbour_step(n, sample.W) * pixel_stride, added);
              }
            }
          }
        }
        if (is_sampled) sum_over_lanes(of_point, lanes, dot, dots[i]);
      }
      __syncwarp();
      if (!is_sampled) continue;
      // Finding the points again costs less than keeping them in registers.
#pragma unroll 1
      for (int i = of_row; i < count && has_row; i += row_lanes) {
        const AttentionPoint point = find_point(p.points, levels, at, first + i);
        const SampleGradient gradient = differentiate(point.at, point.weight, dots[i]);
        if (p.grad_locations) {
          OffsetScalar* const grad = p.grad_locations + location_index(p.points.stride, at, first + i);
          grad[0] = narrow<OffsetScalar>(gradient.x * point.scale_x);
          grad[1] = narrow<OffsetScalar>(gradient.y * point.scale_y);
        }
        if (p.grad_weights) {
          p.grad_weights[weight_index(p.points.stride, at, first + i)] = narrow<OffsetScalar>(gradient.modulation);
        }
      }
    }
  }
}
