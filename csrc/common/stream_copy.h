// Copies that leave the caches alone.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace effops {

// Copies bytes to where nobody reads them soon, without first reading what lay there: for outputs larger than
// the caches, which their own end would push out. `to` and `bytes` should be multiples of 16. Other threads
// see the bytes after finish_streams().
inline void stream_copy(const char* from, int64_t bytes, char* to) {
#if defined(__SSE2__)
  if ((reinterpret_cast<uintptr_t>(to) | static_cast<uintptr_t>(bytes)) % sizeof(__m128i) == 0) {
    for (int64_t i = 0; i < bytes; i += sizeof(__m128i)) {
      _mm_stream_si128(reinterpret_cast<__m128i*>(to + i),
                       _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i)));
    }
    return;
  }
#endif
  memcpy(to, from, bytes);
}

inline void finish_streams() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

}  // namespace effops
