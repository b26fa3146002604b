// A column's elements: the modulated bilinear samples of the image at a sampling point.

#include "dcn/deform_conv2d.cuh"

// What all channels of a sampling point share: its first neighbour, as an index of pixels [N, H, W], and the modulated
// bilinear weights of its four neighbours.
template <typename Index>
struct SampleWeights {
  Index first;
  Sum weight[4];
};

// A NaN coordinate gives the first pixel of the image the weight NaN.
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

// Some consecutive channels of a sampling point's four neighbours; zeros where the weight is 0, so that what has no
// weight takes no part, and costs no access.
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
