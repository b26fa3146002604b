// A job on an array; one launch runs several.
//
// Images are [N, C, P]: P pixels, each channel contiguous. Rows are [N * P, C]: one per pixel, channels contiguous.

#include "dcn/types.cuh"
#include "dcn/rows.cuh"

enum ArrayTask {
  kNothing,
  kPixelsToRows,         // Scalar [N, C, P] to Scalar [rows, C]
  kPixelsToRoundedRows,  // the same for floats, rounded to TF32
  kWidePixelsToRows,     // Sum [N, C, P] to Scalar [rows, C]
  kRowsToPixels,         // Sum [rows, C] to Scalar [N, C, P]
  kRowsToWidePixels,     // Sum [rows, C] to Sum [N, C, P]
  kSumPixels,            // Scalar [N, C, P] to Sum [N, C]
  kSumRows,              // Sum [P, C] to Scalar [C]
  kSumRowParts,          // Scalar [rows, C] to Sum [parts, C], P rows to a part
  kFillPixels,           // Scalar [C] to Scalar [N, C, P]
  kZero,                 // zeros to Sum [N, C, P]
};

struct ArrayJob {
  const void* source;
  void* target;
  int task;
  int N, C, P;
  RowRange range;  // the rows of a transpose, or of the parts to sum
  int tiles;
};

__device__ __forceinline__ bool is_aligned(const void* at, int bytes) {
  return reinterpret_cast<unsigned long long>(at) % bytes == 0;
}
