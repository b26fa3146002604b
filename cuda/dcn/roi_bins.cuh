// The bins of deformable RoI pooling: their positions, and the pixels that contribute to them.
//
// The samples of a bin form a grid, so the weight of a pixel is a factor for its row times a factor for its column. A
// bin is therefore a list of distinct pixels, no matter how many samples touch each.

#include "dcn/rows.cuh"
#include "dcn/sampling.cuh"

struct DeformRoIPoolSizes {
  int N, C, H, W;
  int R, P, Q;
  int sampling_ratio;  // samples of a bin along an axis; 0: one per pixel
  double spatial_scale, gamma;
};

// The arrays that define the bins.
struct DeformRoIPoolBins {
  const Sum* rois;             // [R, 5]: image, x1, y1, x2, y2
  const OffsetScalar* offset;  // [R, 2, P, Q], x first, or null
  const OffsetScalar* mask;    // [R, P, Q] or null
  DeformRoIPoolSizes size;
};

// The samples of a bin along one axis; sample i is at start + (i + 1/2) * length / samples.
struct BinAxis {
  Sum start, length;
  Sum region;  // length of the whole region
  int samples;
  int first, last;  // range of the samples that can be inside the image
};

// Limit of the samples of a bin along an axis. In larger bins they are further apart.
constexpr int kMaxSamples = 1 << 24;

__device__ __forceinline__ Sum sample_position(const BinAxis& axis, int i) {
  return axis.start + rounded_product(static_cast<Sum>(i) + Sum(0.5), axis.length) / static_cast<Sum>(axis.samples);
}

// Skips samples that are clearly outside [low, high]: a region may be far larger than the image. The margin covers
// rounding errors of the sample positions.
__device__ __forceinline__ void limit_samples(BinAxis& axis, Sum low, Sum high) {
  const Sum samples = static_cast<Sum>(axis.samples), step = axis.length / samples;
  if (axis.last - axis.first <= 4 || step == Sum(0)) return;
  const Sum a = (low - axis.start) / step, b = (high - axis.start) / step, margin = Sum(2) + samples * Sum(4e-7);
  const Sum lowest = (a < b ? a : b) - margin, highest = (a < b ? b : a) + margin;
  const int first = lowest >= samples ? axis.samples : lowest > Sum(0) ? static_cast<int>(lowest) : 0;
  const int last = highest <= Sum(0) ? 0 : highest < samples ? static_cast<int>(highest) : axis.samples;
  axis.first = max(axis.first, first);
  axis.last = min(axis.last, last);
}

__device__ __forceinline__ long long offset_index(const DeformRoIPoolSizes& size, const ImagePixel& at) {
  return 2LL * at.image * size.P * size.Q + at.pixel;
}

__device__ __forceinline__ long long mask_index(const DeformRoIPoolSizes& size, const ImagePixel& at) {
  return static_cast<long long>(at.image) * size.P * size.Q + at.pixel;
}

// The samples along the rows or the columns of a bin; at.image is its region, at.pixel p * Q + q.
__device__ __forceinline__ BinAxis bin_axis(const DeformRoIPoolBins& bins, const ImagePixel& at, bool is_column) {
  const DeformRoIPoolSizes& size = bins.size;
  const Sum* roi = bins.rois + 5LL * at.image + (is_column ? 1 : 2);
  const Sum scale = static_cast<Sum>(size.spatial_scale);
  const Sum start = rounded_product(scale, roi[0]) - Sum(0.5), end = rounded_product(scale, roi[2]) - Sum(0.5);
  const int parts = is_column ? size.Q : size.P, part = is_column ? at.pixel % size.Q : at.pixel / size.Q;
  const Sum offset =
      bins.offset ? widen(bins.offset[offset_index(size, at) + (is_column ? 0 : size.P * size.Q)]) : Sum(0);
  BinAxis axis;
  axis.region = end - start;
  axis.length = axis.region / static_cast<Sum>(parts);
  // No offset moves nothing and an infinite one moves a bin out of reach, even if gamma * region is infinite or 0.
  const bool scales = offset != Sum(0) && is_finite(offset);
  const Sum shift =
      scales ? rounded_product(rounded_product(static_cast<Sum>(size.gamma), axis.region), offset) : offset;
  axis.start = start + rounded_product(static_cast<Sum>(part), axis.length) + shift;
  axis.samples = size.sampling_ratio;
  if (axis.samples == 0) {
    const Sum pixels = ceil(axis.length);
    axis.samples = pixels < Sum(kMaxSamples) ? (pixels > Sum(0) ? static_cast<int>(pixels) : 0) : kMaxSamples;
  }
  axis.first = 0;
  axis.last = axis.samples;
  limit_samples(axis, Sum(-1), static_cast<Sum>(is_column ? size.W : size.H));
  return axis;
}

__device__ __forceinline__ bool is_nan(const BinAxis& axis) {
  return !is_finite(axis.region) || axis.start != axis.start;
}

// Image and scale of a bin.
struct BinShare {
  int image;       // -1 if the bin is NaN: its region has no such image or is not finite, or its offset is NaN
  Sum per_sample;  // 1 / number of samples
  Sum scale;       // mask / number of samples
};

__device__ __forceinline__ BinShare bin_share(const DeformRoIPoolBins& bins, const ImagePixel& at, bool axis_is_nan,
                                              int samples_y, int samples_x) {
  const Sum image = bins.rois[5LL * at.image], samples = static_cast<Sum>(samples_y) * static_cast<Sum>(samples_x);
  BinShare share;
  const bool has_image = !axis_is_nan && image >= Sum(0) && image < static_cast<Sum>(bins.size.N);
  share.image = has_image ? static_cast<int>(image) : -1;
  share.per_sample = samples > Sum(1) ? Sum(1) / samples : Sum(1);
  share.scale = bins.mask ? weighted(share.per_sample, widen(bins.mask[mask_index(bins.size, at)])) : share.per_sample;
  return share;
}

// The bin of a warp. `axis` is that of the rows in the first half of the warp, that of the columns in the second.
struct WarpBin {
  BinAxis axis;
  int first_y, last_y, first_x, last_x;  // ranges of the samples inside the image; empty if the bin is NaN
  BinShare share;
};

constexpr int kHalf = kWarp / 2;

__device__ __forceinline__ WarpBin find_bin(const DeformRoIPoolBins& bins, const ImagePixel& at) {
  WarpBin bin;
  bin.axis = bin_axis(bins, at, threadIdx.x % kWarp >= kHalf);
  const bool axis_is_nan = __any_sync(kAllLanes, is_nan(bin.axis)) != 0;
  bin.share = bin_share(bins, at, axis_is_nan, __shfl_sync(kAllLanes, bin.axis.samples, 0),
                        __shfl_sync(kAllLanes, bin.axis.samples, kHalf));
  // One index for the warp, even if the regions change while its lanes read them.
  bin.share.image = __shfl_sync(kAllLanes, bin.share.image, 0);
  if (bin.share.image < 0) bin.axis.last = bin.axis.first;
  bin.first_y = __shfl_sync(kAllLanes, bin.axis.first, 0);
  bin.last_y = __shfl_sync(kAllLanes, bin.axis.last, 0);
  bin.first_x = __shfl_sync(kAllLanes, bin.axis.first, kHalf);
  bin.last_x = __shfl_sync(kAllLanes, bin.axis.last, kHalf);
  return bin;
}

// A row or a column of the image, its factor of the weights, and the derivative of that factor along the axis.
struct AxisPixel {
  int at;
  Sum weight, slope;
};

struct alignas(16) BinPixel {
  int at;  // row * W + column
  Sum weight, slope_y, slope_x;
};

constexpr int kSamplesTogether = kHalf / 2;  // per axis; a lane has one of the two neighbours of a sample
constexpr int kPixelsTogether = kWarp;

// Shared memory of a warp for a part of its bin.
struct WarpPixels {
  AxisPixel axes[2][kHalf];  // rows, columns
  BinPixel pixels[kPixelsTogether];
};

static_assert(sizeof(WarpPixels) == 224 * sizeof(Sum), "as the launch plan allocates");

// Stores the distinct rows and columns that contribute to the samples from (first_y, first_x) on, and returns their
// numbers. Called by a whole warp. With slopes, this includes those of weight 0 that contribute once the bin moves.
template <bool with_slopes>
__device__ __forceinline__ ImagePixel merge_samples(const WarpBin& bin, int first_y, int first_x, int H, int W,
                                                    AxisPixel (&axes)[2][kHalf]) {
  const int lane = threadIdx.x % kWarp, entry = lane % kHalf, is_column = lane / kHalf;
  const int sample = (is_column ? first_x : first_y) + entry / 2;
  const ClampedCoordinate<Sum> at = clamp_coordinate(sample_position(bin.axis, sample), is_column ? W : H);
  const bool takes_part = sample < bin.axis.last && at.inside;
  const int pixel = takes_part ? (entry & 1 ? at.high : at.low) : -1;
  const Sum weight = entry & 1 ? at.fraction : Sum(1) - at.fraction, slope = entry & 1 ? at.slope : -at.slope;

  const int most = min(kSamplesTogether, max(bin.last_y - first_y, bin.last_x - first_x));
  AxisPixel merged = {pixel, Sum(0), Sum(0)};
  bool is_first = takes_part;
#pragma unroll 1
  for (int other = 0; other < 2 * most; ++other) {
    const int its_pixel = __shfl_sync(kAllLanes, pixel, other, kHalf);
    const Sum its_weight = __shfl_sync(kAllLanes, weight, other, kHalf);
    const Sum its_slope = with_slopes ? __shfl_sync(kAllLanes, slope, other, kHalf) : Sum(0);
    if (its_pixel != pixel) continue;
    merged.weight += its_weight;
    merged.slope += its_slope;
    is_first = is_first && other >= entry;
  }
  const bool counts = is_first && (merged.weight != Sum(0) || (with_slopes && merged.slope != Sum(0)));
  const unsigned all = __ballot_sync(kAllLanes, counts), mine = all >> (is_column * kHalf) & 0xffffu;
  if (counts) axes[is_column][__popc(mine & ((1u << entry) - 1u))] = merged;
  __syncwarp();
  return {__popc(all & 0xffffu), __popc(all >> kHalf)};
}

// Calls visit(pixels, count) for groups of the pixels that contribute to a bin. Called by a whole warp.
template <bool with_slopes, typename Visit>
__device__ __forceinline__ void for_pixels_of_bin(const WarpBin& bin, int H, int W, WarpPixels& shared, Visit visit) {
  const int lane = threadIdx.x % kWarp;
  for (int y = bin.first_y; y < bin.last_y; y += kSamplesTogether) {
    for (int x = bin.first_x; x < bin.last_x; x += kSamplesTogether) {
      const ImagePixel counts = merge_samples<with_slopes>(bin, y, x, H, W, shared.axes);
      const int columns = counts.pixel, all = counts.image * columns;
      for (int first = 0; first < all; first += kPixelsTogether) {
        const int i = first + lane;
        if (i < all) {
          const AxisPixel row = shared.axes[0][i / columns], column = shared.axes[1][i % columns];
          shared.pixels[lane] = {row.at * W + column.at, row.weight * column.weight, row.slope * column.weight,
                                 column.slope * row.weight};
        }
        __syncwarp();
        visit(shared.pixels, min(kPixelsTogether, all - first));
        __syncwarp();
      }
    }
  }
}

// A tile of bins: a range of rows (the bins of all regions, numbered consecutively) by the channels that the lanes of a
// warp hold. A tile of an array [R, C, P, Q] passes through shared memory, so that global memory is read and written
// along P * Q. A vector of padding per row avoids bank conflicts of threads that read down a column.
__device__ __forceinline__ long long row_tiles(const DeformRoIPoolSizes& size, int tile_rows) {
  return (static_cast<long long>(size.R) * size.P * size.Q + tile_rows - 1) / tile_rows;
}

__device__ __forceinline__ RowRange row_tile(const DeformRoIPoolSizes& size, int tile_rows, long long index) {
  const int bins = size.P * size.Q;
  const long long first = index * tile_rows, rest = static_cast<long long>(size.R) * bins - first;
  return {static_cast<int>(first / bins), static_cast<int>(first % bins),
          static_cast<int>(min(static_cast<long long>(tile_rows), rest))};
}

// Index in [R * P * Q, C] of channel c of a row.
__device__ __forceinline__ long long row_index(const DeformRoIPoolSizes& size, const ImagePixel& at, int c) {
  return mask_index(size, at) * size.C + c;
}

// Calls visit(vector of the tile, index of its first element in [R, C, P, Q]); its elements are P * Q apart.
template <typename Visit>
__device__ __forceinline__ void for_vectors_of_tile(const DeformRoIPoolSizes& size, const RowRange& range,
                                                    int first_channel, int lanes, ScalarVector* tile, Visit visit) {
  const int vectors = min(lanes, (size.C - first_channel) / DCN_VEC), bins = size.P * size.Q;
  for (int i = thread_of_block(); i < range.rows * vectors; i += threads_of_block()) {
    const int row = i % range.rows, vector = i / range.rows;
    const ImagePixel at = find_pixel(range, row, bins);
    const int c = first_channel + vector * DCN_VEC;
    visit(tile[row * (lanes + 1) + vector], (static_cast<long long>(at.image) * size.C + c) * bins + at.pixel);
  }
}
