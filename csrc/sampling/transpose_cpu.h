// Copies between maps, whose channels may lie far apart, and rows of channels that lie next to each
// other. Included by ISA files only.
#pragma once

#include "../common/transpose_block.h"

namespace effops::sampling {
namespace {

using namespace effops::simd;

constexpr int64_t kRun =
    64;  // pixels of a channel read at a time: few streams, and rows that stay in the cache

// `pixels` rows of `channels` channels, from anywhere to rows that are `padded` apart and end with zeros.
template <typename T>
EFFOPS_INLINE void pack_rows(const T* from, int64_t pixel_stride, int64_t channel_stride, int64_t pixels,
                             int64_t channels, int64_t padded, T* to) {
  const bool blocks = pixel_stride == 1 && channel_stride != 1 && pixels >= kBlock;
  const int64_t block_pixels = blocks ? pixels : 0;
  const int64_t block_channels = blocks ? channels / kBlock * kBlock : 0;
  for (int64_t run = 0; run < block_pixels; run += kRun) {
    const int64_t end = run + kRun < block_pixels ? run + kRun : block_pixels;
    for (int64_t c = 0; c < block_channels; c += kBlock) {
      for (int64_t next = run; next < end; next += kBlock) {
        const int64_t p = next + kBlock <= pixels ? next : pixels - kBlock;  // the last block may overlap
        transpose_block(from + c * channel_stride + p, channel_stride, to + p * padded + c, padded);
      }
    }
  }
  if (block_pixels == pixels && block_channels == padded) return;
  for (int64_t p = 0; p < pixels; ++p) {
    const T* pixel = from + p * pixel_stride;
    T* row = to + p * padded;
    int64_t c = p < block_pixels ? block_channels : 0;
    if (channel_stride == 1) {
      for (; c < channels; ++c) row[c] = pixel[c];
    } else {
      for (; c < channels; ++c) row[c] = pixel[c * channel_stride];
    }
    for (c = channels; c < padded; ++c) row[c] = T{};
  }
}

// The reverse, rounded to T: to[c * channel_stride + p] = from[p * padded + c].
template <typename T>
EFFOPS_INLINE void unpack_rows(const accumulator_t<T>* from, int64_t padded, int64_t pixels, int64_t channels,
                               T* to, int64_t channel_stride) {
  using A = accumulator_t<T>;
  const int64_t block_pixels = padded > 1 ? pixels / kBlock * kBlock : 0;
  const int64_t block_channels = padded > 1 ? channels / kBlock * kBlock : 0;
  A block[kBlock * kBlock];
  for (int64_t c = 0; c < block_channels; c += kBlock) {
    for (int64_t p = 0; p < block_pixels; p += kBlock) {
      transpose_block(from + p * padded + c, padded, block, kBlock);
      for (int i = 0; i < kBlock; ++i) {
        T* run = to + (c + i) * channel_stride + p;
        for (int j = 0; j < kBlock; ++j) run[j] = narrow<T>(block[i * kBlock + j]);
      }
    }
  }
  for (int64_t c = 0; c < channels; ++c) {
    T* run = to + c * channel_stride;
    for (int64_t p = c < block_channels ? block_pixels : 0; p < pixels; ++p) {
      run[p] = narrow<T>(from[p * padded + c]);
    }
  }
}

}  // namespace
}  // namespace effops::sampling
