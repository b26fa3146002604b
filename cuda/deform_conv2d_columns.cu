// The columns (im2col) of a deformable convolution: the sampled image, which a matrix product multiplies by the
// weights.

#include "dcn/columns.cuh"

struct DeformConvColumnsParams {
  const Scalar* input;         // [N, H, W, C]
  const OffsetScalar* offset;  // [N, 2*D*K, oh, ow]
  const OffsetScalar* mask;    // [N, D*K, oh, ow] or null
  Scalar* columns;             // [rows, G, K, C/G], written
  DeformConvSizes size;
  RowRange range;
  int tile_rows;  // sampling points that a block prepares together
};

static_assert(sizeof(SampleWeights<long long>) <= DCN_SAMPLE_BYTES, "shared memory per sampling point");

// Block: x over the channel vectors of a sampling point, y over sampling points. Grid: sample tiles.
extern "C" __global__ void __launch_bounds__(kThreads, 2)
    DCN_KERNEL(deform_conv2d_columns)(const DeformConvColumnsParams p) {
  DCN_SHARED_MEMORY(shared);
  auto* samples = reinterpret_cast<SampleWeights<long long>*>(shared);
  const int tiles = sample_tiles(p.size, p.range, p.tile_rows);
  for (int t = blockIdx.x; t < tiles; t += gridDim.x) {
    const SampleTile tile = sample_tile(p.size, p.range, p.tile_rows, t);
    for (int s = thread_of_block(); s < tile.samples; s += threads_of_block()) {
      const Tap tap = find_tap(p.size, p.range, tile.first_row + s, tile.group_tap);
      samples[s] = weigh_sample<long long>(p.size, tap, locate_tap(p.size, tap, tile.group_tap, p.offset), p.mask);
    }
    __syncthreads();

    for (int s = threadIdx.y; s < tile.samples; s += blockDim.y) {
      const SampleWeights<long long> sample = samples[s];
      for (int v = threadIdx.x * DCN_VEC; v < tile.channels; v += blockDim.x * DCN_VEC) {
        const int c = tile.first_channel + v;
        const Corners corners = load_corners(p.input + sample.first * p.size.C + c,
                                             static_cast<long long>(p.size.W) * p.size.C, p.size.C, sample.weight);
        ScalarVector column;
#pragma unroll
        for (int e = 0; e < DCN_VEC; ++e) column.at[e] = narrow<Scalar>(interpolate(corners, e, sample.weight));
        store_vector(p.columns + column_index(p.size, tile.first_row + s, tile.k, c), column);
      }
    }
    __syncthreads();
  }
}
