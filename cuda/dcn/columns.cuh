// Elements of a column: modulated bilinear samples of the image.

#include "dcn/deform_conv2d.cuh"

// A sampling point for all its channels: the index of its first neighbour in pixels [N, H, W] and the modulated
// bilinear weights of its four neighbours.
template <typename Index>
struct SampleWeights {
  Index first;
  Sum weight[4];
};

// For a NaN coordinate, the first pixel of the image gets weight NaN.
template <typename Index>
__device__ __forceinline__ SampleWeights<Index> weigh_sample(const DeformConvSizes& size, const Tap& tap,
                                                             const SamplePoint<Sum>& point, const OffsetScalar* mask) {
  const Sum modulation = mask ? widen(mask[tap.mask_at]) : Sum(1);
  SampleWeights<Index> sample;
  sample.first = static_cast<Index>(first_neighbour(size, tap.image, point.y0, point.x0));
#pragma unroll
  for (int i = 0; i < 4; ++i) sample.weight[i] = weighted(bilinear_weight(point, i), modulation);
  if (point.is_nan) sample.weight[0] = not_a_number<Sum>();
  return sample;
}

// Consecutive channels of a sampling point's four neighbours. A neighbour of weight 0 is not read: its channels are 0.
struct Corners {
  ScalarVector at[4];
};

__device__ __forceinline__ Corners load_corners(const Scalar* first, long long row_step, int pixel_step,
                                                const Sum (&weight)[4]) {
  Corners corners;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    corners.at[i] = load_vector_if(first + (i & 2 ? row_step : 0) + (i & 1 ? pixel_step : 0), weight[i] != Sum(0));
  }
  return corners;
}

__device__ __forceinline__ Sum interpolate(const Corners& corners, int e, const Sum (&weight)[4]) {
  Sum sum = weight[0] * widen(corners.at[0].at[e]);
#pragma unroll
  for (int i = 1; i < 4; ++i) sum += weight[i] * widen(corners.at[i].at[e]);
  return sum;
}
