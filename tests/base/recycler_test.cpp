#include "runtime/base/recycler.h"

#include <gtest/gtest.h>

#include <thread>
#include <vector>

namespace passel {
namespace {

using Memory = std::vector<int>;
uint64_t Ints(const Memory& memory) { return memory.size(); }

TEST(Recycler, GivesWhatCameBackAsItWasLeft) {
  Recycler<Memory> recycler(2, 100, Ints);
  auto first = recycler.Take();
  EXPECT_TRUE(first->empty());
  first->assign(7, 1);
  const int* data = first->data();
  first.reset();
  const auto again = recycler.Take();
  EXPECT_EQ(again->size(), 7u);
  EXPECT_EQ(again->data(), data);
  EXPECT_TRUE(recycler.Take()->empty());  // that one is still in use
}

TEST(Recycler, KeepsNoMoreAndNoneLargerThanTold) {
  Recycler<Memory> recycler(2, 100, Ints);
  {
    std::vector<std::shared_ptr<Memory>> taken;
    for (int i = 0; i < 3; ++i) taken.push_back(recycler.Take());
    for (auto& memory : taken) memory->assign(100, 1);
  }
  const auto a = recycler.Take(), b = recycler.Take(), c = recycler.Take();
  EXPECT_EQ(a->size() + b->size() + c->size(), 200u);
  {
    const auto large = recycler.Take();
    large->assign(101, 1);
  }
  EXPECT_TRUE(recycler.Take()->empty());
}

TEST(Recycler, OfManyThreadsAndNoLongerThere) {
  std::shared_ptr<Memory> last;
  {
    Recycler<Memory> recycler(4, 100, Ints);
    std::vector<std::jthread> threads;
    for (int t = 0; t < 4; ++t) {
      threads.emplace_back([&recycler, t] {
        for (int i = 0; i < 1000; ++i) {
          const auto memory = recycler.Take();
          memory->assign(10, t);
          ASSERT_EQ(memory->front() + memory->back(), 2 * t);
        }
      });
    }
    threads.clear();
    last = recycler.Take();
  }
  EXPECT_EQ(last->size(), 10u);
  last.reset();
}

}  // namespace
}  // namespace passel
