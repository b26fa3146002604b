// Bilinear sampling of an image with zeros outside (convolution) or with repeated border pixels (RoI pooling).
//
// The border rule is also in the CPU loops (`_locate_samples` and `_add_axis_weights` in dcnops/_backends/cpu) and in
// adapters/torch/differentiable.py. The tests compare all of them with tests/reference.py.

#include "dcn/vectors.cuh"

using OffsetScalar = DCN_OFFSET_SCALAR;
using Sum = Accumulator<Scalar>;

// A sampling point and its four neighbours, numbered 0 (y0, x0), 1 (y0, x0+1), 2 (y0+1, x0), 3 (y0+1, x0+1).
template <typename A>
struct SamplePoint {
  int y0, x0;
  A ly, lx;     // the distance to y0 and x0, in [0, 1)
  int inside;   // bit i: neighbour i is a pixel of the image; no bit outside the open box (-1, H) x (-1, W)
  bool is_nan;  // a coordinate is NaN, and so is the sample
};

// Compares in floating point: a coordinate out of range would overflow an integer.
template <typename A>
__device__ __forceinline__ SamplePoint<A> locate(A y, A x, int H, int W) {
  SamplePoint<A> point = {0, 0, A(0), A(0), 0, y != y || x != x};
  if (y > A(-1) && y < A(H) && x > A(-1) && x < A(W)) {
    const A y0 = floor(y), x0 = floor(x);
    point.y0 = static_cast<int>(y0);
    point.x0 = static_cast<int>(x0);
    point.ly = y - y0;
    point.lx = x - x0;
    const int top = point.y0 >= 0, bottom = point.y0 + 1 < H, left = point.x0 >= 0, right = point.x0 + 1 < W;
    point.inside = (top & left) | (top & right) << 1 | (bottom & left) << 2 | (bottom & right) << 3;
  }
  return point;
}

// The bilinear weight of neighbour i, 0 if it is outside the image.
template <typename A>
__device__ __forceinline__ A bilinear_weight(const SamplePoint<A>& point, int i) {
  const A vertical = i & 2 ? point.ly : A(1) - point.ly;
  const A horizontal = i & 1 ? point.lx : A(1) - point.lx;
  return point.inside >> i & 1 ? vertical * horizontal : A(0);
}

// A product in which weight 0 excludes the value: 0 * inf is 0.
template <typename A>
__device__ __forceinline__ A weighted(A weight, A value) {
  return weight != A(0) ? weight * value : A(0);
}

// A coordinate of RoIAlign: samples outside [-1, extent] are 0, others are clamped to the image.
template <typename A>
struct ClampedCoordinate {
  bool inside;
  int low, high;  // the neighbours
  A fraction;     // weight of the high neighbour
  A slope;        // derivative of that weight: 1, or 0 where the coordinate is clamped
};

template <typename A>
__device__ __forceinline__ ClampedCoordinate<A> clamp_coordinate(A position, int extent) {
  ClampedCoordinate<A> at = {position >= A(-1) && position <= A(extent), 0, 0, A(0), A(0)};
  if (!at.inside) return at;
  const A clamped = position > A(0) ? position : A(0);
  at.low = min(static_cast<int>(clamped), extent - 1);
  at.high = min(at.low + 1, extent - 1);
  if (at.low < at.high) {
    at.fraction = clamped - static_cast<A>(at.low);
    at.slope = position >= A(0) ? A(1) : A(0);
  }
  return at;
}
