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

// Scalar rows from images of the type From.
template <typename Scalar, typename From>
__device__ __forceinline__ void transpose_to_rows(const ArrayJob& job, int t, unsigned char* shared) {
  if (job.P == 1) {
    copy_rows<Scalar, From>(job, t);
  } else if (SmallImages<Scalar>::fit(job)) {
    small_pixels_to_rows<Scalar, From>(job, t, shared);
  } else {
    pixels_to_rows<Scalar, From>(job, t, shared);
  }
}

// Images of the type To from rows of sums.
template <typename To>
__device__ __forceinline__ void transpose_to_pixels(const ArrayJob& job, int t, unsigned char* shared) {
  if (job.P == 1) {
    copy_rows<To, Accumulator<To>>(job, t);
  } else if (SmallImages<To>::fit(job)) {
    small_rows_to_pixels<To>(job, t, shared);
  } else {
    rows_to_pixels<To>(job, t, shared);
  }
}

// Runs tile t of all jobs. Block: kThreads threads in x, all with the same t.
template <typename Scalar>
__device__ __forceinline__ void run_array_job_tile(const ArrayJobsParams& p, long long t, unsigned char* shared) {
#pragma unroll 1
  for (int i = 0; i < kMaxArrayJobs; ++i) {
    const ArrayJob& job = p.jobs[i];
    if (t >= 0 && t < job.tiles) {
      const int tile = static_cast<int>(t);
      switch (job.task) {
        case kPixelsToRows:
        case kPixelsToRoundedRows:
          transpose_to_rows<Scalar, Scalar>(job, tile, shared);
          break;
        case kWidePixelsToRows:
          if constexpr (sizeof(Scalar) == 2) transpose_to_rows<Scalar, Accumulator<Scalar>>(job, tile, shared);
          break;
        case kRowsToPixels:
          transpose_to_pixels<Scalar>(job, tile, shared);
          break;
        case kRowsToWidePixels:
          if constexpr (sizeof(Scalar) == 2) transpose_to_pixels<Accumulator<Scalar>>(job, tile, shared);
          break;
        case kSumPixels:
          sum_pixels<Scalar>(job, tile, shared);
          break;
        case kSumRows:
          sum_rows<Scalar>(job, tile, shared);
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
