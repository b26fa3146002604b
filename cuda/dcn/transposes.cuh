// Transposes between images [N, C, P] and rows [N * P, C].

#include "dcn/array_job.cuh"

// The unsigned integer of `bytes` bytes.
template <int bytes>
struct WordOf;
template <>
struct WordOf<2> {
  using type = unsigned short;
};
template <>
struct WordOf<4> {
  using type = unsigned;
};
template <>
struct WordOf<8> {
  using type = unsigned long long;
};

// A tile of kSide pixels of an image by kSide channels. It passes through shared memory, where channels are kPitch
// elements apart, so that global memory is read and written in whole lines.
template <typename T>
struct TransposeTile {
  static constexpr int kSide = sizeof(T) == 8 ? 32 : 64;
  static constexpr int kPitch = kSide + (sizeof(T) == 2 ? 2 : 1);
  static constexpr int kVector = 16 / sizeof(T);

  int image, pixel, pixels;  // the first pixel and the number of pixels
  int channel, channels;
  long long row;  // row of the first pixel
  T* memory;

  __device__ __forceinline__ TransposeTile(const ArrayJob& job, int t, unsigned char* shared)
      : memory(reinterpret_cast<T*>(shared)) {
    const int channel_tiles = (job.C + kSide - 1) / kSide, image_tiles = (job.P + kSide - 1) / kSide;
    const int from_first = job.range.first_pixel / kSide + t / channel_tiles;
    image = job.range.first_image + from_first / image_tiles;
    pixel = from_first % image_tiles * kSide;
    // The image's first row, which is negative if the range begins within the image, and the pixel where the range
    // ends.
    row = static_cast<long long>(image - job.range.first_image) * job.P - job.range.first_pixel;
    const long long end = min(static_cast<long long>(job.P), job.range.rows - row);
    const int begin = max(pixel, static_cast<int>(max(-row, 0ll)));
    pixels = static_cast<int>(min(end, static_cast<long long>(pixel + kSide))) - begin;
    pixel = begin;
    row += begin;
    channel = t % channel_tiles * kSide;
    channels = min(kSide, job.C - channel);
  }

  __device__ __forceinline__ T& at(int c, int p) const { return memory[c * kPitch + p]; }

  // Index of the tile's first element in [N, C, P].
  __device__ __forceinline__ long long first(const ArrayJob& job) const {
    return (static_cast<long long>(image) * job.C + channel) * job.P + pixel;
  }
};

template <typename Words, typename T, int count>
__device__ __forceinline__ void store_words(T* to, const Vector<T, count>& from) {
  Words words[sizeof(from) / sizeof(Words)];
  memcpy(words, &from, sizeof from);
#pragma unroll
  for (unsigned i = 0; i < sizeof(from) / sizeof(Words); ++i) reinterpret_cast<Words*>(to)[i] = words[i];
}

template <typename T, int count, typename Words>
__device__ __forceinline__ Vector<T, count> load_words(const T* from) {
  Words words[sizeof(T) * count / sizeof(Words)];
#pragma unroll
  for (unsigned i = 0; i < sizeof(words) / sizeof(Words); ++i) words[i] = reinterpret_cast<const Words*>(from)[i];
  Vector<T, count> vector;
  memcpy(&vector, words, sizeof vector);
  return vector;
}

// Reads a tile of [N, C, P], `width` pixels at a time. A thread issues all its loads before it uses the first.
template <int width, typename T>
__device__ __forceinline__ void read_pixels(const ArrayJob& job, const TransposeTile<T>& tile) {
  using Pixels = Vector<T, width>;
  using Words = typename WordOf<(width * sizeof(T) < 8 ? width * sizeof(T) : (sizeof(T) == 8 ? 8 : 4))>::type;
  constexpr int across = TransposeTile<T>::kSide / width, step = kThreads / across,
                count = TransposeTile<T>::kSide / step;
  const int p = threadIdx.x % across * width, c = threadIdx.x / across;
  const T* source = static_cast<const T*>(job.source) + tile.first(job) + p;
  Pixels pixels[count];
#pragma unroll
  for (int i = 0; i < count; ++i) {
    if (p < tile.pixels && c + i * step < tile.channels) {
      pixels[i] = *reinterpret_cast<const Pixels*>(source + static_cast<long long>(c + i * step) * job.P);
    }
  }
#pragma unroll
  for (int i = 0; i < count; ++i) {
    if (p < tile.pixels && c + i * step < tile.channels) store_words<Words>(&tile.at(c + i * step, p), pixels[i]);
  }
}

template <int width, typename T>
__device__ __forceinline__ void write_pixels(const ArrayJob& job, const TransposeTile<T>& tile) {
  using Pixels = Vector<T, width>;
  using Words = typename WordOf<(width * sizeof(T) < 8 ? width * sizeof(T) : (sizeof(T) == 8 ? 8 : 4))>::type;
  constexpr int across = TransposeTile<T>::kSide / width, step = kThreads / across;
  const int p = threadIdx.x % across * width;
  T* target = static_cast<T*>(job.target) + tile.first(job) + p;
#pragma unroll 1
  for (int c = threadIdx.x / across; c < tile.channels && p < tile.pixels; c += step) {
    const Pixels pixels = load_words<T, width, Words>(&tile.at(c, p));
    *reinterpret_cast<Pixels*>(target + static_cast<long long>(c) * job.P) = pixels;
  }
}

// Calls visit(channel, pixel) for the elements of a tile; consecutive threads get consecutive pixels.
template <typename T, typename Visit>
__device__ __forceinline__ void visit_pixels(const TransposeTile<T>& tile, Visit visit) {
  const unsigned pixels = tile.pixels;
#pragma unroll 1
  for (unsigned i = threadIdx.x; i < pixels * tile.channels; i += blockDim.x) {
    visit(static_cast<int>(i / pixels), static_cast<int>(i % pixels));
  }
}

// The same; consecutive threads get consecutive channels.
template <typename T, typename Visit>
__device__ __forceinline__ void visit_channels(const TransposeTile<T>& tile, Visit visit) {
  const unsigned channels = tile.channels;
#pragma unroll 1
  for (unsigned i = threadIdx.x; i < channels * tile.pixels; i += blockDim.x) {
    visit(static_cast<int>(i % channels), static_cast<int>(i / channels));
  }
}

// The largest number of pixels that every access to the pixels of a tile can move at once.
template <typename T>
__device__ __forceinline__ int pixels_at_once(const ArrayJob& job, const TransposeTile<T>& tile, const void* pixels) {
  const T* first = static_cast<const T*>(pixels) + tile.first(job);
  constexpr int widest = TransposeTile<T>::kVector;
  if (job.P % widest == 0 && tile.pixels % widest == 0 && is_aligned(first, 16)) return widest;
  if (sizeof(T) == 2 && job.P % 2 == 0 && tile.pixels % 2 == 0 && is_aligned(first, 4)) return 2;
  return 1;
}

template <typename T>
__device__ __forceinline__ T round_if(T value, bool) {
  return value;
}
template <>
__device__ __forceinline__ float round_if<float>(float value, bool rounds) {
  return rounds ? round_to_tf32(value) : value;
}

template <typename T>
__device__ __forceinline__ void pixels_to_rows(const ArrayJob& job, int t, unsigned char* shared) {
  using Tile = TransposeTile<T>;
  const Tile tile(job, t, shared);
  const bool rounds = job.task == kPixelsToRoundedRows;
  const int width = pixels_at_once(job, tile, job.source);
  if (width == Tile::kVector) {
    read_pixels<Tile::kVector>(job, tile);
  } else if (width == 2) {
    read_pixels<2>(job, tile);
  } else {
    const T* source = static_cast<const T*>(job.source) + tile.first(job);
    visit_pixels(tile, [&](int c, int p) { tile.at(c, p) = source[static_cast<long long>(c) * job.P + p]; });
  }
  __syncthreads();
  T* target = static_cast<T*>(job.target) + tile.row * job.C + tile.channel;
  if (job.C % Tile::kVector == 0 && is_aligned(target, 16)) {
    constexpr int across = Tile::kSide / Tile::kVector;
    const int c = threadIdx.x % across * Tile::kVector;
#pragma unroll 1
    for (int r = threadIdx.x / across; r < tile.pixels && c < tile.channels; r += blockDim.x / across) {
      Vector<T, Tile::kVector> channels;
#pragma unroll
      for (int e = 0; e < Tile::kVector; ++e) channels.at[e] = round_if(tile.at(c + e, r), rounds);
      *reinterpret_cast<Vector<T, Tile::kVector>*>(target + static_cast<long long>(r) * job.C + c) = channels;
    }
  } else {
    visit_channels(
        tile, [&](int c, int p) { target[static_cast<long long>(p) * job.C + c] = round_if(tile.at(c, p), rounds); });
  }
  __syncthreads();
}

template <typename T>
__device__ __forceinline__ void rows_to_pixels(const ArrayJob& job, int t, unsigned char* shared) {
  using Tile = TransposeTile<T>;
  using Sum = Accumulator<T>;
  constexpr int vector = 16 / sizeof(Sum);
  const Tile tile(job, t, shared);
  const Sum* source = static_cast<const Sum*>(job.source) + tile.row * job.C + tile.channel;
  if (job.C % vector == 0 && is_aligned(source, 16)) {
    using Sums = Vector<Sum, vector>;
    constexpr int across = Tile::kSide / vector, step = kThreads / across, count = Tile::kSide / step;
    const int c = threadIdx.x % across * vector, r = threadIdx.x / across;
    Sums sums[count];
#pragma unroll
    for (int i = 0; i < count; ++i) {
      if (c < tile.channels && r + i * step < tile.pixels) {
        sums[i] = *reinterpret_cast<const Sums*>(source + static_cast<long long>(r + i * step) * job.C + c);
      }
    }
#pragma unroll
    for (int i = 0; i < count; ++i) {
      if (c < tile.channels && r + i * step < tile.pixels) {
#pragma unroll
        for (int e = 0; e < vector; ++e) {
          tile.at(c + e, r + i * step) = narrow<T>(sums[i].at[e]);
        }
      }
    }
  } else {
    visit_channels(tile,
                   [&](int c, int p) { tile.at(c, p) = narrow<T>(source[static_cast<long long>(p) * job.C + c]); });
  }
  __syncthreads();
  const int width = pixels_at_once(job, tile, job.target);
  if (width == Tile::kVector) {
    write_pixels<Tile::kVector>(job, tile);
  } else if (width == 2) {
    write_pixels<2>(job, tile);
  } else {
    T* target = static_cast<T*>(job.target) + tile.first(job);
    visit_pixels(tile, [&](int c, int p) { target[static_cast<long long>(c) * job.P + p] = tile.at(c, p); });
  }
  __syncthreads();
}

// Whole images of few pixels, such as filters with their taps as pixels. A tile has as many channels of an image as fit
// in shared memory, in the order [C, P].
template <typename T>
struct SmallImages {
  static constexpr int kVector = 16 / sizeof(T);

  static __device__ __forceinline__ bool fit(const ArrayJob& job) {
    return job.P <= TransposeTile<T>::kSide / 2 && job.range.first_pixel == 0 && job.range.rows % job.P == 0;
  }

  int image, channel, channels;  // image: counted from the first of the range
  long long first;               // index in [N, C, P]

  __device__ __forceinline__ SmallImages(const ArrayJob& job, int t) {
    constexpr int elements = TransposeTile<T>::kSide * TransposeTile<T>::kSide;
    const int most = elements / job.P / kVector * kVector, channel_tiles = (job.C + most - 1) / most;
    image = t / channel_tiles;
    channel = t % channel_tiles * most;
    channels = min(most, job.C - channel);
    first = (static_cast<long long>(job.range.first_image + image) * job.C + channel) * job.P;
  }

  // Index of the tile's first element in [rows, C].
  __device__ __forceinline__ long long first_of_rows(const ArrayJob& job) const {
    return static_cast<long long>(image) * job.P * job.C + channel;
  }
};

template <typename T>
__device__ __forceinline__ void copy_elements(T* to, const T* from, int count) {
  using Elements = Vector<T, 16 / sizeof(T)>;
  constexpr int vector = 16 / sizeof(T);
  const int in_vectors = is_aligned(from, 16) && is_aligned(to, 16) ? count / vector * vector : 0;
#pragma unroll 1
  for (int i = threadIdx.x * vector; i < in_vectors; i += blockDim.x * vector) {
    *reinterpret_cast<Elements*>(to + i) = *reinterpret_cast<const Elements*>(from + i);
  }
#pragma unroll 1
  for (int i = in_vectors + threadIdx.x; i < count; i += blockDim.x) to[i] = from[i];
}

template <typename T>
__device__ __forceinline__ void small_pixels_to_rows(const ArrayJob& job, int t, unsigned char* shared) {
  constexpr int vector = SmallImages<T>::kVector;
  const SmallImages<T> tile(job, t);
  const bool rounds = job.task == kPixelsToRoundedRows;
  T* memory = reinterpret_cast<T*>(shared);
  copy_elements(memory, static_cast<const T*>(job.source) + tile.first, tile.channels * job.P);
  __syncthreads();
  T* target = static_cast<T*>(job.target) + tile.first_of_rows(job);
  const bool is_vector = job.C % vector == 0 && is_aligned(target, 16);
  const unsigned width = is_vector ? vector : 1, across = tile.channels / width;
#pragma unroll 1
  for (unsigned i = threadIdx.x; i < across * job.P; i += blockDim.x) {
    const unsigned p = i / across, c = i % across * width;
    const T* elements = memory + c * job.P + p;
    T* to = target + static_cast<long long>(p) * job.C + c;
    if (is_vector) {
      Vector<T, vector> channels;
#pragma unroll
      for (int e = 0; e < vector; ++e) channels.at[e] = round_if(elements[e * job.P], rounds);
      *reinterpret_cast<Vector<T, vector>*>(to) = channels;
    } else {
      *to = round_if(*elements, rounds);
    }
  }
  __syncthreads();
}

template <typename T>
__device__ __forceinline__ void small_rows_to_pixels(const ArrayJob& job, int t, unsigned char* shared) {
  using Sum = Accumulator<T>;
  const SmallImages<T> tile(job, t);
  T* memory = reinterpret_cast<T*>(shared);
  const Sum* source = static_cast<const Sum*>(job.source) + tile.first_of_rows(job);
  const unsigned across = tile.channels;
#pragma unroll 4
  for (unsigned i = threadIdx.x; i < across * job.P; i += blockDim.x) {
    const unsigned p = i / across, c = i % across;
    memory[c * job.P + p] = narrow<T>(source[static_cast<long long>(p) * job.C + c]);
  }
  __syncthreads();
  copy_elements(static_cast<T*>(job.target) + tile.first, const_cast<const T*>(memory), tile.channels * job.P);
  __syncthreads();
}

// Images of one pixel, which have the same order as rows. Tile: kSide * kSide elements.
template <typename T, typename From>
__device__ __forceinline__ void copy_rows(const ArrayJob& job, int t) {
  constexpr unsigned elements = TransposeTile<T>::kSide * TransposeTile<T>::kSide, vector = 16 / sizeof(From);
  const bool to_rows = job.task != kRowsToPixels, rounds = job.task == kPixelsToRoundedRows;
  const long long skipped = static_cast<long long>(job.range.first_image) * job.C;
  const long long all = static_cast<long long>(job.range.rows) * job.C, begin = static_cast<long long>(t) * elements;
  const From* source = static_cast<const From*>(job.source) + begin + (to_rows ? skipped : 0);
  T* target = static_cast<T*>(job.target) + begin + (to_rows ? 0 : skipped);
  const unsigned count = static_cast<unsigned>(min(all - begin, static_cast<long long>(elements)));
  const auto converted = [&](From value) {
    if constexpr (sizeof(From) == sizeof(T)) {
      if (to_rows) return round_if(value, rounds);
    }
    return narrow<T>(widen(value));
  };
  const unsigned in_vectors =
      is_aligned(source, 16) && is_aligned(target, vector * sizeof(T)) ? count / vector * vector : 0;
#pragma unroll 1
  for (unsigned i = threadIdx.x * vector; i < in_vectors; i += blockDim.x * vector) {
    const auto values = *reinterpret_cast<const Vector<From, vector>*>(source + i);
    Vector<T, vector> results;
#pragma unroll
    for (unsigned e = 0; e < vector; ++e) results.at[e] = converted(values.at[e]);
    *reinterpret_cast<Vector<T, vector>*>(target + i) = results;
  }
#pragma unroll 1
  for (unsigned i = in_vectors + threadIdx.x; i < count; i += blockDim.x) target[i] = converted(source[i]);
}

// Transposes of whole images in the type of sums, for filters in mixed precision. They are small, so that the cache
// holds what consecutive threads read at a distance. Tile: kWideTileElements elements of the target.
constexpr int kWideTileElements = 4096;

template <typename T>
__device__ __forceinline__ void wide_pixels_to_rows(const ArrayJob& job, int t) {
  const Accumulator<T>* source = static_cast<const Accumulator<T>*>(job.source);
  T* target = static_cast<T*>(job.target);
  const long long all = static_cast<long long>(job.range.rows) * job.C;
#pragma unroll 1
  for (int e = threadIdx.x; e < kWideTileElements; e += blockDim.x) {
    const long long i = static_cast<long long>(t) * kWideTileElements + e;
    if (i >= all) return;
    const unsigned row = static_cast<unsigned>(i / job.C), c = static_cast<unsigned>(i % job.C);
    const unsigned image = row / job.P, p = row % job.P;
    target[i] = narrow<T>(source[(static_cast<long long>(image) * job.C + c) * job.P + p]);
  }
}

template <typename Sum>
__device__ __forceinline__ void rows_to_wide_pixels(const ArrayJob& job, int t) {
  const Sum* source = static_cast<const Sum*>(job.source);
  Sum* target = static_cast<Sum*>(job.target);
  const long long all = static_cast<long long>(job.range.rows) * job.C;
#pragma unroll 1
  for (int e = threadIdx.x; e < kWideTileElements; e += blockDim.x) {
    const long long i = static_cast<long long>(t) * kWideTileElements + e;
    if (i >= all) return;
    const unsigned channel = static_cast<unsigned>(i / job.P), p = static_cast<unsigned>(i % job.P);
    const unsigned image = channel / job.C, c = channel % job.C;
    target[i] = source[(static_cast<long long>(image) * job.P + p) * job.C + c];
  }
}
