// Forward pass of multi-scale deformable attention and deformable aggregation: each row is the weighted sum of its
// samples.

#include "dcn/deform_attention.cuh"

struct DeformAttentionForwardParams {
  const Scalar* value;  // [N, S, M, D]
  Scalar* output;       // [N, Lq, M, D], written
  DeformAttentionPoints points;
  RowLanes lanes;
};

// Block: (32, 8). Grid: rows, a few to each warp, by slices of channels. A row with several slices has a whole warp.
extern "C" __global__ void __launch_bounds__(kThreads, 3)
    DCN_KERNEL(deform_attention_forward)(const DeformAttentionForwardParams p) {
  DCN_SHARED_MEMORY(shared);
  Level* const levels = reinterpret_cast<Level*>(shared);
  const int lane = threadIdx.x, row_lanes = 1 << p.lanes.row_bits, of_row = lane & (row_lanes - 1);
  const int lanes = 1 << p.lanes.lane_bits, shares = row_lanes >> p.lanes.lane_bits;
  const int together = kPointsPerLane << p.lanes.row_bits;
  PointSample* const samples = reinterpret_cast<PointSample*>(levels + kMaxLevels) + threadIdx.y * kWarpPoints +
                               (lane >> p.lanes.row_bits) * together;
  load_levels(p.points, levels);

  const int D = p.points.D, K = p.points.K, slice = lanes * DCN_VEC, slices = (D + slice - 1) / slice;
  const long long pixel_stride = static_cast<long long>(p.points.M) * D;
  const long long rows = static_cast<long long>(p.points.N) * p.points.Lq * p.points.M;
  const int warp_rows = kWarp >> p.lanes.row_bits;
  const long long items = (rows + warp_rows - 1) / warp_rows * slices;
  for (long long item = static_cast<long long>(blockIdx.x) * blockDim.y + threadIdx.y; item < items;
       item += static_cast<long long>(gridDim.x) * blockDim.y) {
    const long long of_rows = slices == 1 ? item : item / slices;
    const long long row = of_rows * warp_rows + (lane >> p.lanes.row_bits);
    const int c = static_cast<int>(item - of_rows * slices) * slice + (of_row & (lanes - 1)) * DCN_VEC;
    const bool has_row = row < rows, has_channels = has_row && c < D;
    const QueryHead at = find_query(p.points, has_row ? row : 0);
    const Scalar* const image = p.value + image_index(p.points, at) + c;
    Sum sums[DCN_VEC] = {};
    bool is_nan = false;
    for (int first = 0; first < K; first += together) {
      const int count = min(together, K - first);
#pragma unroll
      for (int j = 0; j < kPointsPerLane; ++j) {
        const int i = of_row + j * row_lanes;
        if (!has_row || i >= count) continue;
        const AttentionPoint point = find_point(p.points, levels, at, first + i);
        samples[i] = weigh_point(point);
        is_nan = is_nan || point.at.is_nan;
      }
      __syncwarp();
      if (has_channels) {
#pragma unroll 2
        for (int i = of_row >> p.lanes.lane_bits; i < count; i += shares) {
          const PointSample sample = samples[i];
          ScalarVector pixels[4];
#pragma unroll
          for (int n = 0; n < 4; ++n) {
            const long long pixel = sample.pixel + neighbour_step(n, sample.W);
            pixels[n] = load_vector_if(image + pixel * pixel_stride, sample.weight[n] != Sum(0));
          }
#pragma unroll
          for (int n = 0; n < 4; ++n) {
#pragma unroll
            for (int e = 0; e < DCN_VEC; ++e) sums[e] += sample.weight[n] * widen(pixels[n].at[e]);
          }
        }
      }
      __syncwarp();
    }
    for (int step = lanes; step < row_lanes; step *= 2) {
#pragma unroll
      for (int e = 0; e < DCN_VEC; ++e) sums[e] += __shfl_xor_sync(kAllLanes, sums[e], step);
    }
    const unsigned nan_lanes = __ballot_sync(kAllLanes, is_nan) >> (lane - of_row);
    const bool row_is_nan = (nan_lanes & (kAllLanes >> (kWarp - row_lanes))) != 0;
    if (!has_channels || of_row >= lanes) continue;
    ScalarVector sampled;
#pragma unroll
    for (int e = 0; e < DCN_VEC; ++e) sampled.at[e] = narrow<Scalar>(row_is_nan ? not_a_number<Sum>() : sums[e]);
    store_vector(p.output + row * D + c, sampled);
  }
}
