// Replaces operator new and delete, also under the sanitizers, whose malloc and free are called.

#include "tests/model/allocations.h"

#include <malloc.h>

#include <atomic>
#include <cstdlib>
#include <new>

namespace passel {
namespace {

std::atomic<int64_t> allocated{0}, peak{0};

void* Allocate(size_t size) noexcept {
  void* p = std::malloc(size);
  if (p == nullptr) return nullptr;
  const int64_t now = allocated += static_cast<int64_t>(::malloc_usable_size(p));
  int64_t most = peak;
  while (now > most && !peak.compare_exchange_weak(most, now)) {
  }
  return p;
}

void Free(void* p) noexcept {
  allocated -= static_cast<int64_t>(::malloc_usable_size(p));
  std::free(p);
}

void* AllocateOrThrow(size_t size) {
  void* p = Allocate(size);
  if (p == nullptr) throw std::bad_alloc();
  return p;
}

}  // namespace

int64_t AllocatedBytes() { return allocated; }
int64_t PeakAllocatedBytes() { return peak; }
void ResetPeak() { peak = allocated.load(); }

}  // namespace passel

void* operator new(size_t size) { return passel::AllocateOrThrow(size); }
void* operator new[](size_t size) { return passel::AllocateOrThrow(size); }
void* operator new(size_t size, const std::nothrow_t&) noexcept { return passel::Allocate(size); }
void* operator new[](size_t size, const std::nothrow_t&) noexcept { return passel::Allocate(size); }
void operator delete(void* p) noexcept { passel::Free(p); }
void operator delete[](void* p) noexcept { passel::Free(p); }
void operator delete(void* p, size_t) noexcept { passel::Free(p); }
void operator delete[](void* p, size_t) noexcept { passel::Free(p); }
void operator delete(void* p, const std::nothrow_t&) noexcept { passel::Free(p); }
void operator delete[](void* p, const std::nothrow_t&) noexcept { passel::Free(p); }
