// Replaces operator new and delete, also under the sanitizers, whose malloc and free are called.

#include "tests/host_attention/no_memory.h"

#include <cstdlib>
#include <new>
#include <utility>

namespace passel::host {
namespace {

thread_local bool fails = false;

void* Allocate(size_t size) noexcept {
  return std::exchange(fails, false) ? nullptr : std::malloc(size);
}

void* AllocateOrThrow(size_t size) {
  void* p = Allocate(size);
  if (p == nullptr) throw std::bad_alloc();
  return p;
}

}  // namespace

void FailNextAllocation() { fails = true; }

}  // namespace passel::host

void* operator new(size_t size) { return passel::host::AllocateOrThrow(size); }
void* operator new[](size_t size) { return passel::host::AllocateOrThrow(size); }
void* operator new(size_t size, const std::nothrow_t&) noexcept {
  return passel::host::Allocate(size);
}
void* operator new[](size_t size, const std::nothrow_t&) noexcept {
  return passel::host::Allocate(size);
}
void operator delete(void* p) noexcept { std::free(p); }
void operator delete[](void* p) noexcept { std::free(p); }
void operator delete(void* p, size_t) noexcept { std::free(p); }
void operator delete[](void* p, size_t) noexcept { std::free(p); }
void operator delete(void* p, const std::nothrow_t&) noexcept { std::free(p); }
void operator delete[](void* p, const std::nothrow_t&) noexcept { std::free(p); }
