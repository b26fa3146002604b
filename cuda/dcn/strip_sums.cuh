// Sums of weighted rows for strips of consecutive pixels, in a fixed order and without atomics.
//
// A warp tests 32 sources of a strip at once, one per lane: bins of regions, or sampling points. Then it adds the
// gradients of those that touch the strip.

#include "dcn/sampling.cuh"

constexpr int kStrip = sizeof(Sum) == 8 ? 2 : DCN_VEC == 8 ? 4 : 8;  // pixels; the sums of a lane must fit registers
constexpr int kRowsTogether = sizeof(Sum) == 8 ? 1 : 2;              // rows that a lane loads before it adds them
constexpr int kStripPadding = 4;  // prevents bank conflicts of threads that run over pixels
constexpr int kPitch = kWarp * DCN_VEC + kStripPadding;

// The sums of a strip in one warp, as its block stores them in shared memory.
using StripSums = Sum[kStrip][kPitch];

// Removes the next bit for each group of lanes from `bits`. Returns the number of this group's bit, or -1.
__device__ __forceinline__ int next_bit(unsigned& bits, int group, int groups) {
  int mine = -1;
  for (int g = 0; g < groups && bits; ++g) {
    if (g == group) mine = __ffs(static_cast<int>(bits)) - 1;
    bits &= bits - 1;
  }
  return mine;
}

// Adds the row of each lane that touches the strip, times the weights of that lane. Called by a whole warp; its groups
// of 2^lane_bits lanes share the rows. row_of(lane) returns where the channels of this thread begin in a lane's row.
template <typename RowOf>
__device__ __forceinline__ void add_rows(const Sum (&weights)[kStrip], bool touches, int lane_bits, bool has_channels,
                                         RowOf row_of, Sum (&sums)[kStrip][DCN_VEC]) {
  const int lane = threadIdx.x;
  unsigned bits = __ballot_sync(kAllLanes, touches);
  while (bits) {
    int sources[kRowsTogether];
    ScalarVector rows[kRowsTogether];
#pragma unroll
    for (int b = 0; b < kRowsTogether; ++b) {
      sources[b] = next_bit(bits, lane >> lane_bits, kWarp >> lane_bits);
      if (sources[b] < 0 || !has_channels) continue;
      rows[b] = *reinterpret_cast<const ScalarVector*>(row_of(sources[b]));
    }
#pragma unroll
    for (int b = 0; b < kRowsTogether; ++b) {
#pragma unroll
      for (int k = 0; k < kStrip; ++k) {
        const Sum weight = __shfl_sync(kAllLanes, weights[k], max(sources[b], 0));
        if (sources[b] < 0 || !has_channels || weight == Sum(0)) continue;
#pragma unroll
        for (int e = 0; e < DCN_VEC; ++e) sums[k][e] += weight * widen(rows[b].at[e]);
      }
    }
  }
}

// Stores the sums of a warp, numbered threadIdx.y. A barrier must follow.
__device__ __forceinline__ void store_strip(const Sum (&sums)[kStrip][DCN_VEC], StripSums* partial) {
#pragma unroll
  for (int k = 0; k < kStrip; ++k) {
#pragma unroll
    for (int e = 0; e < DCN_VEC; ++e) partial[threadIdx.y][k][threadIdx.x * DCN_VEC + e] = sums[k][e];
  }
}

// Returns the sum over all warps, and the groups of lanes in each, for a pixel and a channel of a slice.
__device__ __forceinline__ Sum total_of_strip(const StripSums* partial, int k, int channel, int slice) {
  Sum sum = Sum(0);
  for (int warp = 0; warp < static_cast<int>(blockDim.y); ++warp) {
    for (int of_group = channel; of_group < kWarp * DCN_VEC; of_group += slice) sum += partial[warp][k][of_group];
  }
  return sum;
}
