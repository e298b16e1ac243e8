#include "transport/buffer_pool.h"

#include <gtest/gtest.h>

#include <cstdint>
#include <utility>
#include <vector>

#include "runtime/base/error.h"

namespace passel::transport {
namespace {

constexpr uint64_t kMiB = 1u << 20;

TEST(BufferPool, AlignsAndRoundsUp) {
  BufferPool pool(64 * kMiB, kMiB);
  for (const uint64_t bytes : {uint64_t{1}, uint64_t{4097}, 3 * kMiB, 16 * kMiB}) {
    auto buffer = pool.TryAcquire(bytes);
    ASSERT_NE(buffer.data, nullptr) << bytes;
    EXPECT_GE(buffer.bytes, bytes);
    EXPECT_EQ(reinterpret_cast<uintptr_t>(buffer.data.get()) % 64, 0u);
    pool.Release(std::move(buffer));
  }
  EXPECT_EQ(pool.used_bytes(), 0u);
}

TEST(BufferPool, RefusesAboveTheLimitUntilSomethingComesBack) {
  BufferPool pool(3 * kMiB, 3 * kMiB);
  auto a = pool.TryAcquire(2 * kMiB);
  ASSERT_NE(a.data, nullptr);
  EXPECT_EQ(pool.TryAcquire(2 * kMiB).data, nullptr);
  EXPECT_NE(pool.Acquire(2 * kMiB).data, nullptr) << "Acquire knows no limit";
  BufferPool other(3 * kMiB, 3 * kMiB);
  auto b = other.TryAcquire(2 * kMiB);
  const auto* address = b.data.get();
  other.Release(std::move(b));
  EXPECT_EQ(other.TryAcquire(2 * kMiB).data.get(), address) << "a kept buffer is used again";
  pool.Release(std::move(a));
}

TEST(BufferPool, KeepsNoMoreThanItMay) {
  BufferPool pool(64 * kMiB, 2 * kMiB);
  std::vector<BufferPool::Buffer> buffers;
  for (int i = 0; i < 5; ++i) buffers.push_back(pool.TryAcquire(kMiB));
  for (auto& b : buffers) pool.Release(std::move(b));
  EXPECT_EQ(pool.kept_bytes(), 2 * kMiB);
  EXPECT_EQ(pool.used_bytes(), 0u);
}

TEST(BufferPool, ABufferAboveTheLargestFrameIsABug) {
  BufferPool pool(64 * kMiB, kMiB);
  EXPECT_THROW(pool.Acquire(16 * kMiB + 1), Error);
}

}  // namespace
}  // namespace passel::transport
