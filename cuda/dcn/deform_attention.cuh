// The sampling points of multi-scale deformable attention, and of deformable aggregation, which is attention with one
// level, a group per head and an output pixel per query.
//
// A row is one (image, query, head); rows are numbered consecutively. Pixels are those of all levels of an image.

#include "dcn/sampling.cuh"

constexpr int kMaxLevels = 64;

struct LevelShape {
  int H, W;
  int points;  // of each row
};

// The kernel of an aggregation. Its taps run down its columns.
struct TapGrid {
  int kh, kw;  // 0 for attention
  int sh, sw, ph, pw, dh, dw;
  int ow;
  int remove_center;
  double scale;
};

// Distances between the elements of consecutive queries and heads.
struct PointStrides {
  int location_query, location_head;
  int weight_query, weight_head;
};

struct DeformAttentionPoints {
  const OffsetScalar* locations;  // pairs (x, y): positions from 0 to 1, or the offsets of taps
  const OffsetScalar* weights;
  const void* shapes;  // [L, 2]: height and width of each level, or null: they are in `levels`
  PointStrides stride;
  int N, S, M, D, Lq, L, K;
  int has_long_shapes;  // the shapes are 64-bit integers
  TapGrid taps;
  LevelShape levels[kMaxLevels];
};

struct alignas(16) Level {
  int H, W;
  int first_pixel;
  int end_point;
};

// Extent i of the levels, not below 0 nor above the number of pixels.
__device__ __forceinline__ int level_extent(const DeformAttentionPoints& p, int i) {
  if (!p.shapes) return i & 1 ? p.levels[i / 2].W : p.levels[i / 2].H;
  const long long extent =
      p.has_long_shapes ? static_cast<const long long*>(p.shapes)[i] : static_cast<const int*>(p.shapes)[i];
  return static_cast<int>(max(min(extent, static_cast<long long>(p.S)), 0LL));
}

// Writes the levels to shared memory. Called by a whole block. Levels that exceed the pixels of an image lose rows:
// shapes on the device are not known before the launch, and may be wrong.
__device__ __forceinline__ void load_levels(const DeformAttentionPoints& p, Level* levels) {
  for (int i = thread_of_block(); i < 2 * p.L; i += threads_of_block()) {
    (i & 1 ? levels[i / 2].W : levels[i / 2].H) = level_extent(p, i);
  }
  __syncthreads();
  if (thread_of_block() == 0) {
    int first = 0, points = 0;
#pragma unroll 1
    for (int l = 0; l < p.L; ++l) {
      const int rest = p.S - first, W = levels[l].W, H = W > 0 ? min(levels[l].H, rest / W) : 0;
      points += p.levels[l].points;
      levels[l] = {H, W, first, points};
      first += H * W;
    }
  }
  __syncthreads();
}

struct QueryHead {
  long long query;  // of all images
  int image, in_image;
  int head;
};

// Divides by 32-bit instructions where the number allows it, which takes a fraction of the time.
__device__ __forceinline__ long long quotient(long long number, int by) {
  return number >> 32 == 0 ? static_cast<unsigned>(number) / static_cast<unsigned>(by) : number / by;
}

__device__ __forceinline__ QueryHead find_query(const DeformAttentionPoints& p, long long row) {
  QueryHead at;
  at.query = quotient(row, p.M);
  at.head = static_cast<int>(row - at.query * p.M);
  at.image = static_cast<int>(quotient(at.query, p.Lq));
  at.in_image = static_cast<int>(at.query - static_cast<long long>(at.image) * p.Lq);
  return at;
}

__device__ __forceinline__ long long location_index(const PointStrides& stride, const QueryHead& at, int k) {
  return at.query * stride.location_query + static_cast<long long>(at.head) * stride.location_head + 2 * k;
}

__device__ __forceinline__ long long weight_index(const PointStrides& stride, const QueryHead& at, int k) {
  return at.query * stride.weight_query + static_cast<long long>(at.head) * stride.weight_head + k;
}

// Index in [N, S, M, D] of the first channel of a head in the first pixel of an image.
__device__ __forceinline__ long long image_index(const DeformAttentionPoints& p, const QueryHead& at) {
  return (static_cast<long long>(at.image) * p.S * p.M + at.head) * p.D;
}

struct AttentionPoint {
  SamplePoint<Sum> at;
  int pixel, W;          // the first neighbour, which may be outside its level, and the distance to the one below
  Sum scale_y, scale_x;  // derivative of the position
  Sum weight;
};

// The position along an axis of tap i of an output pixel.
__device__ __forceinline__ Sum tap_position(int pixel, int stride, int padding, int taps, int dilation, int i,
                                            Sum scale, Sum offset) {
  const int center = dilation * (taps - 1) / 2;
  return static_cast<Sum>(pixel * stride - padding + center) +
         rounded_product(scale, static_cast<Sum>(i * dilation - center) + offset);
}

__device__ __forceinline__ AttentionPoint find_point(const DeformAttentionPoints& p, const Level* levels,
                                                     const QueryHead& at, int k) {
  int l = 0;
  while (k >= levels[l].end_point) ++l;
  const Level level = levels[l];
  const OffsetScalar* const location = p.locations + location_index(p.stride, at, k);
  const Sum x = widen(location[0]), y = widen(location[1]);
  AttentionPoint point;
  point.weight = widen(p.weights[weight_index(p.stride, at, k)]);
  if (p.taps.kh == 0) {
    point.scale_y = static_cast<Sum>(level.H);
    point.scale_x = static_cast<Sum>(level.W);
    point.at = locate(rounded_product(y, point.scale_y) - Sum(0.5), rounded_product(x, point.scale_x) - Sum(0.5),
                      level.H, level.W);
  } else {
    const TapGrid& taps = p.taps;
    const int tap = k + (taps.remove_center && k >= taps.kh * taps.kw / 2), j = tap / taps.kh, i = tap - j * taps.kh;
    const int a = at.in_image / taps.ow, b = at.in_image - a * taps.ow;
    const Sum scale = static_cast<Sum>(taps.scale);
    point.scale_y = point.scale_x = scale;
    point.at = locate(tap_position(a, taps.sh, taps.ph, taps.kh, taps.dh, i, scale, y),
                      tap_position(b, taps.sw, taps.pw, taps.kw, taps.dw, j, scale, x), level.H, level.W);
  }
  // Outside the level no weight, even an infinite one, has an effect.
  if (!point.at.inside) point.weight = Sum(0);
  point.pixel = level.first_pixel + point.at.y0 * level.W + point.at.x0;
  point.W = level.W;
  return point;
}

// A neighbour of a point, counted from its first one.
__device__ __forceinline__ int neighbour_step(int i, int W) { return (i & 2 ? W : 0) + (i & 1); }

// A sampling point for all its channels.
struct alignas(16) PointSample {
  Sum weight[4];  // of its neighbours: bilinear, times that of the point
  int pixel, W;
  int inside;
};

static_assert(sizeof(PointSample) == (sizeof(Sum) == 8 ? 48 : 32), "as the launch plans allocate");

__device__ __forceinline__ PointSample weigh_point(const AttentionPoint& point) {
  PointSample sample;
#pragma unroll
  for (int i = 0; i < 4; ++i) sample.weight[i] = weighted(bilinear_weight(point.at, i), point.weight);
  sample.pixel = point.pixel;
  sample.W = point.W;
  sample.inside = point.at.inside;
  return sample;
}

// How the lanes of a warp divide its rows: 2^row_bits lanes have one row. Of these, 2^lane_bits consecutive lanes have
// its channels, in vectors; the others have other points of the row. A warp prepares some points of its rows together,
// kPointsPerLane in each lane, and shares them through shared memory.
struct RowLanes {
  int lane_bits, row_bits;
};

constexpr int kPointsPerLane = 2;
constexpr int kWarpPoints = kPointsPerLane * kWarp;
