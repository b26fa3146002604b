// Several array jobs in one launch. Its blocks share the tiles of all jobs.

#include "dcn/channel_sums.cuh"
#include "dcn/transposes.cuh"

constexpr int kMaxArrayJobs = 6;

struct ArrayJobsParams {
  ArrayJob jobs[kMaxArrayJobs];
};

__device__ __forceinline__ long long array_job_tiles(const ArrayJobsParams& p) {
  long long tiles = 0;
#pragma unroll
  for (int i = 0; i < kMaxArrayJobs; ++i) tiles += p.jobs[i].tiles;
  return tiles;
}

// Runs tile t of all jobs. Block: kThreads threads in x, all with the same t. Without `ends_pass`, the jobs that turn
// sums into results are left out.
template <typename Scalar, bool ends_pass>
__device__ __forceinline__ void run_array_job_tile(const ArrayJobsParams& p, long long t, unsigned char* shared) {
#pragma unroll 1
  for (int i = 0; i < kMaxArrayJobs; ++i) {
    const ArrayJob& job = p.jobs[i];
    if (t >= 0 && t < job.tiles) {
      const int tile = static_cast<int>(t);
      switch (job.task) {
        case kPixelsToRows:
        case kPixelsToRoundedRows:
          if (job.P == 1) {
            copy_rows<Scalar, Scalar>(job, tile);
          } else if (SmallImages<Scalar>::fit(job)) {
            small_pixels_to_rows<Scalar>(job, tile, shared);
          } else {
            pixels_to_rows<Scalar>(job, tile, shared);
          }
          break;
        case kWidePixelsToRows:
          wide_pixels_to_rows<Scalar>(job, tile);
          break;
        case kRowsToPixels:
          if constexpr (ends_pass) {
            if (job.P == 1) {
              copy_rows<Scalar, Accumulator<Scalar>>(job, tile);
            } else if (SmallImages<Scalar>::fit(job)) {
              small_rows_to_pixels<Scalar>(job, tile, shared);
            } else {
              rows_to_pixels<Scalar>(job, tile, shared);
            }
          }
          break;
        case kRowsToWidePixels:
          if constexpr (ends_pass) rows_to_wide_pixels<Accumulator<Scalar>>(job, tile);
          break;
        case kSumPixels:
          sum_pixels<Scalar>(job, tile, shared);
          break;
        case kSumRows:
          if constexpr (ends_pass) sum_rows<Scalar>(job, tile, shared);
          break;
        case kSumRowParts:
          sum_row_part<Scalar>(job, tile, shared);
          break;
        case kFillPixels:
          fill_pixels<Scalar>(job, tile);
          break;
        case kZero:
          write_zeros<Accumulator<Scalar>>(job, tile);
          break;
      }
    }
    t -= job.tiles;
  }
}
