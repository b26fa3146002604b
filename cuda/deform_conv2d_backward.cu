// Backward pass of deformable convolution, given the gradient of the columns.
//
// The input's gradient is a scatter: each sampling point adds to its four neighbours. It is done without atomic
// additions by lists: for each (pixel of the input, deformable group), the columns that add to it, with their weights.
//   prepare                 counts the entries of the lists and sets where each starts; does changes of layout besides
//   fill_lists              writes the entries
//   gather_input            sums over each list
//   gather_input_in_order   likewise, in an order that is always the same
//   scatter_input           atomic additions instead, for channels too few to be worth a list
// Then grad_samples makes the gradients of offsets and masks, and turns the gradient of the columns into the columns.

#include "dcn/deform_conv2d.cuh"
#include "dcn/layout.cuh"

// A column that adds to a pixel; the same bits make the same list.
struct alignas(2 * sizeof(Sum)) ListEntry {
  int column;  // row * K + tap
  Sum weight;
};

// A stretch of a list that is too long for one warp.
struct ListPart {
  long long list;
  int begin, end;
};

struct ListCounters {
  unsigned blocks;  // that are done counting
  int parts;
};

struct DeformConvBackwardParams {
  const Scalar* input;         // [N, H, W, C]
  const OffsetScalar* offset;  // [N, 2*D*K, oh, ow]
  const OffsetScalar* mask;    // [N, D*K, oh, ow] or null
  Scalar* columns;             // [rows, G, K, C/G]: their gradient, replaced by the columns where write_columns
  OffsetScalar* grad_offset;   // [N, 2*D*K, oh, ow], written, or null
  OffsetScalar* grad_mask;     // [N, D*K, oh, ow], written, or null
  Sum* grad_input;             // [N, H, W, C], added to
  int* lengths;                // [lists + padding]: 0, then each list's entries that are not yet filled in
  int* starts;                 // [lists + padding]: the first entry of each list, and behind the last one their number
  ListEntry* entries;          // [4 * rows * D * K]
  ListPart* parts;             // what of the lists lies beyond their first part_entries entries
  ListCounters* counters;      // 0 at first
  DeformConvSizes size;
  RowRange range;
  long long lists;     // N * H * W * D: pixel * D + deformable group
  int part_entries;    // of a list that one warp sums
  int sorted_entries;  // the longest list that is put in order
  int warp_bytes;      // of shared memory, for putting lists in order
  int tile_rows;       // sampling points that a block prepares at once
  int write_columns;
  LayoutParams layout;
};

constexpr int kThreads = 256;
constexpr unsigned kAllLanes = 0xffffffffu;

using SumVector = Vector<Sum, (DCN_VEC < 16 / sizeof(Sum) ? DCN_VEC : 16 / sizeof(Sum))>;

constexpr int kSumVector = sizeof(SumVector) / sizeof(Sum);

// What all channels of a sampling point share.
struct SamplePlan {
  long long first;  // index in the input of the first neighbour's channel 0; the neighbour itself may lie outside
  Sum weight[4];    // modulated
  Sum ly, lx, modulation;
  int inside;  // bit i: neighbour i is a pixel; kIsNaN
};

constexpr int kIsNaN = 1 << 4;

// Dot products of the column's gradient with the neighbours' channels.
struct SampleDots {
  Sum at[4];
};

static_assert(sizeof(SamplePlan) + sizeof(SampleDots) <= DCN_SAMPLE_BYTES, "shared memory per sampling point");

__device__ __forceinline__ Sum modulation_of(const DeformConvBackwardParams& p, const Tap& tap) {
  return p.mask ? widen(p.mask[tap.mask_at]) : Sum(1);
}

__device__ __forceinline__ SamplePlan plan_sample(const DeformConvBackwardParams& p, int row, int group_tap) {
  const Tap tap = find_tap(p.size, p.range, row, group_tap);
  const SamplePoint<Sum> point = locate_tap(p.size, tap, group_tap, p.offset);
  SamplePlan plan;
  plan.first = first_neighbour(p.size, tap.image, point.y0, point.x0) * p.size.C;
  plan.modulation = modulation_of(p, tap);
#pragma unroll
  for (int i = 0; i < 4; ++i) plan.weight[i] = weighted(bilinear_weight(point, i), plan.modulation);
  plan.ly = point.ly;
  plan.lx = point.lx;
  plan.inside = point.inside | (point.is_nan ? kIsNaN : 0);
  return plan;
}

// Index in the input, or in its gradient, of channel 0 of neighbour i.
__device__ __forceinline__ long long neighbour_index(const DeformConvSizes& size, const SamplePlan& plan, int i) {
  return plan.first + (i & 2 ? static_cast<long long>(size.W) * size.C : 0) + (i & 1 ? size.C : 0);
}

// ---- lists

// Calls visit(list, weight) for the neighbours to which a sampling point adds.
template <typename Visit>
__device__ __forceinline__ void visit_lists(const DeformConvBackwardParams& p, int row, int group_tap, Visit visit) {
  const Tap tap = find_tap(p.size, p.range, row, group_tap);
  const SamplePoint<Sum> point = locate_tap(p.size, tap, group_tap, p.offset);
  const Sum modulation = modulation_of(p, tap);
  const long long first = first_neighbour(p.size, tap.image, point.y0, point.x0);
  const int d = group_tap / (p.size.kh * p.size.kw);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const Sum weight = weighted(bilinear_weight(point, i), modulation);
    if (weight != Sum(0)) visit(neighbour(p.size, first, i) * p.size.D + d, weight);
  }
}

__device__ __forceinline__ unsigned sample_count(const DeformConvBackwardParams& p) {
  return static_cast<unsigned>(p.range.rows) * (p.size.D * p.size.kh * p.size.kw);
}

// Sampling point number s, numbered in the memory order of the offsets: neighbouring threads read neighbouring words.
template <typename Visit>
__device__ __forceinline__ void visit_lists_of(const DeformConvBackwardParams& p, unsigned s, Visit visit) {
  const unsigned rows = p.range.rows, group_taps = p.size.D * p.size.kh * p.size.kw;
  const bool rows_together = p.size.offset_pixel == 1;
  const unsigned row = rows_together ? s % rows : s / group_taps;
  const unsigned group_tap = rows_together ? s / rows : s % group_taps;
  visit_lists(p, static_cast<int>(row), static_cast<int>(group_tap), [&](long long list, Sum weight) {
    visit(list, weight, static_cast<int>(row * (p.size.kh * p.size.kw) + group_tap % (p.size.kh * p.size.kw)));
  });
}

// Whether this block is the last of the grid to come here. It then sees what all others wrote before.
__device__ __forceinline__ bool arrives_last(unsigned* blocks, unsigned char* shared) {
  int* is_last = reinterpret_cast<int*>(shared);
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    *is_last = atomicAdd(blocks, 1u) == gridDim.x - 1;
    if (*is_last) *blocks = 0;
  }
  __syncthreads();
  const bool last = *is_last;
  __threadfence();
  __syncthreads();
  return last;
}

constexpr int kListsOfThread = 16;

// One block: the starts of all lists from their lengths, and the parts of the long ones. A thread takes 16 lists at a
// time, and asks for its next ones before it works on them.
__device__ __forceinline__ void start_lists(const DeformConvBackwardParams& p, unsigned char* shared) {
  constexpr int warps = kThreads / 32, vectors = kListsOfThread / 4;
  constexpr long long step = kThreads * kListsOfThread;
  int* warp_sums = reinterpret_cast<int*>(shared);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const long long padded = (p.lists / kListsOfThread + 1) * kListsOfThread;
  if (threadIdx.x == 0) p.counters->parts = 0;
  __syncthreads();

  const auto load = [&](long long at, int4(&lengths)[vectors]) {
#pragma unroll
    for (int i = 0; i < vectors; ++i) {
      lengths[i] = at < padded ? __ldcg(reinterpret_cast<const int4*>(p.lengths + at) + i) : make_int4(0, 0, 0, 0);
    }
  };
  int4 next[vectors];
  load(threadIdx.x * kListsOfThread, next);
  int total = 0;
  for (long long first = 0; first < padded; first += step) {
    const long long at = first + threadIdx.x * kListsOfThread;
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
      const int begin = start, end = start + length;
      for (int part = begin + p.part_entries; length > p.part_entries && part < end; part += p.part_entries) {
        p.parts[atomicAdd(&p.counters->parts, 1)] = {at + i, part, min(part + p.part_entries, end)};
      }
      start = end;
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

// Block: 256 threads in one row. Grid: the tiles of all changes of layout, then the sampling points.
extern "C" __global__ void __launch_bounds__(256, kManyBlocks)
    DCN_KERNEL(deform_conv2d_prepare)(const DeformConvBackwardParams p) {
  DCN_SHARED_MEMORY(shared);
  const unsigned samples = sample_count(p);
  const long long tiles = layout_tiles(p.layout), counts = (samples + kThreads - 1) / kThreads;
  for (long long t = blockIdx.x; t < tiles + counts; t += gridDim.x) {
    if (t < tiles) {
      do_layout_tile<Scalar>(p.layout, t, shared);
      continue;
    }
    const unsigned s = static_cast<unsigned>(t - tiles) * kThreads + threadIdx.x;
    if (s < samples) visit_lists_of(p, s, [&](long long list, Sum, int) { atomicAdd(p.lengths + list, 1); });
  }
  if (arrives_last(&p.counters->blocks, shared)) start_lists(p, shared);
}

// Fills each list from its end, which takes its length back to 0, ready for the next count. Grid: sampling points.
extern "C" __global__ void __launch_bounds__(256, 2)
    DCN_KERNEL(deform_conv2d_fill_lists)(const DeformConvBackwardParams p) {
  const unsigned samples = sample_count(p), threads = gridDim.x * kThreads;
  for (unsigned s = blockIdx.x * kThreads + threadIdx.x; s < samples; s += threads) {
    visit_lists_of(p, s, [&](long long list, Sum weight, int column) {
      const int at = p.starts[list] + atomicAdd(p.lengths + list, -1) - 1;
      p.entries[at] = {column, weight};
    });
  }
}

// How a warp works on a list: `lanes` threads side by side take the vectors of a column's channels, `slots` such teams
// take the entries in turn.
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

// Adds the entries entry_at(0 ... count - 1), as far as they are this slot's. The warp reads 32 entries at once, and
// each slot asks for `in_flight` columns before the first is used. All lanes take part in that, those that load and
// others.
template <int in_flight, typename EntryAt>
__device__ __forceinline__ void add_entries(const DeformConvBackwardParams& p, const ListTeam& team, int c, bool loads,
                                            int count, EntryAt entry_at, Sum (&sums)[DCN_VEC]) {
  const int lane = thread_of_block() % 32;
  for (int base = 0; base < count; base += 32) {
    const int here = min(32, count - base);
    ListEntry own = {0, Sum(0)};
    if (lane < here) own = entry_at(base + lane);
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

// Adds to consecutive elements that no other thread adds to.
__device__ __forceinline__ void add_alone(Sum* to, const Sum (&sums)[DCN_VEC]) {
  SumVector* vectors = reinterpret_cast<SumVector*>(to);
#pragma unroll
  for (int i = 0; i < DCN_VEC / kSumVector; ++i) {
    SumVector value = vectors[i];
#pragma unroll
    for (int e = 0; e < kSumVector; ++e) value.at[e] += sums[i * kSumVector + e];
    vectors[i] = value;
  }
}

// Block: x (a power of two up to 32) over the channel vectors of a deformable group, 256 threads. Grid: warps, one for
// each list. The parts of long lists follow, and only they need atomic additions.
extern "C" __global__ void __launch_bounds__(256, sizeof(Sum) == 8 ? 3 : kManyBlocks)
    DCN_KERNEL(deform_conv2d_gather_input)(const DeformConvBackwardParams p) {
  const ListTeam team = list_team();
  const int channels = p.size.C / p.size.D;
  const long long tasks = p.lists + p.counters->parts;
  for (long long task = warp_of_grid(); task < tasks; task += warps_of_grid()) {
    ListPart part;
    bool is_alone = false;
    if (task < p.lists) {
      part = {task, p.starts[task], p.starts[task + 1]};
      is_alone = part.end - part.begin <= p.part_entries;
      if (!is_alone) part.end = part.begin + p.part_entries;
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
        if (is_alone) {
          add_alone(pixel + c, sums);
        } else {
          add_vector(pixel + c, sums);
        }
      }
    }
  }
}

// What a warp needs of shared memory to take a list in order.
struct ListOrder {
  ListEntry* found;       // [32], of sampling points that were searched
  int* columns;           // [sorted_entries + padding to whole int4]
  unsigned short* order;  // [sorted_entries]: the entries by their columns
};

__device__ __forceinline__ ListOrder list_order(const DeformConvBackwardParams& p, unsigned char* shared) {
  ListOrder order;
  order.found = reinterpret_cast<ListEntry*>(shared + thread_of_block() / 32 * p.warp_bytes);
  order.columns = reinterpret_cast<int*>(order.found + 32);
  order.order = reinterpret_cast<unsigned short*>(order.columns + (p.sorted_entries + 3) / 4 * 4);
  return order;
}

// The rank of an entry is the number of lesser columns: a list holds a column once.
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

// Adds a list of any length without reading it: all sampling points that may be on it are searched, in order.
__device__ __forceinline__ void add_by_search(const DeformConvBackwardParams& p, const ListTeam& team,
                                              const ListOrder& order, long long list, bool takes_part, int c,
                                              Sum (&sums)[DCN_VEC]) {
  const int K = p.size.kh * p.size.kw, d = static_cast<int>(list % p.size.D);
  const long long pixels = static_cast<long long>(p.size.oh) * p.size.ow;
  const long long image = list / p.size.D / p.size.W / p.size.H;
  // The rows of the list's image, as far as they belong to the chunk.
  const long long image_row = (image - p.range.first_image) * pixels - p.range.first_pixel;
  const int first_row = static_cast<int>(max(image_row, 0ll));
  const int rows = static_cast<int>(min(image_row + pixels, static_cast<long long>(p.range.rows))) - first_row;
  for (int first = 0; first < rows * K; first += 32) {
    const int s = first + team.lane;
    ListEntry entry = {0, Sum(0)};
    if (s < rows * K) {
      const int row = first_row + s % rows, k = s / rows;
      entry.column = row * K + k;
      visit_lists(p, row, d * K + k, [&](long long other, Sum weight) {
        if (other == list) entry.weight = weight;
      });
    }
    const unsigned found = __ballot_sync(kAllLanes, entry.weight != Sum(0));
    if (entry.weight != Sum(0)) order.found[__popc(found & ((1u << team.lane) - 1))] = entry;
    __syncwarp();
    add_entries<1>(p, team, c, takes_part, __popc(found), [&](int i) { return order.found[i]; }, sums);
    __syncwarp();
  }
}

// Block and grid as for gather_input. Long lists are rare; however many there are, together they hold the entries of
// the chunk, which bounds the searches.
extern "C" __global__ void __launch_bounds__(256, 2)
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
        add_entries<4>(p, team, c, takes_part, count, [&](int i) { return entries[order.order[i]]; }, sums);
      }
      sum_over_slots(team, sums);
      if (team.slot == 0 && takes_part) add_alone(pixel + c, sums);
    }
    __syncwarp();
  }
}

// ---- sampling points

// Block: x (a power of two up to 32) over the channel vectors of a deformable group, y over sampling points. Grid: a
// tile of rows for one (deformable group, tap); neighbouring blocks share rows.
extern "C" __global__ void __launch_bounds__(256, 2)
    DCN_KERNEL(deform_conv2d_scatter_input)(const DeformConvBackwardParams p) {
  DCN_SHARED_MEMORY(shared);
  SamplePlan* plans = reinterpret_cast<SamplePlan*>(shared);
  const int tiles = sample_tiles(p.size, p.range, p.tile_rows);
  for (int t = blockIdx.x; t < tiles; t += gridDim.x) {
    const SampleTile tile = sample_tile(p.size, p.range, p.tile_rows, t);
    for (int s = thread_of_block(); s < tile.samples; s += threads_of_block()) {
      plans[s] = plan_sample(p, tile.first_row + s, tile.group_tap);
    }
    __syncthreads();

    for (int s = threadIdx.y; s < tile.samples; s += blockDim.y) {
      const SamplePlan& plan = plans[s];
      for (int v = threadIdx.x * DCN_VEC; v < tile.channels; v += blockDim.x * DCN_VEC) {
        const int c = tile.first_channel + v;
        const ScalarVector grad = load_vector(p.columns + column_index(p.size, tile.first_row + s, tile.k, c));
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const Sum weight = plan.weight[i];
          if (weight != Sum(0)) {
            Sum value[DCN_VEC];
#pragma unroll
            for (int e = 0; e < DCN_VEC; ++e) value[e] = weight * widen(grad.at[e]);
            add_vector(p.grad_input + neighbour_index(p.size, plan, i) + c, value);
          }
        }
      }
    }
    __syncthreads();
  }
}

// The sums of four values over the `lanes` threads of a sampling point, each where x is its number (modulo 4, where
// there are at least 4 threads; all are thread 0's otherwise). Threads trade values before they add, which takes fewer
// shuffles than four sums one by one.
__device__ __forceinline__ void sum_over_lanes(int lanes, const Sum (&value)[4], SampleDots& dots, bool is_kept) {
  const int x = threadIdx.x;
  if (lanes < 4) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const Sum sum = lanes == 2 ? value[i] + __shfl_xor_sync(kAllLanes, value[i], 1) : value[i];
      if (is_kept && x == 0) dots.at[i] = sum;
    }
    return;
  }
  const bool odd = x & 1, upper = x & 2;
  const Sum low = (odd ? value[1] : value[0]) + __shfl_xor_sync(kAllLanes, odd ? value[0] : value[1], 1);
  const Sum high = (odd ? value[3] : value[2]) + __shfl_xor_sync(kAllLanes, odd ? value[2] : value[3], 1);
  Sum sum = (upper ? high : low) + __shfl_xor_sync(kAllLanes, upper ? low : high, 2);
  for (int distance = 4; distance < lanes; distance *= 2) sum += __shfl_xor_sync(kAllLanes, sum, distance);
  if (is_kept && x < 4) dots.at[x] = sum;
}

// Gradients of one sampling point.
struct SampleGradient {
  Sum y, x, modulation;
};

__device__ __forceinline__ SampleGradient differentiate(const SamplePlan& plan, const SampleDots& dots) {
  const Sum(&dot)[4] = dots.at;
  const Sum ly = plan.ly, lx = plan.lx;
  SampleGradient gradient;
  gradient.y = weighted(plan.modulation, weighted(Sum(1) - lx, dot[2] - dot[0]) + weighted(lx, dot[3] - dot[1]));
  gradient.x = weighted(plan.modulation, weighted(Sum(1) - ly, dot[1] - dot[0]) + weighted(ly, dot[3] - dot[2]));
  const SamplePoint<Sum> point = {0, 0, ly, lx, plan.inside, false};
  gradient.modulation = Sum(0);
#pragma unroll
  for (int i = 0; i < 4; ++i) gradient.modulation += weighted(bilinear_weight(point, i), dot[i]);
  if (plan.inside & kIsNaN) gradient.y = gradient.x = gradient.modulation = not_a_number<Sum>();
  return gradient;
}

// Block and grid as above; a tile has a multiple of the block's y, so that all lanes of a warp reach the shuffles
// together.
extern "C" __global__ void __launch_bounds__(256, 2)
    DCN_KERNEL(deform_conv2d_grad_samples)(const DeformConvBackwardParams p) {
  DCN_SHARED_MEMORY(shared);
  SamplePlan* plans = reinterpret_cast<SamplePlan*>(shared);
  SampleDots* dots = reinterpret_cast<SampleDots*>(plans + p.tile_rows);
  const int tiles = sample_tiles(p.size, p.range, p.tile_rows);
  for (int t = blockIdx.x; t < tiles; t += gridDim.x) {
    const SampleTile tile = sample_tile(p.size, p.range, p.tile_rows, t);
    for (int s = thread_of_block(); s < tile.samples; s += threads_of_block()) {
      plans[s] = plan_sample(p, tile.first_row + s, tile.group_tap);
    }
    __syncthreads();

    for (int s = threadIdx.y; s < p.tile_rows; s += blockDim.y) {
      Sum dot[4] = {};
      if (s < tile.samples) {
        const SamplePlan& plan = plans[s];
        for (int v = threadIdx.x * DCN_VEC; v < tile.channels; v += blockDim.x * DCN_VEC) {
          const int c = tile.first_channel + v;
          Scalar* at = p.columns + column_index(p.size, tile.first_row + s, tile.k, c);
          const ScalarVector grad = load_vector(at);
          ScalarVector pixel[4];
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            if (plan.inside >> i & 1) pixel[i] = load_vector(p.input + neighbour_index(p.size, plan, i) + c);
          }
          Sum sums[DCN_VEC];
#pragma unroll
          for (int e = 0; e < DCN_VEC; ++e) sums[e] = plan.inside & kIsNaN ? not_a_number<Sum>() : Sum(0);
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            if (plan.inside >> i & 1) {
#pragma unroll
              for (int e = 0; e < DCN_VEC; ++e) {
                const Sum value = widen(pixel[i].at[e]);
                dot[i] += widen(grad.at[e]) * value;
                sums[e] += weighted(plan.weight[i], value);
              }
            }
          }
          if (p.write_columns) {
            ScalarVector column;
#pragma unroll
            for (int e = 0; e < DCN_VEC; ++e) column.at[e] = narrow<Scalar>(sums[e]);
            *reinterpret_cast<ScalarVector*>(at) = column;
          }
        }
      }
      sum_over_lanes(blockDim.x, dot, dots[s], s < tile.samples);
    }
    __syncthreads();

    for (int s = thread_of_block(); s < tile.samples; s += threads_of_block()) {
      const SampleGradient gradient = differentiate(plans[s], dots[s]);
      const Tap tap = find_tap(p.size, p.range, tile.first_row + s, tile.group_tap);
      if (p.grad_offset) {
        p.grad_offset[tap.offset_at] = narrow<OffsetScalar>(gradient.y);
        p.grad_offset[tap.offset_at + p.size.offset_channel] = narrow<OffsetScalar>(gradient.x);
      }
      if (p.grad_mask) p.grad_mask[tap.mask_at] = narrow<OffsetScalar>(gradient.modulation);
    }
    __syncthreads();
  }
}
