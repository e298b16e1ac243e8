#pragma once

#include <cstddef>

namespace passel::host {

// Asks memory for the lines of an object that is read, or of one whose first line is written next
// (a count of references that another core had last). Any address may be given.
template <typename T>
inline void PrefetchToRead(const T* objects, size_t count = 1) {
  for (size_t at = 0; at < count * sizeof(T); at += 64) {
    __builtin_prefetch(reinterpret_cast<const char*>(objects) + at);
  }
}
inline void PrefetchToWrite(const void* object) {
  asm volatile("prefetchw %0" : : "m"(*static_cast<const char*>(object)));
}

}  // namespace passel::host
