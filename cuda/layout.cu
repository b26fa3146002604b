// Changes of layout and sums over pixels, several in one launch.

#include "dcn/layout.cuh"

// Block: 256 threads. Grid: the tiles of all jobs.
extern "C" __global__ void __launch_bounds__(256, kManyBlocks) DCN_KERNEL(change_layout)(const LayoutParams p) {
  DCN_SHARED_MEMORY(shared);
  const long long tiles = layout_tiles(p);
  for (long long t = blockIdx.x; t < tiles; t += gridDim.x) do_layout_tile<DCN_SCALAR>(p, t, shared);
}
