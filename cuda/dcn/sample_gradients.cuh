// Gradients of the position and the weight of a sampling point, from dot products over its channels.

#include "dcn/sampling.cuh"

// Dot products of a gradient with the channels of a sampling point's neighbours. The entry of a neighbour outside the
// image is meaningless.
struct alignas(16) SampleDots {
  Sum at[4];
};

// Sums four values over `lanes` threads, a power of two, that are numbered by `x`. With 4 threads or more, thread i < 4
// writes sum i; with fewer, thread 0 writes all. Threads exchange values before they add, which takes fewer shuffles
// than four separate sums. Called by a whole warp.
__device__ __forceinline__ void sum_over_lanes(int x, int lanes, const Sum (&value)[4], SampleDots& dots) {
  if (lanes < 4) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const Sum sum = lanes == 2 ? value[i] + __shfl_xor_sync(kAllLanes, value[i], 1) : value[i];
      if (x == 0) dots.at[i] = sum;
    }
    return;
  }
  const bool odd = x & 1, upper = x & 2;
  const Sum low = (odd ? value[1] : value[0]) + __shfl_xor_sync(kAllLanes, odd ? value[0] : value[1], 1);
  const Sum high = (odd ? value[3] : value[2]) + __shfl_xor_sync(kAllLanes, odd ? value[2] : value[3], 1);
  Sum sum = (upper ? high : low) + __shfl_xor_sync(kAllLanes, upper ? low : high, 2);
#pragma unroll
  for (int distance = 4; distance < 32; distance *= 2) {
    const Sum other = __shfl_xor_sync(kAllLanes, sum, distance);
    if (distance < lanes) sum += other;
  }
  if (x < 4) dots.at[x] = sum;
}

struct SampleGradient {
  Sum y, x, modulation;
};

// Differentiates `modulation` times the sample.
__device__ __forceinline__ SampleGradient differentiate(const SamplePoint<Sum>& point, Sum modulation,
                                                        const SampleDots& dots) {
  Sum dot[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) dot[i] = point.inside >> i & 1 ? dots.at[i] : Sum(0);
  const Sum ly = point.ly, lx = point.lx;
  SampleGradient gradient;
  gradient.y = weighted(modulation, weighted(Sum(1) - lx, dot[2] - dot[0]) + weighted(lx, dot[3] - dot[1]));
  gradient.x = weighted(modulation, weighted(Sum(1) - ly, dot[1] - dot[0]) + weighted(ly, dot[3] - dot[2]));
  gradient.modulation = Sum(0);
#pragma unroll
  for (int i = 0; i < 4; ++i) gradient.modulation += weighted(bilinear_weight(point, i), dot[i]);
  if (point.is_nan) gradient.y = gradient.x = gradient.modulation = not_a_number<Sum>();
  return gradient;
}
