// Forward pass of deformable convolution in one kernel: the sampled image never leaves the multiprocessor.
//
// A block computes kTileRows output pixels by DCN_OUTPUTS output channels. It walks through the products' inner axis in
// steps of 128 bytes of channels of one tap: samples them for its pixels into shared memory, fetches the weights' piece
// of the same channels beside them, and multiplies. What the next step needs is loaded while this one is multiplied.
//
//   DCN_OUTPUTS   64 | 128 | 256
//   DCN_PRODUCT   TensorProduct | SplitTensorProduct | FmaProduct, see dcn/products.cuh
//   DCN_BLOCKS    blocks that a multiprocessor should have room for
//   DCN_SHARED_BYTES

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
  float* partial;              // [splits, rows, O]: each split's part of the sums, written; null for one split
  DeformConvSizes size;
  int O;
  int rows;           // N * oh * ow
  int segment;        // channels of a deformable group or of a weight group, whichever is smaller
  int steps;          // of the inner axis of a weight group
  int splits;         // blocks that share the steps of an output
  int channels_last;  // of the output
};

constexpr int kSlice = 64;  // outputs that leave through shared memory at once
constexpr int kBand = 8;    // pixels are counted in bands of so many image rows, column by column
constexpr int kChannels = kRowBytes / sizeof(Scalar);  // of a step
using Product = DCN_PRODUCT<Scalar, DCN_OUTPUTS>;

// An output pixel of the tile: where it is, and the input position of tap (0, 0).
struct TilePixel {
  ImagePixel at;  // image -1: beyond the last
  int y, x;
};

struct Weights {
  Vector<float, 4> of[kTileRows];
};

struct SharedMemory {
  unsigned char a[2][kTileRows * kRowBytes];
  unsigned char b[2][DCN_OUTPUTS * kRowBytes];
  Weights weights[2];
  int first[2][kTileRows];
  TilePixel pixels[kTileRows];
};

static_assert(sizeof(SharedMemory) <= DCN_SHARED_BYTES, "shared memory of a block");

// A slice of sums on its way out: outputs together, or pixels together in an order in which neither side meets on a
// bank (pixel r of a band-high patch is r % kBand rows down).
constexpr int kRowPitch = kSlice + 8, kPatchPitch = kTileRows / kBand + 1, kOutputPitch = kBand * kPatchPitch + 12;
constexpr int kSliceFloats =
    kTileRows * kRowPitch > kSlice* kOutputPitch ? kTileRows * kRowPitch : kSlice * kOutputPitch;
static_assert(kSliceFloats * 4 <= sizeof(SharedMemory::a) + sizeof(SharedMemory::b), "a slice takes the tiles' place");
static_assert(kTileRows * sizeof(TilePixel) + kSliceFloats * 4 <= DCN_SHARED_BYTES, "shared memory to add splits");

__device__ __forceinline__ float& slice_at(float* slice, bool outputs_together, int row, int output) {
  return slice[outputs_together ? row * kRowPitch + output
                                : output * kOutputPitch + row % kBand * kPatchPitch + row / kBand];
}

// Pixel number q: neighbouring numbers lie in a patch of the image, whose samples are near each other.
__device__ __forceinline__ TilePixel find_tile_pixel(const DeformConvFusedParams& p, int q) {
  if (q >= p.rows) return {{-1, 0}, 0, 0};
  const int pixels = p.size.oh * p.size.ow, image = q / pixels, in_image = q - image * pixels;
  const int band = in_image / (kBand * p.size.ow), in_band = in_image - band * kBand * p.size.ow;
  const int height = min(kBand, p.size.oh - band * kBand);
  const int column = in_band / height, row = band * kBand + in_band - column * height;
  return {{image, row * p.size.ow + column}, row * p.size.sh - p.size.pad_top, column * p.size.sw - p.size.pad_left};
}

// The part of the inner axis that a step covers: some channels of a tap. The deformable groups of a weight group (or
// the part of one that it has) are walked through one after the other, taps inside them, channels innermost.
struct Step {
  int segment, k, c;  // c: first channel within the segment

  __device__ __forceinline__ bool begins_tap() const { return c == 0; }
};

__device__ __forceinline__ Step find_step(const DeformConvFusedParams& p, int step) {
  const int K = p.size.kh * p.size.kw, steps_per_tap = (p.segment + kChannels - 1) / kChannels;
  const int tap = step / steps_per_tap;
  return {tap / K, tap % K, step % steps_per_tap * kChannels};
}

__device__ __forceinline__ Step step_after(const DeformConvFusedParams& p, Step step) {
  step.c += kChannels;
  if (step.c >= p.segment) {
    step.c = 0;
    if (++step.k == p.size.kh * p.size.kw) {
      step.k = 0;
      ++step.segment;
    }
  }
  return step;
}

// A block's share of the work.
struct BlockTile {
  int g, first_row, first_output, split;  // first_output: within the weight group
};

__device__ __forceinline__ BlockTile find_block_tile(const DeformConvFusedParams& p, int t) {
  const int outputs = (p.O / p.size.G + DCN_OUTPUTS - 1) / DCN_OUTPUTS;
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
  const int outputs = (p.O / p.size.G + DCN_OUTPUTS - 1) / DCN_OUTPUTS;
  return (p.rows + kTileRows - 1) / kTileRows * p.size.G * p.splits * outputs;
}

// 16 bytes of channels of a sampling point's four neighbours; zeros where the weight is 0, so that what has no weight
// takes no part, and costs no access.
struct CornerWords {
  Words at[4];
};

// A word of the column: rounded as the element type is, and as the product wants its operand.
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

// What moves data for a block.
struct Loader {
  const DeformConvFusedParams& p;
  const BlockTile& tile;
  SharedMemory& shared;
  int row, piece;  // the thread's: every 32nd row from `row` on, a piece of 16 bytes of it

  // Sampling points of a tap, a thread for each pixel.
  __device__ __forceinline__ void weigh(const Step& step, int side) const {
    const int r = threadIdx.x;
    if (r >= kTileRows) return;
    const TilePixel pixel = shared.pixels[r];
    SampleWeights<int> sample = {};
    if (pixel.at.image >= 0) {
      const int d = (tile.g * (p.size.C / p.size.G) + step.segment * p.segment) / (p.size.C / p.size.D);
      const Tap tap = tap_of_pixel(p.size, pixel.at, d * (p.size.kh * p.size.kw) + step.k);
      const int y = pixel.y + step.k / p.size.kw * p.size.dh, x = pixel.x + step.k % p.size.kw * p.size.dw;
      sample = weigh_sample<int>(p.size, tap, locate_shifted(p.size, tap, y, x, p.offset), p.mask);
    }
    shared.first[side][r] = sample.first;
#pragma unroll
    for (int i = 0; i < 4; ++i) shared.weights[side].of[r].at[i] = sample.weight[i];
  }

  __device__ __forceinline__ void fetch_filters(const Step& step, unsigned char* b) const {
    const int outputs = p.O / p.size.G, group = p.size.C / p.size.G;
    const int c = step.c + piece * DCN_VEC;
    const Scalar* filter = p.filters + step.segment * p.segment + c;
#pragma unroll
    for (int i = 0; i < DCN_OUTPUTS / 32; ++i) {
      const int output = tile.first_output + row + 32 * i;
      const bool valid = output < outputs && c < p.segment;
      const long long at = (static_cast<long long>(tile.g) * outputs + output) * (p.size.kh * p.size.kw) + step.k;
      copy_16_async(piece_of(b, row + 32 * i, piece), valid ? filter + at * group : p.filters, valid);
    }
    commit_copies();
  }

  // Half of the thread's rows at a time, so that few registers hold what is under way.
  __device__ __forceinline__ void load(const Step& step, int side, int half, CornerWords (&corners)[2]) const {
    const int c = step.c + piece * DCN_VEC;
    const int channel = tile.g * (p.size.C / p.size.G) + step.segment * p.segment + c;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int r = row + 32 * (2 * half + i);
      const int first = shared.first[side][r] * p.size.C + channel;
      const Vector<float, 4> weight = shared.weights[side].of[r];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        Words words = {};
        if (c < p.segment && weight.at[j] != 0.0f) {
          const int at = first + (j & 2 ? p.size.W * p.size.C : 0) + (j & 1 ? p.size.C : 0);
          words = *reinterpret_cast<const Words*>(p.input + at);
        }
        corners[i].at[j] = words;
      }
    }
  }

  __device__ __forceinline__ void store(int side, int half, const CornerWords (&corners)[2], unsigned char* a) const {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int r = row + 32 * (2 * half + i);
      const Vector<float, 4> weight = shared.weights[side].of[r];
      Words words;
#pragma unroll
      for (int w = 0; w < 4; ++w) words.at[w] = interpolate_word(corners[i], w, weight.at);
      *reinterpret_cast<Words*>(piece_of(a, r, piece)) = words;
    }
  }
};

// The sums of a block's tile, over its share of the steps.
__device__ __forceinline__ void multiply(const DeformConvFusedParams& p, const BlockTile& tile, SharedMemory& shared,
                                         Product& product) {
  const int begin = static_cast<int>(static_cast<long long>(p.steps) * tile.split / p.splits);
  const int end = static_cast<int>(static_cast<long long>(p.steps) * (tile.split + 1) / p.splits);
  const Loader loader = {p, tile, shared, static_cast<int>(threadIdx.x / kPieces),
                         static_cast<int>(threadIdx.x % kPieces)};
  constexpr int elements = 32 / sizeof(Scalar);  // of a row that a product takes at once
  CornerWords corners[2];
  Step next = find_step(p, begin);
  int side = 0;  // of the weights: sides alternate with taps, those of the tiles with steps
  loader.weigh(next, side);
  loader.fetch_filters(next, shared.b[0]);
  __syncthreads();
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    loader.load(next, side, half, corners);
    loader.store(side, half, corners, shared.a[0]);
  }

  for (int s = begin; s < end; ++s) {
    const int now = (s - begin) & 1;
    const bool more = s + 1 < end;
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
    for (int half = 0; half < 2; ++half) {
      if (more) loader.load(next, side, half, corners);
#pragma unroll
      for (int pair = 2 * half; pair < 2 * half + 2; ++pair) {
        if (pair * elements < channels) product.add(shared.a[now], shared.b[now], pair);
      }
      if (more) loader.store(side, half, corners, shared.a[now ^ 1]);
    }
  }
}

// Writes a slice of sums, the outputs from `first` on of kSlice, to where they belong. The block has to meet before.
__device__ __forceinline__ void write_slice(const DeformConvFusedParams& p, const TilePixel* pixels, float* slice,
                                            bool outputs_together, const BlockTile& tile, int first) {
  const int outputs = p.O / p.size.G, count = min(kSlice, outputs - first), o = tile.g * outputs + first;
  const int P = p.size.oh * p.size.ow;
  if (p.partial) {
    for (int i = threadIdx.x; i < kTileRows * kSlice; i += blockDim.x) {
      const int r = i / kSlice, output = i % kSlice, q = tile.first_row + r;
      if (q < p.rows && output < count) {
        p.partial[(static_cast<long long>(tile.split) * p.rows + q) * p.O + o + output] =
            slice_at(slice, true, r, output);
      }
    }
    return;
  }
  for (int i = threadIdx.x; i < kTileRows * kSlice; i += blockDim.x) {
    // Neighbouring threads have neighbouring outputs, or pixels that are neighbours in a row of the image.
    const int output = outputs_together ? i % kSlice : i / kTileRows;
    const int along = i % kTileRows, across = kTileRows / kBand;
    const int r = outputs_together ? i / kSlice : along % across * kBand + along / across;
    const ImagePixel at = pixels[r].at;
    if (at.image < 0 || output >= count) continue;
    const float bias = p.bias ? widen(p.bias[o + output]) : 0.0f;
    const long long to = outputs_together ? (static_cast<long long>(at.image) * P + at.pixel) * p.O + o + output
                                          : (static_cast<long long>(at.image) * p.O + o + output) * P + at.pixel;
    p.output[to] = narrow<Scalar>(slice_at(slice, outputs_together, r, output) + bias);
  }
}

// Grid: the tiles, those of the same pixels together.
extern "C" __global__ void __launch_bounds__(256, DCN_BLOCKS)
    DCN_KERNEL(deform_conv2d_fused)(const DeformConvFusedParams p) {
  DCN_SHARED_MEMORY(memory);
  SharedMemory& shared = *reinterpret_cast<SharedMemory*>(memory);
  const int tiles = count_block_tiles(p);
  for (int t = blockIdx.x; t < tiles; t += gridDim.x) {
    const BlockTile tile = find_block_tile(p, t);
    if (threadIdx.x < kTileRows) shared.pixels[threadIdx.x] = find_tile_pixel(p, tile.first_row + threadIdx.x);
    __syncthreads();
    Product product;
    multiply(p, tile, shared, product);

    float* slice = reinterpret_cast<float*>(shared.a);
    const bool outputs_together = p.partial || p.channels_last;
#pragma unroll
    for (int i = 0; i < DCN_OUTPUTS / kSlice; ++i) {
      if (tile.first_output + i * kSlice >= p.O / p.size.G) break;
      __syncthreads();
      product.visit([&](int row, int output, float sum) {
        if (output / kSlice == i) slice_at(slice, outputs_together, row, output % kSlice) = sum;
      });
      __syncthreads();
      write_slice(p, shared.pixels, slice, outputs_together, tile, tile.first_output + i * kSlice);
    }
    __syncthreads();
  }
}

// Adds the parts of split sums, always in the same order. Grid: tiles of kTileRows pixels by kSlice outputs.
extern "C" __global__ void __launch_bounds__(256, 2)
    DCN_KERNEL(deform_conv2d_add_splits)(const DeformConvFusedParams p) {
  DCN_SHARED_MEMORY(memory);
  TilePixel* pixels = reinterpret_cast<TilePixel*>(memory);
  float* slice = reinterpret_cast<float*>(pixels + kTileRows);
  DeformConvFusedParams whole = p;
  whole.partial = nullptr;
  const int outputs = p.O / p.size.G, slices = (outputs + kSlice - 1) / kSlice;
  const int tiles = (p.rows + kTileRows - 1) / kTileRows * p.size.G * slices;
  for (int t = blockIdx.x; t < tiles; t += gridDim.x) {
    const int first = t % slices * kSlice;
    const BlockTile tile = {t / slices % p.size.G, t / slices / p.size.G * kTileRows, first, 0};
    if (threadIdx.x < kTileRows) pixels[threadIdx.x] = find_tile_pixel(p, tile.first_row + threadIdx.x);
    for (int i = threadIdx.x; i < kTileRows * kSlice; i += blockDim.x) {
      const int r = i / kSlice, output = i % kSlice, q = tile.first_row + r;
      if (q >= p.rows || first + output >= outputs) continue;
      float sum = 0.0f;
      for (int split = 0; split < p.splits; ++split) {
        sum += p.partial[(static_cast<long long>(split) * p.rows + q) * p.O + tile.g * outputs + first + output];
      }
      slice_at(slice, p.channels_last, r, output) = sum;
    }
    __syncthreads();
    write_slice(whole, pixels, slice, p.channels_last, tile, first);
    __syncthreads();
  }
}
