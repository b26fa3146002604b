// Forward pass of deformable convolution: samples the image into columns, which a matrix product then multiplies by the
// weights.

#include "dcn/deform_conv2d.cuh"

struct DeformConvForwardParams {
  const Scalar* input;         // [N, H, W, C]
  const OffsetScalar* offset;  // [N, 2*D*K, oh, ow]
  const OffsetScalar* mask;    // [N, D*K, oh, ow] or null
  Scalar* columns;             // [rows, G, K, C/G], written
  DeformConvSizes size;
  RowRange range;
  int tile_rows;  // sampling points that a block prepares at once
};

// What all channels of a sampling point share: the modulated bilinear weights of its four neighbours.
struct SamplePlan {
  long long first;
  Sum weight[4];
};

static_assert(sizeof(SamplePlan) <= DCN_SAMPLE_BYTES, "shared memory per sampling point");

__device__ __forceinline__ SamplePlan plan_sample(const DeformConvForwardParams& p, int row, int group_tap) {
  const Tap tap = find_tap(p.size, p.range, row, group_tap);
  const SamplePoint<Sum> point = locate_tap(p.size, tap, group_tap, p.offset);
  const Sum modulation = p.mask ? widen(p.mask[tap.mask_at]) : Sum(1);
  SamplePlan plan;
  plan.first = first_neighbour(p.size, tap.image, point.y0, point.x0);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    plan.weight[i] = weighted(bilinear_weight(point, i), modulation);
  }
  if (point.is_nan) plan.weight[0] = not_a_number<Sum>();
  return plan;
}

// Block: x runs over the vectors of a sampling point's channels, y over sampling points.
// Grid: a tile of rows for one (deformable group, tap); neighbouring blocks share rows.
extern "C" __global__ void __launch_bounds__(256, 2)
    DCN_KERNEL(deform_conv2d_columns)(const DeformConvForwardParams p) {
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
      const SamplePlan plan = plans[s];
      for (int v = threadIdx.x * DCN_VEC; v < tile.channels; v += blockDim.x * DCN_VEC) {
        const int c = tile.first_channel + v;
        Sum sums[DCN_VEC] = {};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          if (plan.weight[i] != Sum(0)) {
            const auto pixel =
                *reinterpret_cast<const ScalarVector*>(p.input + neighbour(p.size, plan.first, i) * p.size.C + c);
#pragma unroll
            for (int e = 0; e < DCN_VEC; ++e) sums[e] += plan.weight[i] * widen(pixel.at[e]);
          }
        }
        ScalarVector column;
#pragma unroll
        for (int e = 0; e < DCN_VEC; ++e) column.at[e] = narrow<Scalar>(sums[e]);
        *reinterpret_cast<ScalarVector*>(p.columns + column_index(p.size, tile.first_row + s, tile.k, c)) = column;
      }
    }
    __syncthreads();
  }
}
