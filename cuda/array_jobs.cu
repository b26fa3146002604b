// Runs several array jobs in one launch: transposes, channel sums and fills.

#include "dcn/array_jobs.cuh"

// Grid: the tiles of all jobs.
extern "C" __global__ void __launch_bounds__(kThreads, kManyBlocks)
    DCN_KERNEL(run_array_jobs)(const ArrayJobsParams p) {
  DCN_SHARED_MEMORY(shared);
  const long long tiles = array_job_tiles(p);
  for (long long t = blockIdx.x; t < tiles; t += gridDim.x) run_array_job_tile<DCN_SCALAR, true>(p, t, shared);
}
