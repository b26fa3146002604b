// Backward pass of deformable convolution, given the gradient of the columns.
//
// The gradient of the input is a scatter: each sampling point adds to its four neighbours. Lists turn it into a gather
// without atomic additions: for each (pixel of the input, deformable group), a list holds the columns that add to it
// and their weights.
//   prepare                 counts the entries of the lists and computes their starts; also runs array jobs
//   fill_lists              writes the entries
//   gather_input            sums over each list
//   gather_input_in_order   the same in a fixed order
//   scatter_input           atomic additions instead of lists, if there are too few channels to justify lists
// Then grad_samples computes the gradients of offsets and masks, and replaces the gradient of the columns by the
// columns.

#include "dcn/deform_conv2d.cuh"
#include "dcn/sample_gradients.cuh"
#include "dcn/array_jobs.cuh"

// A column that adds to the pixel of the list.
struct alignas(2 * sizeof(Sum)) ListEntry {
  int column;  // row * K + tap
  Sum weight;
};

// A part of a list that is too long for one warp.
struct ListPart {
  long long list;
  int begin, end;
};

struct ListCounters {
  unsigned blocks;  // blocks that have finished counting
  int parts;
};

struct DeformConvBackwardParams {
  const Scalar* input;         // [N, H, W, C]
  const OffsetScalar* offset;  // [N, 2*D*K, oh, ow]
  const OffsetScalar* mask;    // [N, D*K, oh, ow] or null
  Scalar* columns;             // [rows, G, K, C/G]: their gradient; if write_columns, replaced by the columns
  OffsetScalar* grad_offset;   // [N, 2*D*K, oh, ow], written, or null
  OffsetScalar* grad_mask;     // [N, D*K, oh, ow], written, or null
  Sum* grad_input;             // [N, H, W, C], added to
  int* lengths;                // [lists + padding]: 0, then the number of entries still to write to each list
  int* starts;                 // [lists + padding]: the first entry of each list, then the number of all entries
  ListEntry* entries;          // [4 * rows * D * K]
  ListPart* parts;             // the parts of long lists after their first part_entries entries
  ListCounters* counters;      // initially 0
  DeformConvSizes size;
  SamplingStrides grad_stride;  // of grad_offset and grad_mask
  RowRange range;
  Divisor by_taps, by_group_taps, by_kernel_width;  // K, D * K, kw
  Divisor by_pixels, by_output_width;               // oh * ow, ow
  Divisor by_rows, by_groups, by_group_channels;    // range.rows, D, C / G
  long long lists;                                  // N * H * W * D: pixel * D + deformable group
  int part_entries;                                 // entries of a list that one warp sums
  int sorted_entries;                               // length of the longest list that is sorted
  int warp_bytes;                                   // shared memory of a warp that sorts lists
  int tile_samples;                                 // sampling points that a block prepares together
  unsigned tiles;                                   // tiles of sampling points of all deformable groups
  unsigned chunk_columns;                           // range.rows * K
  int channels;                                     // C / D
  int write_columns;
  int count_blocks;  // the first blocks of prepare, which count
  ArrayJobsParams array_jobs;
};

using SumVector = Vector<Sum, (DCN_VEC < 16 / sizeof(Sum) ? DCN_VEC : 16 / sizeof(Sum))>;

constexpr int kSumVector = sizeof(SumVector) / sizeof(Sum);

// A sampling point for all its channels.
struct alignas(16) PreparedSample {
  long long first;   // index of channel 0 of the first neighbour inside the image, in the input
  long long column;  // index of the tap's channel 0 in the columns; -1 beyond the last row
  Sum weight[4];     // modulated bilinear weights
  Sum ly, lx, modulation;
  int flags;  // bit i: neighbour i is inside the image; kIsNaN; kHasRight, kHasLower: that neighbour is another pixel
};

constexpr int kAnyPixel = 15, kIsNaN = 1 << 4, kHasRight = 1 << 5, kHasLower = 1 << 6;

static_assert(sizeof(PreparedSample) + sizeof(SampleDots) <= DCN_SAMPLE_BYTES, "shared memory per sampling point");

// The tap's indices are in arrays with these strides.
__device__ __forceinline__ Tap find_tap(const DeformConvBackwardParams& p, const SamplingStrides& stride, int row,
                                        int group_tap) {
  const Division at = divide(static_cast<unsigned>(p.range.first_pixel + row), p.by_pixels);
  const ImagePixel pixel = {p.range.first_image + static_cast<int>(at.quotient), static_cast<int>(at.remainder)};
  return tap_of_pixel(stride, pixel, group_tap);
}

__device__ __forceinline__ SamplePoint<Sum> locate_tap(const DeformConvBackwardParams& p, const Tap& tap, int k) {
  const Division output = divide(tap.pixel, p.by_output_width), cell = divide(k, p.by_kernel_width);
  const int a = output.quotient, b = output.remainder, i = cell.quotient, j = cell.remainder;
  const int y = a * p.size.sh - p.size.pad_top + i * p.size.dh, x = b * p.size.sw - p.size.pad_left + j * p.size.dw;
  return locate_shifted(p.size, tap, y, x, p.offset);
}

__device__ __forceinline__ Sum modulation_of(const DeformConvBackwardParams& p, const Tap& tap) {
  return p.mask ? widen(p.mask[tap.mask_at]) : Sum(1);
}

// ---- lists

// The lists that a sampling point belongs to, and its weights. An entry of weight 0 has no list.
struct SampleLists {
  long long list[4];
  Sum weight[4];
};

__device__ __forceinline__ SampleLists lists_of(const DeformConvBackwardParams& p, int row, int d, int k) {
  const Tap tap = find_tap(p, p.size.stride, row, d * (p.size.kh * p.size.kw) + k);
  // Loaded before the offsets are waited for.
  const Sum modulation = modulation_of(p, tap);
  const SamplePoint<Sum> point = locate_tap(p, tap, k);
  const long long first = first_neighbour(p.size, tap.image, point.y0, point.x0) * p.size.D + d;
  const long long row_lists = static_cast<long long>(p.size.W) * p.size.D;
  SampleLists lists;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    lists.list[i] = first + (i & 2 ? row_lists : 0) + (i & 1 ? p.size.D : 0);
    lists.weight[i] = weighted(bilinear_weight(point, i), modulation);
  }
  return lists;
}

__device__ __forceinline__ unsigned sample_count(const DeformConvBackwardParams& p) {
  return static_cast<unsigned>(p.range.rows) * (p.size.D * p.size.kh * p.size.kw);
}

// Entries of all lists of a chunk.
__device__ __forceinline__ int list_capacity(const DeformConvBackwardParams& p) {
  return static_cast<int>(4 * sample_count(p));
}

// One (row, deformable group, tap).
struct Sample {
  int row, d, k;
};

// Sampling point number s. Numbers follow the memory order of the offsets, so that consecutive threads read consecutive
// words.
__device__ __forceinline__ Sample sample_number(const DeformConvBackwardParams& p, unsigned s) {
  const bool rows_together = p.size.stride.offset_pixel == 1;
  const Division at = divide(s, rows_together ? p.by_rows : p.by_group_taps);
  const Division group_tap = divide(rows_together ? at.quotient : at.remainder, p.by_taps);
  return {static_cast<int>(rows_together ? at.remainder : at.quotient), static_cast<int>(group_tap.quotient),
          static_cast<int>(group_tap.remainder)};
}

// Returns true in the last of `count` blocks to arrive. That block sees all writes of the others.
__device__ __forceinline__ bool arrives_last(unsigned* blocks, unsigned count, unsigned char* shared) {
  int* is_last = reinterpret_cast<int*>(shared);
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    *is_last = atomicAdd(blocks, 1u) == count - 1;
    if (*is_last) *blocks = 0;
  }
  __syncthreads();
  const bool last = *is_last;
  __threadfence();
  __syncthreads();
  return last;
}

constexpr int kListsPerThread = 16;

// Computes the starts of all lists from their lengths, and the parts of long lists, in one block. A thread takes
// kListsPerThread lists at a time, and loads the next lengths before it works on them. If the offsets change during the
// pass, earlier chunks leave lengths other than 0; no list may exceed the memory for one chunk.
__device__ __forceinline__ void start_lists(const DeformConvBackwardParams& p, unsigned char* shared) {
  constexpr int warps = kThreads / kWarp, vectors = kListsPerThread / 4;
  constexpr long long step = kThreads * kListsPerThread;
  const int capacity = list_capacity(p);
  int* warp_sums = reinterpret_cast<int*>(shared);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const long long padded = (p.lists / kListsPerThread + 1) * kListsPerThread;
  if (threadIdx.x == 0) p.counters->parts = 0;
  __syncthreads();

  const auto load = [&](long long at, int4(&lengths)[vectors]) {
#pragma unroll
    for (int i = 0; i < vectors; ++i) {
      const int4 got = at < padded ? __ldcg(reinterpret_cast<const int4*>(p.lengths + at) + i) : make_int4(0, 0, 0, 0);
      lengths[i] = make_int4(max(got.x, 0), max(got.y, 0), max(got.z, 0), max(got.w, 0));
    }
  };
  int4 next[vectors];
  load(threadIdx.x * kListsPerThread, next);
  int total = 0;
  for (long long first = 0; first < padded; first += step) {
    const long long at = first + threadIdx.x * kListsPerThread;
    int4 current[vectors];
    int sum = 0;
#pragma unroll
    for (int i = 0; i < vectors; ++i) {
      current[i] = next[i];
      sum += current[i].x + current[i].y + current[i].z + current[i].w;
    }
    load(at + step, next);

    int up_to = sum;
#pragma unroll
    for (int lanes = 1; lanes < 32; lanes *= 2) {
      const int lower = __shfl_up_sync(kAllLanes, up_to, lanes);
      if (lane >= lanes) up_to += lower;
    }
    if (lane == 31) warp_sums[warp] = up_to;
    __syncthreads();
    int start = total + up_to - sum;
#pragma unroll
    for (int i = 0; i < warps; ++i) {
      if (i < warp) start += warp_sums[i];
      total += warp_sums[i];
    }

    const auto begin_list = [&](int i, int length) {
      const int begin = min(start, capacity), end = min(start + length, capacity);
      for (int part = begin + p.part_entries; length > p.part_entries && part < end; part += p.part_entries) {
        p.parts[atomicAdd(&p.counters->parts, 1)] = {at + i, part, min(part + p.part_entries, end)};
      }
      start += length;
      return begin;
    };
    if (at < padded) {
#pragma unroll
      for (int i = 0; i < vectors; ++i) {
        int4 starts;
        starts.x = begin_list(4 * i, current[i].x);
        starts.y = begin_list(4 * i + 1, current[i].y);
        starts.z = begin_list(4 * i + 2, current[i].z);
        starts.w = begin_list(4 * i + 3, current[i].w);
        reinterpret_cast<int4*>(p.starts + at)[i] = starts;
      }
    }
    __syncthreads();
  }
}

// Block: kThreads threads in x. Grid: count_blocks blocks that count, then one block per tile of the array jobs. The
// last block that counts computes the starts while others still run array jobs.
extern "C" __global__ void __launch_bounds__(kThreads, kManyBlocks)
    DCN_KERNEL(deform_conv2d_prepare)(const DeformConvBackwardParams p) {
  DCN_SHARED_MEMORY(shared);
  // In a smaller grid, all blocks count first and run array jobs afterwards.
  const unsigned count_blocks = min(static_cast<unsigned>(p.count_blocks), gridDim.x);
  const unsigned first_other = gridDim.x > count_blocks ? count_blocks : 0, others = gridDim.x - first_other;
  const auto run_jobs = [&] {
    const long long tiles = array_job_tiles(p.array_jobs);
    for (long long t = blockIdx.x - first_other; t < tiles; t += others)
      run_array_job_tile<Scalar, false>(p.array_jobs, t, shared);
  };
  if (blockIdx.x >= count_blocks) {
    run_jobs();
    return;
  }
  const unsigned samples = sample_count(p), threads = count_blocks * kThreads;
  for (unsigned s = blockIdx.x * kThreads + threadIdx.x; s < samples; s += threads) {
    const Sample sample = sample_number(p, s);
    const SampleLists lists = lists_of(p, sample.row, sample.d, sample.k);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (lists.weight[i] != Sum(0)) atomicAdd(p.lengths + lists.list[i], 1);
    }
  }
  if (arrives_last(&p.counters->blocks, count_blocks, shared)) start_lists(p, shared);
  if (first_other == 0) run_jobs();
}

// Fills each list from its end. This decrements its length to 0, ready for the next count. Grid: sampling points.
extern "C" __global__ void __launch_bounds__(kThreads, 2)
    DCN_KERNEL(deform_conv2d_fill_lists)(const DeformConvBackwardParams p) {
  const unsigned samples = sample_count(p), threads = gridDim.x * kThreads, capacity = list_capacity(p);
  for (unsigned s = blockIdx.x * kThreads + threadIdx.x; s < samples; s += threads) {
    const Sample sample = sample_number(p, s);
    const SampleLists lists = lists_of(p, sample.row, sample.d, sample.k);
    const int column = sample.row * (p.size.kh * p.size.kw) + sample.k;
    // Four independent loads, then four atomics: their latencies overlap.
    int start[4], left[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (lists.weight[i] != Sum(0)) start[i] = p.starts[lists.list[i]];
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (lists.weight[i] != Sum(0)) left[i] = atomicAdd(p.lengths + lists.list[i], -1);
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (lists.weight[i] == Sum(0)) continue;
      // Out of range only if the offsets have changed since the entries were counted.
      const int at = start[i] + left[i] - 1;
      if (static_cast<unsigned>(at) < capacity) p.entries[at] = {column, lists.weight[i]};
    }
  }
}

// Work distribution in a warp that sums a list: `lanes` threads of a slot take the vectors of a column's channels, and
// the `slots` slots take entries in turn.
struct ListTeam {
  int lane, lanes, slot, slots;
};

__device__ __forceinline__ ListTeam list_team() {
  const int lane = thread_of_block() % 32, lanes = blockDim.x;
  return {lane, lanes, lane / lanes, 32 / lanes};
}

__device__ __forceinline__ long long warp_of_grid() {
  return static_cast<long long>(blockIdx.x) * (kThreads / 32) + thread_of_block() / 32;
}
__device__ __forceinline__ long long warps_of_grid() { return static_cast<long long>(gridDim.x) * (kThreads / 32); }

__device__ __forceinline__ long long entry_index(const DeformConvSizes& size, int column, int c) {
  if (size.G == 1) return static_cast<long long>(column) * size.C + c;
  const int K = size.kh * size.kw;
  return column_index(size, column / K, column % K, c);
}

// Adds this slot's entries of entry_at(0 ... count - 1). The warp loads 32 entries at once, and each slot loads
// `in_flight` columns before it uses the first. Lanes that load no channels must call this too, for the shuffles.
template <int in_flight, typename EntryAt>
__device__ __forceinline__ void add_entries(const DeformConvBackwardParams& p, const ListTeam& team, int c, bool loads,
                                            int count, EntryAt entry_at, Sum (&sums)[DCN_VEC]) {
  const int lane = thread_of_block() % 32;
  for (int base = 0; base < count; base += 32) {
    const int here = min(32, count - base);
    ListEntry own = {0, Sum(0)};
    if (lane < here) own = entry_at(base + lane);
    // An entry that was counted but not filled, because the offsets have changed in between.
    if (static_cast<unsigned>(own.column) >= p.chunk_columns) own = {0, Sum(0)};
    for (int first = 0; first < here; first += in_flight * team.slots) {
      Sum weight[in_flight];
      ScalarVector grad[in_flight];
#pragma unroll
      for (int u = 0; u < in_flight; ++u) {
        const int i = first + u * team.slots + team.slot;
        const int column = __shfl_sync(kAllLanes, own.column, i);
        const Sum shared_weight = __shfl_sync(kAllLanes, own.weight, i);
        weight[u] = i < here ? shared_weight : Sum(0);
        grad[u] = load_vector_if(p.columns + entry_index(p.size, column, c), loads && i < here);
      }
#pragma unroll
      for (int u = 0; u < in_flight; ++u) {
#pragma unroll
        for (int e = 0; e < DCN_VEC; ++e) sums[e] += weight[u] * widen(grad[u].at[e]);
      }
    }
  }
}

__device__ __forceinline__ void sum_over_slots(const ListTeam& team, Sum (&sums)[DCN_VEC]) {
  for (int lanes = team.lanes; lanes < 32; lanes *= 2) {
#pragma unroll
    for (int e = 0; e < DCN_VEC; ++e) sums[e] += __shfl_xor_sync(kAllLanes, sums[e], lanes);
  }
}

// Adds to consecutive elements without atomics: no other thread may add to them.
__device__ __forceinline__ void add_exclusively(Sum* to, const Sum (&sums)[DCN_VEC]) {
  SumVector* vectors = reinterpret_cast<SumVector*>(to);
#pragma unroll
  for (int i = 0; i < DCN_VEC / kSumVector; ++i) {
    SumVector value = vectors[i];
#pragma unroll
    for (int e = 0; e < kSumVector; ++e) value.at[e] += sums[i * kSumVector + e];
    vectors[i] = value;
  }
}

// Block: x (a power of two up to 32) over the channel vectors of a deformable group, kThreads threads. Grid: one warp
// per list, then one per part of a long list. Only long lists need atomic additions.
extern "C" __global__ void __launch_bounds__(kThreads, sizeof(Sum) == 8 ? 3 : kManyBlocks)
    DCN_KERNEL(deform_conv2d_gather_input)(const DeformConvBackwardParams p) {
  const ListTeam team = list_team();
  const int channels = p.size.C / p.size.D;
  const long long tasks = p.lists + p.counters->parts;
  for (long long task = warp_of_grid(); task < tasks; task += warps_of_grid()) {
    ListPart part;
    bool is_whole = false;
    if (task < p.lists) {
      part = {task, p.starts[task], p.starts[task + 1]};
      is_whole = part.end - part.begin <= p.part_entries;
      if (!is_whole) part.end = part.begin + p.part_entries;
      if (part.begin == part.end) continue;
    } else {
      part = p.parts[task - p.lists];
    }
    const int first_channel = static_cast<int>(part.list % p.size.D) * channels;
    Sum* pixel = p.grad_input + part.list / p.size.D * p.size.C;
    for (int first = 0; first < channels; first += team.lanes * DCN_VEC) {
      const int v = first + threadIdx.x * DCN_VEC, c = first_channel + v;
      Sum sums[DCN_VEC] = {};
      const ListEntry* entries = p.entries + part.begin;
      add_entries<4>(p, team, c, v < channels, part.end - part.begin, [&](int i) { return entries[i]; }, sums);
      sum_over_slots(team, sums);
      if (team.slot == 0 && v < channels) {
        if (is_whole) {
          add_exclusively(pixel + c, sums);
        } else {
          add_vector(pixel + c, sums);
        }
      }
    }
  }
}

// Shared memory of a warp that sums a list in order.
struct ListOrder {
  ListEntry* found;       // [32] entries found by search
  int* columns;           // [sorted_entries + padding to whole int4]
  unsigned short* order;  // [sorted_entries]: the entries sorted by their columns
};

__device__ __forceinline__ ListOrder list_order(const DeformConvBackwardParams& p, unsigned char* shared) {
  ListOrder order;
  order.found = reinterpret_cast<ListEntry*>(shared + thread_of_block() / 32 * p.warp_bytes);
  order.columns = reinterpret_cast<int*>(order.found + 32);
  order.order = reinterpret_cast<unsigned short*>(order.columns + (p.sorted_entries + 3) / 4 * 4);
  return order;
}

// The rank of an entry is the number of smaller columns, because a list holds a column once.
__device__ __forceinline__ void sort_list(const ListOrder& order, int lane, const ListEntry* entries, int count) {
  const int vectors = (count + 3) / 4;
  for (int i = lane; i < 4 * vectors; i += 32) order.columns[i] = i < count ? entries[i].column : 0x7fffffff;
  __syncwarp();
  for (int i = lane; i < count; i += 32) {
    const int column = order.columns[i];
    int rank = 0;
    for (int j = 0; j < vectors; ++j) {
      const int4 others = reinterpret_cast<const int4*>(order.columns)[j];
      rank += (others.x < column) + (others.y < column) + (others.z < column) + (others.w < column);
    }
    order.order[rank] = static_cast<unsigned short>(i);
  }
  __syncwarp();
}

// Adds the entries of a list of any length in order, by a search through all sampling points that may be on it.
__device__ __forceinline__ void add_by_search(const DeformConvBackwardParams& p, const ListTeam& team,
                                              const ListOrder& order, long long list, bool takes_part, int c,
                                              Sum (&sums)[DCN_VEC]) {
  const int K = p.size.kh * p.size.kw, d = static_cast<int>(list % p.size.D);
  const long long pixels = static_cast<long long>(p.size.oh) * p.size.ow;
  const long long image = list / p.size.D / p.size.W / p.size.H;
  // The rows of the list's image in this chunk.
  const long long image_row = (image - p.range.first_image) * pixels - p.range.first_pixel;
  const int first_row = static_cast<int>(max(image_row, 0ll));
  const int rows = static_cast<int>(min(image_row + pixels, static_cast<long long>(p.range.rows))) - first_row;
  for (int first = 0; first < rows * K; first += 32) {
    const int s = first + team.lane;
    ListEntry entry = {0, Sum(0)};
    if (s < rows * K) {
      const int row = first_row + s % rows, k = s / rows;
      entry.column = row * K + k;
      const SampleLists lists = lists_of(p, row, d, k);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (lists.weight[i] != Sum(0) && lists.list[i] == list) entry.weight = lists.weight[i];
      }
    }
    const unsigned found = __ballot_sync(kAllLanes, entry.weight != Sum(0));
    if (entry.weight != Sum(0)) order.found[__popc(found & ((1u << team.lane) - 1))] = entry;
    __syncwarp();
    add_entries<1>(p, team, c, takes_part, __popc(found), [&](int i) { return order.found[i]; }, sums);
    __syncwarp();
  }
}

// Block and grid as for gather_input. The lists together hold one chunk's entries, which bounds the number of searches
// for long lists.
extern "C" __global__ void __launch_bounds__(kThreads, 2)
    DCN_KERNEL(deform_conv2d_gather_input_in_order)(const DeformConvBackwardParams p) {
  DCN_SHARED_MEMORY(shared);
  const ListTeam team = list_team();
  const ListOrder order = list_order(p, shared);
  const int channels = p.size.C / p.size.D;
  for (long long list = warp_of_grid(); list < p.lists; list += warps_of_grid()) {
    const int begin = p.starts[list], count = p.starts[list + 1] - begin;
    if (count == 0) continue;
    const ListEntry* entries = p.entries + begin;
    const bool is_sorted = count <= p.sorted_entries;
    if (is_sorted) sort_list(order, team.lane, entries, count);
    const int first_channel = static_cast<int>(list % p.size.D) * channels;
    Sum* pixel = p.grad_input + list / p.size.D * p.size.C;
    for (int first = 0; first < channels; first += team.lanes * DCN_VEC) {
      const int v = first + threadIdx.x * DCN_VEC, c = first_channel + v;
      const bool takes_part = v < channels;
      Sum sums[DCN_VEC] = {};
      if (!is_sorted) {
        add_by_search(p, team, order, list, takes_part, c, sums);
      } else {
        // Equal columns leave gaps in the order. They occur only if the offsets have changed since the count.
        const auto entry_at = [&](int i) { return entries[min(static_cast<int>(order.order[i]), count - 1)]; };
        add_entries<4>(p, team, c, takes_part, count, entry_at, sums);
      }
      sum_over_slots(team, sums);
      if (team.slot == 0 && takes_part) add_exclusively(pixel + c, sums);
    }
    __syncwarp();
  }
}

// ---- sampling points

// Sampling points are numbered in bands of kBandRows rows, tap by tap, so that those of a block share most neighbours.
constexpr int kBandRows = 8;

// Consecutive sampling points of a deformable group.
struct BandTile {
  int d;
  unsigned first;  // number of the first sampling point
  int first_channel;
};

__device__ __forceinline__ BandTile band_tile(const DeformConvBackwardParams& p, unsigned t) {
  const Division at = divide(t, p.by_groups);
  BandTile tile;
  tile.d = at.remainder;
  tile.first = at.quotient * p.tile_samples;
  tile.first_channel = tile.d * p.channels;
  return tile;
}

// Sampling point number s of a tile. Its row may be beyond the last.
__device__ __forceinline__ Sample sample_of_tile(const DeformConvBackwardParams& p, const BandTile& tile, int s) {
  const unsigned q = tile.first + s;
  const Division at = divide(q / kBandRows, p.by_taps);
  return {static_cast<int>(at.quotient * kBandRows + q % kBandRows), tile.d, static_cast<int>(at.remainder)};
}

__device__ __forceinline__ PreparedSample prepare_sample(const DeformConvBackwardParams& p, const Sample& sample) {
  PreparedSample prepared = {};
  prepared.column = -1;
  if (sample.row >= p.range.rows) return prepared;
  const int K = p.size.kh * p.size.kw;
  const Tap tap = find_tap(p, p.size.stride, sample.row, sample.d * K + sample.k);
  prepared.modulation = modulation_of(p, tap);
  const SamplePoint<Sum> point = locate_tap(p, tap, sample.k);
  prepared.column = static_cast<long long>(sample.row) * K * p.size.C +
                    static_cast<long long>(sample.k) * static_cast<int>(p.by_group_channels.value);
  // The neighbour inside the image replaces the one outside.
  const int right = point.x0 >= 0 && point.x0 + 1 < p.size.W, lower = point.y0 >= 0 && point.y0 + 1 < p.size.H;
  prepared.first = first_neighbour(p.size, tap.image, max(point.y0, 0), max(point.x0, 0)) * p.size.C;
#pragma unroll
  for (int i = 0; i < 4; ++i) prepared.weight[i] = weighted(bilinear_weight(point, i), prepared.modulation);
  prepared.ly = point.ly;
  prepared.lx = point.lx;
  prepared.flags = point.inside | (point.is_nan ? kIsNaN : 0) | (right ? kHasRight : 0) | (lower ? kHasLower : 0);
  return prepared;
}

// Steps from a sampling point's first neighbour to the others, in elements of the input or its gradient.
struct NeighbourSteps {
  int right;
  long long lower;

  __device__ __forceinline__ NeighbourSteps(const DeformConvSizes& size, int flags)
      : right(flags & kHasRight ? size.C : 0), lower(flags & kHasLower ? static_cast<long long>(size.W) * size.C : 0) {}

  __device__ __forceinline__ long long to(int i) const { return (i & 2 ? lower : 0) + (i & 1 ? right : 0); }
};

// Offset of channel c of a column from its channel 0.
__device__ __forceinline__ long long channel_of_column(const DeformConvBackwardParams& p, int c) {
  if (p.size.G == 1) return c;
  const int group_channels = p.by_group_channels.value, g = divide(c, p.by_group_channels).quotient;
  return c + static_cast<long long>(g) * (p.size.kh * p.size.kw - 1) * group_channels;
}

// Block: x (a power of two up to 32) over the channel vectors of a deformable group, y over sampling points. Grid:
// tiles.
extern "C" __global__ void __launch_bounds__(kThreads, 2)
    DCN_KERNEL(deform_conv2d_scatter_input)(const DeformConvBackwardParams p) {
  DCN_SHARED_MEMORY(shared);
  PreparedSample* prepared = reinterpret_cast<PreparedSample*>(shared);
  for (unsigned t = blockIdx.x; t < p.tiles; t += gridDim.x) {
    const BandTile tile = band_tile(p, t);
    for (int s = thread_of_block(); s < p.tile_samples; s += threads_of_block()) {
      prepared[s] = prepare_sample(p, sample_of_tile(p, tile, s));
    }
    __syncthreads();

    for (int s = threadIdx.y; s < p.tile_samples; s += blockDim.y) {
      const PreparedSample& sample = prepared[s];
      if (!(sample.flags & kAnyPixel)) continue;
      const NeighbourSteps steps(p.size, sample.flags);
      for (int v = threadIdx.x * DCN_VEC; v < p.channels; v += blockDim.x * DCN_VEC) {
        const int c = tile.first_channel + v;
        const ScalarVector grad = load_vector(p.columns + sample.column + channel_of_column(p, c));
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const Sum weight = sample.weight[i];
          if (weight != Sum(0)) {
            Sum value[DCN_VEC];
#pragma unroll
            for (int e = 0; e < DCN_VEC; ++e) value[e] = weight * widen(grad.at[e]);
            add_vector(p.grad_input + sample.first + steps.to(i) + c, value);
          }
        }
      }
    }
    __syncthreads();
  }
}

#if __CUDA_ARCH__ >= 800
template <typename T>
__device__ __forceinline__ unsigned pack(float low, float high);
template <>
__device__ __forceinline__ unsigned pack<Half>(float low, float high) {
  return pack_half(low, high);
}
template <>
__device__ __forceinline__ unsigned pack<BFloat16>(float low, float high) {
  return pack_bfloat16(low, high);
}
#endif

// Rounds two elements at once if there is an instruction for it.
template <typename T>
__device__ __forceinline__ Vector<T, DCN_VEC> narrow_vector(const Accumulator<T> (&value)[DCN_VEC]) {
  Vector<T, DCN_VEC> narrowed;
#if __CUDA_ARCH__ >= 800
  if constexpr (sizeof(T) == 2 && DCN_VEC % 2 == 0) {
#pragma unroll
    for (int e = 0; e < DCN_VEC; e += 2) {
      const unsigned word = pack<T>(value[e], value[e + 1]);
      memcpy(narrowed.at + e, &word, 4);
    }
    return narrowed;
  }
#endif
#pragma unroll
  for (int e = 0; e < DCN_VEC; ++e) narrowed.at[e] = narrow<T>(value[e]);
  return narrowed;
}

// Block and grid as above. The samples of a tile are a multiple of blockDim.y, so that all lanes reach the shuffles.
extern "C" __global__ void __launch_bounds__(kThreads, kManyBlocks)
    DCN_KERNEL(deform_conv2d_grad_samples)(const DeformConvBackwardParams p) {
  DCN_SHARED_MEMORY(shared);
  PreparedSample* prepared = reinterpret_cast<PreparedSample*>(shared);
  SampleDots* dots = reinterpret_cast<SampleDots*>(prepared + p.tile_samples);
  for (unsigned t = blockIdx.x; t < p.tiles; t += gridDim.x) {
    const BandTile tile = band_tile(p, t);
    for (int s = thread_of_block(); s < p.tile_samples; s += threads_of_block()) {
      prepared[s] = prepare_sample(p, sample_of_tile(p, tile, s));
    }
    __syncthreads();

    for (int s = threadIdx.y; s < p.tile_samples; s += blockDim.y) {
      Sum dot[4] = {};
      const long long column = prepared[s].column, first = prepared[s].first;
      if (column >= 0) {
        const int flags = prepared[s].flags;
        const NeighbourSteps steps(p.size, flags);
        Sum weight[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) weight[i] = prepared[s].weight[i];
        for (int v = threadIdx.x * DCN_VEC; v < p.channels; v += blockDim.x * DCN_VEC) {
          const int c = tile.first_channel + v;
          Scalar* const at = p.columns + column + channel_of_column(p, c);
          Sum sums[DCN_VEC] = {};
          if (flags & kAnyPixel) {
            const Scalar* const from = p.input + first + c;
            const ScalarVector grad = load_vector(at);
            ScalarVector pixel[4];
#pragma unroll
            for (int i = 0; i < 4; ++i) pixel[i] = load_vector(from + steps.to(i));
#pragma unroll
            for (int i = 0; i < 4; ++i) {
#pragma unroll
              for (int e = 0; e < DCN_VEC; ++e) dot[i] += widen(grad.at[e]) * widen(pixel[i].at[e]);
              if (weight[i] != Sum(0)) {
#pragma unroll
                for (int e = 0; e < DCN_VEC; ++e) sums[e] += weight[i] * widen(pixel[i].at[e]);
              }
            }
          } else if (flags & kIsNaN) {
#pragma unroll
            for (int e = 0; e < DCN_VEC; ++e) sums[e] = not_a_number<Sum>();
          }
          if (p.write_columns) store_vector(at, narrow_vector<Scalar>(sums));
        }
      }
      sum_over_lanes(threadIdx.x, blockDim.x, dot, dots[s]);
    }
    __syncthreads();

    for (int s = thread_of_block(); s < p.tile_samples; s += threads_of_block()) {
      const Sample sample = sample_of_tile(p, tile, s);
      if (sample.row >= p.range.rows) continue;
      const PreparedSample& at = prepared[s];
      const SamplePoint<Sum> point = {0, 0, at.ly, at.lx, at.flags, (at.flags & kIsNaN) != 0};
      const SampleGradient gradient = differentiate(point, at.modulation, dots[s]);
      const Tap tap = find_tap(p, p.grad_stride, sample.row, sample.d * (p.size.kh * p.size.kw) + sample.k);
      if (p.grad_offset) {
        p.grad_offset[tap.offset_at] = narrow<OffsetScalar>(gradient.y);
        p.grad_offset[tap.offset_at + p.grad_stride.offset_channel] = narrow<OffsetScalar>(gradient.x);
      }
      if (p.grad_mask) p.grad_mask[tap.mask_at] = narrow<OffsetScalar>(gradient.modulation);
    }
    __syncthreads();
  }
}
