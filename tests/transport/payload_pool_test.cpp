#include "transport/payload_pool.h"

#include <gtest/gtest.h>

#include <cstddef>
#include <utility>
#include <vector>

namespace passel::transport {
namespace {

TEST(PayloadPool, GivesMemoryOfSentFramesAgain) {
  PayloadPool pool;
  EXPECT_TRUE(pool.Take().empty());
  std::vector<std::byte> payload(5000, std::byte{7});
  const std::byte* memory = payload.data();
  const auto owner = std::make_shared<const std::vector<std::byte>>(100);
  OutgoingFrame frame = PayloadPool(pool).Frame({}, std::move(payload), {*owner, *owner}, owner);
  EXPECT_EQ(frame.payload_bytes(), 5200u);
  EXPECT_EQ(owner.use_count(), 2);
  EXPECT_EQ(frame.payload.data(), memory);
  EXPECT_EQ(frame.payload.size(), 5000u);
  EXPECT_TRUE(pool.Take().empty());  // it is under way
  frame.done();
  frame = {};
  EXPECT_EQ(owner.use_count(), 1);
  const std::vector<std::byte> again = pool.Take();
  EXPECT_EQ(again.data(), memory);
  EXPECT_EQ(again, std::vector<std::byte>(5000, std::byte{7}));
}

TEST(PayloadPool, KeepsNoMoreThanItMay) {
  PayloadPool pool;
  pool.Give(std::vector<std::byte>((size_t{1} << 20) + 1));
  EXPECT_EQ(pool.Take().capacity(), 0u);
  for (int i = 0; i < 30; ++i) pool.Give(std::vector<std::byte>(100));
  int kept = 0;
  while (pool.Take().capacity() > 0) ++kept;
  EXPECT_EQ(kept, 16);
}

}  // namespace
}  // namespace passel::transport
