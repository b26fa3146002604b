// Rows: the pixels of all images [N, P], numbered consecutively.

// Consecutive rows from pixel first_pixel of image first_image on, possibly of several images.
struct RowRange {
  int first_image, first_pixel;
  int rows;
};

struct ImagePixel {
  int image, pixel;
};

// 32-bit arithmetic suffices: an image has fewer than 2^31 pixels, and a range fewer than 2^31 rows.
__device__ __forceinline__ ImagePixel find_pixel(const RowRange& range, int row, int pixels) {
  const unsigned from_first = static_cast<unsigned>(range.first_pixel) + static_cast<unsigned>(row);
  return {range.first_image + static_cast<int>(from_first / pixels), static_cast<int>(from_first % pixels)};
}

// Divides numbers below 2^31 by a divisor from 1 to 2^31 - 1 that is known before the launch.
struct Divisor {
  unsigned value, magic, shift;  // magic = 2^32 * (2^shift - value) / value + 1, rounded down; 2^shift >= value
};

struct Division {
  unsigned quotient, remainder;
};

__device__ __forceinline__ Division divide(unsigned number, const Divisor& by) {
  const unsigned quotient = (__umulhi(number, by.magic) + number) >> by.shift;
  return {quotient, number - quotient * by.value};
}
