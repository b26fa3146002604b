// Forward pass of deformable convolution in one kernel (implicit GEMM): columns exist in shared memory only.
//
// A block computes kTileRows output pixels by DCN_OUTPUTS output channels. It walks through the inner axis of the
// product in steps of 128 bytes of channels of one tap. In each step, it samples the channels at its pixels into shared
// memory, copies the filters' elements of the same channels there, and multiplies. The loads of the next step overlap
// with the products of this one.
//
//   DCN_OUTPUTS        64 | 128 | 256
//   DCN_PRODUCT        TensorProduct | WarpgroupProduct | SplitTensorProduct | FmaProduct, see dcn/products.cuh
//   DCN_BLOCKS         blocks that a multiprocessor should have registers for
//   DCN_SHARED_BYTES   shared memory of a block

#include "dcn/columns.cuh"
#include "dcn/products.cuh"
#include "dcn/words.cuh"

struct DeformConvFusedParams {
  const Scalar* input;         // [N, H, W, C]
  const OffsetScalar* offset;  // [N, 2*D*K, oh, ow]
  const OffsetScalar* mask;    // [N, D*K, oh, ow] or null
  const Scalar* filters;       // [O, K, C/G]
  const Scalar* bias;          // [O] or null
  Scalar* output;              // [N, O, oh, ow], or [N, oh, ow, O] if channels_last, written
  float* partial;              // [splits, rows, O]: partial sums of each split, written; null if there is one split
  DeformConvSizes size;
  int O;
  int rows;            // N * oh * ow
  int group_outputs;   // O / G
  int group_channels;  // C / G
  int segment;         // channels of a deformable group or a weight group, whichever is smaller
  int steps;           // steps of the inner axis of a weight group
  int splits;          // blocks that share the steps of an output
  int channels_last;   // memory order of the output
};

constexpr int kBand = 8;                               // image rows of a band; a band's pixels are numbered by columns
constexpr int kChannels = kRowBytes / sizeof(Scalar);  // channels of a step
using Product = DCN_PRODUCT<Scalar, DCN_OUTPUTS>;

constexpr int kRowStep = Product::kThreads / kPieces;  // each thread handles one piece of every kRowStep-th row,
constexpr int kHalves = kTileRows / kRowStep / 2;      // two rows at a time
constexpr int kTileAlignment = Product::kIsAsync ? 1024 : 16;

// An output pixel of the tile and the input position of its tap (0, 0).
struct TilePixel {
  ImagePixel at;  // image -1: beyond the last pixel
  int y, x;
};

struct Weights {
  Vector<float, 4> of[kTileRows];
};

struct alignas(kTileAlignment) SharedMemory {
  unsigned char a[2][kTileRows * kRowBytes];
  unsigned char b[2][DCN_OUTPUTS * kRowBytes];
  Weights weights[2];
  int first[2][kTileRows];
  TilePixel pixels[kTileRows];
};

// The hardware guarantees an alignment of 16 bytes.
static_assert(sizeof(SharedMemory) + kTileAlignment - 16 <= DCN_SHARED_BYTES, "shared memory of a block");

__device__ __forceinline__ SharedMemory& tile_memory(unsigned char* memory) {
  const unsigned long long address = reinterpret_cast<unsigned long long>(memory);
  return *reinterpret_cast<SharedMemory*>(memory + (kTileAlignment - address % kTileAlignment) % kTileAlignment);
}

// A slice of sums in shared memory, with contiguous outputs or with contiguous pixels. The pitches keep the writes and
// the reads free of bank conflicts. Row r of the tile is r % kBand rows down in a patch of a band's height.
constexpr int kRowPitch = kSlice + 8, kPatchPitch = kTileRows / kBand + 1, kOutputPitch = kBand * kPatchPitch + 12;
constexpr int kSliceFloats =
    kTileRows * kRowPitch > kSlice* kOutputPitch ? kTileRows * kRowPitch : kSlice * kOutputPitch;
static_assert(kSliceFloats * 4 <= sizeof(SharedMemory::a) + sizeof(SharedMemory::b), "a slice replaces the tiles");
static_assert(kTileRows * sizeof(TilePixel) + kSliceFloats * 4 <= DCN_SHARED_BYTES, "shared memory to add splits");

// The place of row kBand * across + down of the tile in a slice of either kind.
__device__ __forceinline__ int row_place(int across, int down) { return (across * kBand + down) * kRowPitch; }
__device__ __forceinline__ int patch_place(int across, int down) { return down * kPatchPitch + across; }

// Pixel number q. Consecutive numbers form a patch of the image, so that their samples are near each other.
__device__ __forceinline__ TilePixel find_tile_pixel(const DeformConvFusedParams& p, int q) {
  if (q >= p.rows) return {{-1, 0}, 0, 0};
  const int pixels = p.size.oh * p.size.ow, image = q / pixels, in_image = q - image * pixels;
  const int band = in_image / (kBand * p.size.ow), in_band = in_image - band * kBand * p.size.ow;
  const int height = min(kBand, p.size.oh - band * kBand);
  const int column = in_band / height, row = band * kBand + in_band - column * height;
  return {{image, row * p.size.ow + column}, row * p.size.sh - p.size.pad_top, column * p.size.sw - p.size.pad_left};
}

// A step of the inner axis: some channels of a tap. The order is: segments (the deformable groups of a weight group, or
// one segment if it is inside a deformable group), then taps, then channels.
struct Step {
  int segment, i, j, c;  // tap (i, j), c is the first channel within the segment

  __device__ __forceinline__ bool begins_tap() const { return c == 0; }
};

__device__ __forceinline__ Step find_step(const DeformConvFusedParams& p, int step) {
  const int K = p.size.kh * p.size.kw, steps_per_tap = (p.segment + kChannels - 1) / kChannels;
  const int tap = step / steps_per_tap, k = tap % K;
  return {tap / K, k / p.size.kw, k % p.size.kw, step % steps_per_tap * kChannels};
}

__device__ __forceinline__ Step step_after(const DeformConvFusedParams& p, Step step) {
  step.c += kChannels;
  if (step.c >= p.segment) {
    step.c = 0;
    if (++step.j == p.size.kw) {
      step.j = 0;
      if (++step.i == p.size.kh) {
        step.i = 0;
        ++step.segment;
      }
    }
  }
  return step;
}

// The sums that a block computes.
struct BlockTile {
  int g, first_row, first_output, split;  // first_output: within the weight group
};

__device__ __forceinline__ BlockTile find_block_tile(const DeformConvFusedParams& p, int t) {
  const int outputs = (p.group_outputs + DCN_OUTPUTS - 1) / DCN_OUTPUTS;
  BlockTile tile;
  tile.first_output = t % outputs * DCN_OUTPUTS;
  t /= outputs;
  tile.split = t % p.splits;
  t /= p.splits;
  tile.g = t % p.size.G;
  tile.first_row = t / p.size.G * kTileRows;
  return tile;
}

__device__ __forceinline__ int count_block_tiles(const DeformConvFusedParams& p) {
  const int outputs = (p.group_outputs + DCN_OUTPUTS - 1) / DCN_OUTPUTS;
  return (p.rows + kTileRows - 1) / kTileRows * p.size.G * p.splits * outputs;
}

// 16 bytes of channels of a sampling point's four neighbours. A neighbour of weight 0 is not read: its channels are 0.
struct CornerWords {
  Words at[4];
};

// A word of the column, rounded to the element type and then as an operand of the product.
__device__ __forceinline__ unsigned interpolate_word(const CornerWords& corners, int w, const float (&weight)[4]) {
  float sums[Word<Scalar>::kElements];
#pragma unroll
  for (int e = 0; e < Word<Scalar>::kElements; ++e) {
    sums[e] = weight[0] * Word<Scalar>::get(corners.at[0].at[w], e);
#pragma unroll
    for (int i = 1; i < 4; ++i) sums[e] += weight[i] * Word<Scalar>::get(corners.at[i].at[w], e);
  }
  const unsigned word = Word<Scalar>::put(sums);
  return Product::kRoundsA ? tensor_operand<Scalar>(word) : word;
}

// Moves data into the tiles of a block. A thread handles one 16-byte piece of every kRowStep-th row from `row` on.
struct Loader {
  const DeformConvFusedParams& p;
  SharedMemory& shared;
  int row, place;         // row and offset of the thread's first piece in a tile
  int channel, piece;     // the block's first channel, and the thread's first within a step
  int deformable_group;   // the block's first
  const Scalar* filters;  // the thread's first row of filters
  unsigned outputs;       // bit i: the thread's i-th row belongs to an output

  __device__ __forceinline__ Loader(const DeformConvFusedParams& p, const BlockTile& tile, SharedMemory& shared)
      : p(p), shared(shared) {
    row = threadIdx.x / kPieces;
    place = static_cast<int>(piece_of(shared.a[0], row, threadIdx.x % kPieces) - shared.a[0]);
    channel = tile.g * p.group_channels;
    piece = threadIdx.x % kPieces * DCN_VEC;
    deformable_group = channel / (p.size.C / p.size.D);
    const int first = tile.first_output + row;
    filters = p.filters + (static_cast<long long>(tile.g) * p.group_outputs + first) * filter_size() + piece;
    outputs = 0;
#pragma unroll
    for (int i = 0; i < DCN_OUTPUTS / kRowStep; ++i) outputs |= (first + kRowStep * i < p.group_outputs) << i;
  }

  __device__ __forceinline__ int filter_size() const { return p.size.kh * p.size.kw * p.group_channels; }

  // Locates the sampling points of a tap, one thread per pixel.
  __device__ __forceinline__ void weigh(const Step& step, int side) const {
    const int r = threadIdx.x;
    if (r >= kTileRows) return;
    const TilePixel pixel = shared.pixels[r];
    SampleWeights<int> sample = {};
    if (pixel.at.image >= 0) {
      const int k = step.i * p.size.kw + step.j;
      const Tap tap =
          tap_of_pixel(p.size.stride, pixel.at, (deformable_group + step.segment) * (p.size.kh * p.size.kw) + k);
      const int y = pixel.y + step.i * p.size.dh, x = pixel.x + step.j * p.size.dw;
      sample = weigh_sample<int>(p.size, tap, locate_shifted(p.size, tap, y, x, p.offset), p.mask);
    }
    shared.first[side][r] = sample.first * p.size.C;
#pragma unroll
    for (int i = 0; i < 4; ++i) shared.weights[side].of[r].at[i] = sample.weight[i];
  }

  // Fills with zeros beyond the segment and beyond the last output.
  __device__ __forceinline__ void fetch_filters(const Step& step, unsigned char* b) const {
    const bool valid = step.c + piece < p.segment;
    const Scalar* from = filters + (step.i * p.size.kw + step.j) * p.group_channels + step.segment * p.segment + step.c;
    const long long row_step = static_cast<long long>(kRowStep) * filter_size();
#pragma unroll
    for (int i = 0; i < DCN_OUTPUTS / kRowStep; ++i) {
      copy_16_async(b + place + i * kRowStep * kRowBytes, from + i * row_step, valid && (outputs >> i & 1));
    }
    commit_copies();
  }

  // Loads two of the thread's rows at a time, so that few registers hold pending loads.
  __device__ __forceinline__ void load(const Step& step, int side, int half, CornerWords (&corners)[2]) const {
    const bool valid = step.c + piece < p.segment;
    const Scalar* channels = p.input + (channel + step.segment * p.segment + step.c + piece);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int r = row + kRowStep * (2 * half + i);
      const Scalar* first = channels + shared.first[side][r];
      const Vector<float, 4> weight = shared.weights[side].of[r];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int at = (j & 2 ? p.size.W * p.size.C : 0) + (j & 1 ? p.size.C : 0);
        load_16_if(corners[i].at[j].at, first + at, valid && weight.at[j] != 0.0f);
      }
    }
  }

  __device__ __forceinline__ void store(int side, int half, const CornerWords (&corners)[2], unsigned char* a) const {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int rows = kRowStep * (2 * half + i);
      const Vector<float, 4> weight = shared.weights[side].of[row + rows];
      Words words;
#pragma unroll
      for (int w = 0; w < 4; ++w) words.at[w] = interpolate_word(corners[i], w, weight.at);
      *reinterpret_cast<Words*>(a + place + rows * kRowBytes) = words;
    }
  }
};

// The steps of a block.
struct StepRange {
  int begin, end;
};

__device__ __forceinline__ StepRange steps_of(const DeformConvFusedParams& p, const BlockTile& tile) {
  return {static_cast<int>(static_cast<long long>(p.steps) * tile.split / p.splits),
          static_cast<int>(static_cast<long long>(p.steps) * (tile.split + 1) / p.splits)};
}

// Computes the sums of a block. Threads multiply between the loads and the stores of the next step.
template <typename P>
__device__ __forceinline__ void multiply_synchronously(const DeformConvFusedParams& p, const BlockTile& tile,
                                                       SharedMemory& shared, P& product) {
  const StepRange steps = steps_of(p, tile);
  const Loader loader(p, tile, shared);
  constexpr int elements = 32 / sizeof(Scalar);  // elements of a row per instruction
  constexpr int pairs = kPieces / 2 / kHalves;
  CornerWords corners[2];
  Step next = find_step(p, steps.begin);
  int side = 0;  // buffer of the weights; they alternate with taps, the tiles with steps
  loader.weigh(next, side);
  loader.fetch_filters(next, shared.b[0]);
  __syncthreads();
#pragma unroll
  for (int half = 0; half < kHalves; ++half) {
    loader.load(next, side, half, corners);
    loader.store(side, half, corners, shared.a[0]);
  }

  for (int s = steps.begin; s < steps.end; ++s) {
    const int now = (s - steps.begin) & 1;
    const bool more = s + 1 < steps.end;
    const int channels = p.segment - next.c;
    next = step_after(p, next);
    if (more && next.begins_tap()) {
      side ^= 1;
      loader.weigh(next, side);
    }
    wait_for_copies<0>();
    __syncthreads();
    if (more) loader.fetch_filters(next, shared.b[now ^ 1]);
#pragma unroll
    for (int half = 0; half < kHalves; ++half) {
      if (more) loader.load(next, side, half, corners);
#pragma unroll
      for (int pair = half * pairs; pair < (half + 1) * pairs; ++pair) {
        if (pair * elements < channels) product.add(shared.a[now], shared.b[now], pair);
      }
      if (more) loader.store(side, half, corners, shared.a[now ^ 1]);
    }
  }
}

// Computes the sums of a block. The tensor cores multiply the tiles of a step asynchronously while threads fill those
// of the next step and locate the sampling points of the one after.
template <typename P>
__device__ __forceinline__ void multiply_asynchronously(const DeformConvFusedParams& p, const BlockTile& tile,
                                                        SharedMemory& shared, P& product) {
  const StepRange steps = steps_of(p, tile);
  const Loader loader(p, tile, shared);
  CornerWords corners[2];
  const Step first = find_step(p, steps.begin);
  Step next = step_after(p, first);
  int side = 0;  // buffer of the weights of the step after next; they alternate with taps
  loader.weigh(first, side);
  loader.fetch_filters(first, shared.b[0]);
  __syncthreads();
#pragma unroll
  for (int half = 0; half < kHalves; ++half) {
    loader.load(first, side, half, corners);
    loader.store(side, half, corners, shared.a[0]);
  }
  if (steps.begin + 1 < steps.end && next.begins_tap()) loader.weigh(next, side ^= 1);

  for (int s = steps.begin; s < steps.end; ++s) {
    const int tiles = (s - steps.begin) & 1;
    const Step after = step_after(p, next);
    wait_for_copies<0>();
    show_to_products();
    __syncthreads();
    product.start(shared.a[tiles], shared.b[tiles]);
    if (s + 1 < steps.end) {
      const int next_side = side;
      loader.fetch_filters(next, shared.b[tiles ^ 1]);
#pragma unroll
      for (int half = 0; half < kHalves; ++half) {
        loader.load(next, next_side, half, corners);
        loader.store(next_side, half, corners, shared.a[tiles ^ 1]);
        if (half == 0 && s + 2 < steps.end && after.begins_tap()) loader.weigh(after, side ^= 1);
      }
    }
    product.finish();
    next = after;
  }
}

// Writes a slice with contiguous outputs to rows [.., O], `width` outputs at a time.
template <int width, typename T, typename Row>
__device__ __forceinline__ void write_rows(T* rows, const float* slice, const Scalar* bias, int count, Row row_of) {
  constexpr int threads = kSlice / width;  // threads of a row
  const int output = threadIdx.x % threads * width;
  if (output >= count) return;
  float added[width];
#pragma unroll
  for (int e = 0; e < width; ++e) added[e] = bias ? widen(bias[output + e]) : 0.0f;
  for (int r = threadIdx.x / threads; r < kTileRows; r += blockDim.x / threads) {
    const long long at = row_of(r);
    if (at < 0) continue;
    const auto sums = *reinterpret_cast<const Vector<float, width>*>(slice + r * kRowPitch + output);
    Vector<T, width> values;
#pragma unroll
    for (int e = 0; e < width; ++e) values.at[e] = narrow<T>(sums.at[e] + added[e]);
    *reinterpret_cast<Vector<T, width>*>(rows + at + output) = values;
  }
}

template <typename T, typename Row>
__device__ __forceinline__ void write_rows(const DeformConvFusedParams& p, T* rows, const float* slice,
                                           const Scalar* bias, int count, Row row_of) {
  if (p.group_outputs % 4 == 0) {
    write_rows<4>(rows, slice, bias, count, row_of);
  } else {
    write_rows<1>(rows, slice, bias, count, row_of);
  }
}

// Writes a slice with contiguous pixels to planes [.., P]. Consecutive threads write neighbours in a row of the image.
__device__ __forceinline__ void write_planes(Scalar* planes, int P, const float* slice, const TilePixel* pixels,
                                             const Scalar* bias, int count, long long image_step) {
  constexpr int across = kTileRows / kBand;
  const int along = threadIdx.x % kTileRows, row = along % across * kBand + along / across;
  const ImagePixel at = pixels[row].at;
  if (at.image < 0) return;
  Scalar* plane = planes + at.image * image_step + at.pixel;
  const float* sums = slice + patch_place(row / kBand, row % kBand);
  for (int output = threadIdx.x / kTileRows; output < count; output += blockDim.x / kTileRows) {
    const float added = bias ? widen(bias[output]) : 0.0f;
    plane[static_cast<long long>(output) * P] = narrow<Scalar>(sums[output * kOutputPitch] + added);
  }
}

// Writes a slice of complete sums to the outputs from `first` of a weight group on.
__device__ __forceinline__ void write_output(const DeformConvFusedParams& p, const TilePixel* pixels,
                                             const float* slice, const BlockTile& tile, int first) {
  const int outputs = p.group_outputs, count = min(kSlice, outputs - first), o = tile.g * outputs + first;
  const int P = p.size.oh * p.size.ow;
  const Scalar* bias = p.bias ? p.bias + o : nullptr;
  if (p.channels_last) {
    write_rows(p, p.output + o, slice, bias, count, [&](int r) {
      const ImagePixel at = pixels[r].at;
      return at.image < 0 ? -1 : (static_cast<long long>(at.image) * P + at.pixel) * p.O;
    });
  } else {
    write_planes(p.output + static_cast<long long>(o) * P, P, slice, pixels, bias, count,
                 static_cast<long long>(p.O) * P);
  }
}

// Writes a slice of the partial sums of a split.
__device__ __forceinline__ void write_partial(const DeformConvFusedParams& p, const float* slice, const BlockTile& tile,
                                              int first) {
  const int outputs = p.group_outputs;
  float* rows = p.partial + static_cast<long long>(tile.split) * p.rows * p.O + tile.g * outputs + first;
  write_rows(p, rows, slice, nullptr, min(kSlice, outputs - first), [&](int r) {
    const int q = tile.first_row + r;
    return q < p.rows ? static_cast<long long>(q) * p.O : -1;
  });
}

// Grid: tiles; those of the same pixels have consecutive numbers.
extern "C" __global__ void __launch_bounds__(Product::kThreads, DCN_BLOCKS)
    DCN_KERNEL(deform_conv2d_fused)(const DeformConvFusedParams p) {
  DCN_SHARED_MEMORY(memory);
  SharedMemory& shared = tile_memory(memory);
  const int tiles = count_block_tiles(p);
  for (int t = blockIdx.x; t < tiles; t += gridDim.x) {
    const BlockTile tile = find_block_tile(p, t);
    if (threadIdx.x < kTileRows) shared.pixels[threadIdx.x] = find_tile_pixel(p, tile.first_row + threadIdx.x);
    __syncthreads();
    Product product;
    if constexpr (Product::kIsAsync) {
      multiply_asynchronously(p, tile, shared, product);
    } else {
      multiply_synchronously(p, tile, shared, product);
    }

    float* slice = reinterpret_cast<float*>(shared.a);
#pragma unroll
    for (int i = 0; i < DCN_OUTPUTS / kSlice; ++i) {
      const int first = tile.first_output + i * kSlice;
      if (first >= p.group_outputs) break;
      __syncthreads();
      if (p.partial || p.channels_last) {
        product.visit(
            i, [&](int across, int down, int output, float sum) { slice[row_place(across, down) + output] = sum; });
      } else {
        product.visit(i, [&](int across, int down, int output, float sum) {
          slice[patch_place(across, down) + output * kOutputPitch] = sum;
        });
      }
      __syncthreads();
      if (p.partial) {
        write_partial(p, slice, tile, first);
      } else {
        write_output(p, shared.pixels, slice, tile, first);
      }
    }
    __syncthreads();
  }
}

// Sums `width` outputs from `at` on over all splits, always in the same order.
template <int width>
__device__ __forceinline__ Vector<float, width> sum_of_splits(const DeformConvFusedParams& p, long long at) {
  using Sums = Vector<float, width>;
  constexpr int in_flight = 4;
  const long long step = static_cast<long long>(p.rows) * p.O;
  Sums sum = {};
  for (int first = 0; first < p.splits; first += in_flight) {
    Sums part[in_flight] = {};
#pragma unroll
    for (int i = 0; i < in_flight; ++i) {
      if (first + i < p.splits) part[i] = *reinterpret_cast<const Sums*>(p.partial + (first + i) * step + at);
    }
#pragma unroll
    for (int i = 0; i < in_flight; ++i) {
#pragma unroll
      for (int e = 0; e < width; ++e) sum.at[e] += part[i].at[e];
    }
  }
  return sum;
}

template <int width>
__device__ __forceinline__ void add_slice(const DeformConvFusedParams& p, const BlockTile& tile, float* slice) {
  const int outputs = p.group_outputs;
  for (int i = threadIdx.x; i < kTileRows * kSlice / width; i += blockDim.x) {
    const int r = i / (kSlice / width), output = i % (kSlice / width) * width, q = tile.first_row + r;
    if (q >= p.rows || tile.first_output + output >= outputs) continue;
    const long long at = static_cast<long long>(q) * p.O + tile.g * outputs + tile.first_output + output;
    const Vector<float, width> sums = sum_of_splits<width>(p, at);
#pragma unroll
    for (int e = 0; e < width; ++e) {
      slice[p.channels_last ? r * kRowPitch + output + e
                            : patch_place(r / kBand, r % kBand) + (output + e) * kOutputPitch] = sums.at[e];
    }
  }
}

// Grid: tiles of kTileRows pixels by kSlice outputs.
extern "C" __global__ void __launch_bounds__(kThreads, 2)
    DCN_KERNEL(deform_conv2d_add_splits)(const DeformConvFusedParams p) {
  DCN_SHARED_MEMORY(memory);
  TilePixel* pixels = reinterpret_cast<TilePixel*>(memory);
  float* slice = reinterpret_cast<float*>(pixels + kTileRows);
  const int outputs = p.group_outputs, slices = (outputs + kSlice - 1) / kSlice;
  const int tiles = (p.rows + kTileRows - 1) / kTileRows * p.size.G * slices;
  for (int t = blockIdx.x; t < tiles; t += gridDim.x) {
    const int first = t % slices * kSlice;
    const BlockTile tile = {t / slices % p.size.G, t / slices / p.size.G * kTileRows, first, 0};
    if (threadIdx.x < kTileRows) pixels[threadIdx.x] = find_tile_pixel(p, tile.first_row + threadIdx.x);
    if (outputs % 4 == 0) {
      add_slice<4>(p, tile, slice);
    } else {
      add_slice<1>(p, tile, slice);
    }
    __syncthreads();
    write_output(p, pixels, slice, tile, first);
    __syncthreads();
  }
}
