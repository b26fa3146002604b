// The deterministic gradient of the value of multi-scale deformable attention, and of the input of deformable
// aggregation. Without atomic additions, each strip of pixels adds up the gradients of the points that touch it, in a
// fixed order.
//
// The first kernel marks which strips each block of 32 consecutive points touches. The second tests the points of the
// marked blocks again, one per lane.

#include "dcn/deform_attention.cuh"
#include "dcn/strip_sums.cuh"

struct DeformAttentionGradValueParams {
  const Scalar* grad_out;  // [N, Lq, M, D]
  unsigned* marks;         // [heads, strips, words], initially 0: a bit for each block of points
  Scalar* grad_value;      // [N, S, M, D], written; null to add to sums
  Sum* sums;               // [N, S, M, D], added to if grad_value is null
  DeformAttentionPoints points;
  long long first_head, heads;  // of all images
  int first_query, queries;     // of each of these heads, with fewer than 2^31 points
  int strips, words;
  int lane_bits;  // 2^lane_bits lanes cover the channel vectors of a row; the other lanes take other points
};

__device__ __forceinline__ int points_of_head(const DeformAttentionGradValueParams& p) {
  return p.queries * p.points.K;
}

// The row of a point of a head, and the point's number in the row.
struct RowPoint {
  QueryHead at;
  int k;
};

__device__ __forceinline__ RowPoint find_row_point(const DeformAttentionGradValueParams& p, long long head, int point) {
  RowPoint found;
  const int query = static_cast<unsigned>(point) / static_cast<unsigned>(p.points.K);
  found.k = point - query * p.points.K;
  found.at.image = static_cast<int>(quotient(p.first_head + head, p.points.M));
  found.at.head = static_cast<int>(p.first_head + head - static_cast<long long>(found.at.image) * p.points.M);
  found.at.in_image = p.first_query + query;
  found.at.query = static_cast<long long>(found.at.image) * p.points.Lq + found.at.in_image;
  return found;
}

// Block: (32, 8), one warp per block of points. Grid: blocks of points of all heads.
extern "C" __global__ void __launch_bounds__(kThreads, 2)
    DCN_KERNEL(deform_attention_mark_strips)(const DeformAttentionGradValueParams p) {
  DCN_SHARED_MEMORY(shared);
  Level* const levels = reinterpret_cast<Level*>(shared);
  load_levels(p.points, levels);
  const int points = points_of_head(p), blocks = (points - 1) / kWarp + 1;
  for (long long item = static_cast<long long>(blockIdx.x) * blockDim.y + threadIdx.y; item < p.heads * blocks;
       item += static_cast<long long>(gridDim.x) * blockDim.y) {
    const long long head = item / blocks;
    const int block = static_cast<int>(item - head * blocks), i = block * kWarp + threadIdx.x;
    if (i >= points) continue;
    const RowPoint row = find_row_point(p, head, i);
    const PointSample sample = weigh_point(find_point(p.points, levels, row.at, row.k));
    unsigned* const marks = p.marks + head * p.strips * p.words + block / kWarp;
    int marked = -1;
#pragma unroll
    for (int n = 0; n < 4; ++n) {
      if (sample.weight[n] == Sum(0)) continue;
      const int strip = (sample.pixel + neighbour_step(n, sample.W)) / kStrip;
      if (strip != marked) atomicOr(marks + static_cast<long long>(strip) * p.words, 1u << block % kWarp);
      marked = strip;
    }
  }
}

// Block: (32, 8). Each warp adds up the points of an equal part of the words in order; the parts are then added in
// order. Grid: strips of all heads by slices of channels.
extern "C" __global__ void __launch_bounds__(kThreads, 2)
    DCN_KERNEL(deform_attention_grad_value)(const DeformAttentionGradValueParams p) {
  DCN_SHARED_MEMORY(shared);
  Level* const levels = reinterpret_cast<Level*>(shared);
  StripSums* const partial = reinterpret_cast<StripSums*>(levels + kMaxLevels);
  load_levels(p.points, levels);
  const int lane = threadIdx.x, lanes = 1 << p.lane_bits, D = p.points.D, points = points_of_head(p);
  const int slice = lanes * DCN_VEC, slices = (D + slice - 1) / slice;
  const long long pixel_stride = static_cast<long long>(p.points.M) * D;
  const int share = (p.words + blockDim.y - 1) / blockDim.y;
  const int first_word = min(static_cast<int>(threadIdx.y) * share, p.words),
            end_word = min(first_word + share, p.words);
  for (long long item = blockIdx.x; item < p.heads * p.strips * slices; item += gridDim.x) {
    const long long of_strips = slices == 1 ? item : item / slices, head = of_strips / p.strips;
    const int strip = static_cast<int>(of_strips - head * p.strips), first_pixel = strip * kStrip;
    const int first_channel = static_cast<int>(item - of_strips * slices) * slice,
              c = first_channel + (lane & (lanes - 1)) * DCN_VEC;
    const QueryHead from = find_row_point(p, head, 0).at;
    const Scalar* const grad_out = p.grad_out + (from.query * p.points.M + from.head) * D + c;
    const unsigned* const marks = p.marks + of_strips * p.words;
    Sum sums[kStrip][DCN_VEC] = {};
    for (int base = first_word; base < end_word; base += kWarp) {
      const int word = base + lane < end_word ? static_cast<int>(marks[base + lane]) : 0;
      for (unsigned left = __ballot_sync(kAllLanes, word != 0); left; left &= left - 1) {
        const int source = __ffs(static_cast<int>(left)) - 1;
        for (unsigned blocks = __shfl_sync(kAllLanes, word, source); blocks; blocks &= blocks - 1) {
          const int block = (base + source) * kWarp + __ffs(static_cast<int>(blocks)) - 1, i = block * kWarp + lane;
          Sum weights[kStrip] = {};
          bool touches = false;
          if (i < points) {
            const RowPoint row = find_row_point(p, head, i);
            const PointSample sample = weigh_point(find_point(p.points, levels, row.at, row.k));
#pragma unroll
            for (int n = 0; n < 4; ++n) {
              const int pixel = sample.pixel + neighbour_step(n, sample.W) - first_pixel;
              // Selections instead of an index into `weights` keep the array in registers.
#pragma unroll
              for (int k = 0; k < kStrip; ++k) weights[k] += pixel == k ? sample.weight[n] : Sum(0);
            }
#pragma unroll
            for (int k = 0; k < kStrip; ++k) touches = touches || weights[k] != Sum(0);
          }
          const auto row_of = [&](int source_lane) {
            return grad_out + static_cast<long long>((block * kWarp + source_lane) / p.points.K) * pixel_stride;
          };
          add_rows(weights, touches, p.lane_bits, c < D, row_of, sums);
        }
      }
    }
    store_strip(sums, partial);
    __syncthreads();

    for (int i = thread_of_block(); i < kStrip * slice; i += threads_of_block()) {
      const int k = i / slice, channel = i % slice;
      if (k >= p.points.S - first_pixel || channel >= D - first_channel) continue;
      const Sum sum = total_of_strip(partial, k, channel, slice);
      const long long to = image_index(p.points, from) + (first_pixel + k) * pixel_stride + first_channel + channel;
      if (p.grad_value) {
        p.grad_value[to] = narrow<Scalar>(sum);
      } else {
        p.sums[to] += sum;
      }
    }
    __syncthreads();
  }
}
