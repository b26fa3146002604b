// Loads and stores of DCN_VEC consecutive channels.

#include "dcn/types.cuh"

using Scalar = DCN_SCALAR;
using ScalarVector = Vector<Scalar, DCN_VEC>;

__device__ __forceinline__ ScalarVector load_vector(const Scalar* at) {
  ScalarVector value;
  if constexpr (sizeof(ScalarVector) == 16) {
    const uint4 words = *reinterpret_cast<const uint4*>(at);
    memcpy(&value, &words, 16);
  } else {
    value = *reinterpret_cast<const ScalarVector*>(at);
  }
  return value;
}

__device__ __forceinline__ void store_vector(Scalar* to, const ScalarVector& value) {
  if constexpr (sizeof(ScalarVector) == 16) {
    unsigned words[4];
    memcpy(words, &value, 16);
    store_16(to, words);
  } else {
    *reinterpret_cast<ScalarVector*>(to) = value;
  }
}

// Zeros if not valid.
__device__ __forceinline__ ScalarVector load_vector_if(const Scalar* from, bool valid) {
  ScalarVector value = {};
  if constexpr (sizeof(ScalarVector) == 16) {
    unsigned words[4];
    load_16_if(words, from, valid);
    memcpy(&value, words, 16);
  } else {
    if (valid) value = *reinterpret_cast<const ScalarVector*>(from);
  }
  return value;
}
