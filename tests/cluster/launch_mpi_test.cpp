// Run by mpirun with several ranks; every rank runs every test, so their calls match.
#include <gtest/gtest.h>
#include <mpi.h>
#include <sched.h>
#include <unistd.h>

#include <bit>
#include <cmath>
#include <cstring>
#include <numeric>
#include <set>
#include <string>

#include "cluster/launch.h"
#include "cluster/mpi_collectives.h"
#include "cluster/mpi_util.h"
#include "runtime/base/random.h"

namespace passel::cluster {
namespace {

Launch* launch = nullptr;  // main's; MPI is initialised once a process

struct Outcome {
  int error_class = 0;  // 0: none
  bool silent = false;
  char message[256] = "";
};

// How `step` ended on every rank.
std::vector<Outcome> OutcomesOf(const std::function<void()>& step) {
  Outcome mine;
  try {
    step();
  } catch (const Error& e) {
    mine.error_class = e.exit_code();
    mine.silent = dynamic_cast<const SilentError*>(&e) != nullptr;
    std::strncpy(mine.message, e.what(), sizeof(mine.message) - 1);
  }
  return AllGatherValues(mine, launch->world_size(), MPI_COMM_WORLD);
}

// One rank says `message`, all others are silent, all with the same class.
void ExpectOneMessage(const std::vector<Outcome>& all, ErrorClass error_class, int rank,
                      const std::string& part) {
  for (size_t r = 0; r < all.size(); ++r) {
    EXPECT_EQ(all[r].error_class, static_cast<int>(error_class)) << "rank " << r;
    EXPECT_EQ(all[r].silent, static_cast<int>(r) != rank) << "rank " << r << all[r].message;
  }
  EXPECT_NE(std::string(all[static_cast<size_t>(rank)].message).find(part), std::string::npos)
      << all[static_cast<size_t>(rank)].message;
}

void ThrowOn(int rank, ErrorClass error_class, const char* message) {
  if (launch->world_rank() == rank) throw Error(error_class, message);
}

TEST(Agree, NothingHappensWhereAllSucceed) {
  int runs = 0;
  for (const Outcome& outcome : OutcomesOf([&] { launch->Agree([&] { ++runs; }); })) {
    EXPECT_EQ(outcome.error_class, 0);
  }
  EXPECT_EQ(runs, 1);
}

TEST(Agree, OneErrorIsOneMessageAndOneClassEverywhere) {
  ExpectOneMessage(
      OutcomesOf([] { launch->Agree([] { ThrowOn(1, ErrorClass::kModel, "no such model"); }); }),
      ErrorClass::kModel, 1, "no such model");
}

TEST(Agree, TheLowestFailingRankSpeaks) {
  ExpectOneMessage(OutcomesOf([] {
                     launch->Agree([] {
                       ThrowOn(1, ErrorClass::kMemory, "one");
                       ThrowOn(2, ErrorClass::kIo, "two");
                     });
                   }),
                   ErrorClass::kMemory, 1, "one");
}

TEST(Agree, OtherExceptionsAreBugsOrMemory) {
  ExpectOneMessage(OutcomesOf([] {
                     launch->Agree([] {
                       if (launch->world_rank() == 2) throw std::runtime_error("surprise");
                     });
                   }),
                   ErrorClass::kBug, 2, "surprise");
  ExpectOneMessage(OutcomesOf([] {
                     launch->Agree([] {
                       if (launch->world_rank() == 0) throw std::bad_alloc();
                     });
                   }),
                   ErrorClass::kMemory, 0, "rank 0 ran out of memory");
}

// Agree within Agree: the silent errors of the inner one do not hide its message.
TEST(Agree, Nests) {
  ExpectOneMessage(
      OutcomesOf([] {
        launch->Agree([] { launch->Agree([] { ThrowOn(2, ErrorClass::kIo, "inner"); }); });
      }),
      ErrorClass::kIo, 2, "inner");
}

TEST(AssignRoles, ByCount) {
  const auto ranks = launch->AssignRoles(1, std::nullopt, 42);
  ASSERT_EQ(ranks.size(), static_cast<size_t>(launch->world_size()));
  std::set<int64_t> pids;
  for (size_t r = 0; r < ranks.size(); ++r) {
    EXPECT_EQ(ranks[r].rank.value, static_cast<int32_t>(r));
    EXPECT_EQ(ranks[r].role, r == 0 ? Role::kModel : Role::kHost);
    EXPECT_EQ(ranks[r].index, r == 0 ? 0 : r - 1);
    EXPECT_EQ(ranks[r].node_host_ranks, ranks.size() - 1);  // mpirun without hosts: one node
    EXPECT_FALSE(ranks[r].node.empty());
    pids.insert(ranks[r].pid);
  }
  EXPECT_EQ(pids.size(), ranks.size());
  EXPECT_EQ(ranks[static_cast<size_t>(launch->world_rank())].pid, getpid());
}

TEST(AssignRoles, AllMayBeModelRanks) {
  for (const RankInfo& info :
       launch->AssignRoles(static_cast<uint32_t>(launch->world_size()), std::nullopt, 1)) {
    EXPECT_EQ(info.role, Role::kModel);
    EXPECT_EQ(info.index, static_cast<uint32_t>(info.rank.value));
    EXPECT_EQ(info.node_host_ranks, 0u);
  }
}

TEST(AssignRoles, ByCommandLine) {
  const bool model = launch->world_rank() == 0 || launch->world_rank() == 2;
  const auto ranks = launch->AssignRoles(1, model ? Role::kModel : Role::kHost, 42);
  EXPECT_EQ(ranks[1].role, Role::kHost);
  EXPECT_EQ(ranks[1].index, 0u);
  EXPECT_EQ(ranks[2].role, Role::kModel);
  EXPECT_EQ(ranks[2].index, 1u);
  EXPECT_EQ(ranks[0].node_host_ranks, 1u);
}

TEST(AssignRoles, TooFewRanks) {
  ExpectOneMessage(OutcomesOf([] { launch->AssignRoles(5, std::nullopt, 42); }),
                   ErrorClass::kCluster, 0,
                   "mpirun started 3 ranks; expected at least 5 (cluster.model_ranks is 5)");
}

TEST(AssignRoles, DifferentConfigsAreNamed) {
  const auto hash = [](int odd) { return uint64_t{launch->world_rank() == odd ? 7u : 42u}; };
  ExpectOneMessage(OutcomesOf([&] { launch->AssignRoles(1, std::nullopt, hash(2)); }),
                   ErrorClass::kUsage, 0, "the config of rank 2 (node ");
  ExpectOneMessage(OutcomesOf([&] { launch->AssignRoles(1, std::nullopt, hash(0)); }),
                   ErrorClass::kUsage, 0, "the config of ranks 1 and 2 (node ");
}

TEST(AssignRoles, RolesAreGivenToAllOrNone) {
  ExpectOneMessage(OutcomesOf([] {
                     launch->AssignRoles(1,
                                         launch->world_rank() == 1
                                             ? std::optional<Role>()
                                             : std::optional<Role>(Role::kModel),
                                         42);
                   }),
                   ErrorClass::kUsage, 0, "rank 1 started without --role");
  ExpectOneMessage(OutcomesOf([] { launch->AssignRoles(1, Role::kHost, 42); }), ErrorClass::kUsage,
                   0, "expected the model ranks first");
}

TEST(AssignRoles, RanksKnowWhoSharesTheirCpus) {
  cpu_set_t all;
  ASSERT_EQ(sched_getaffinity(0, sizeof(all), &all), 0);
  for (const RankInfo& r : launch->AssignRoles(1, std::nullopt, 42)) {
    EXPECT_EQ(r.cpu_group, RankId(0));
  }
  std::vector<int> cpus;
  for (int i = 0; i < CPU_SETSIZE; ++i) {
    if (CPU_ISSET(i, &all)) cpus.push_back(i);
  }
  if (cpus.size() < 2) GTEST_SKIP() << "needs two CPUs";
  cpu_set_t one;
  CPU_ZERO(&one);
  CPU_SET(cpus[static_cast<size_t>(launch->world_rank() % 2)], &one);
  ASSERT_EQ(sched_setaffinity(0, sizeof(one), &one), 0);
  const auto ranks = launch->AssignRoles(1, std::nullopt, 42);
  ASSERT_EQ(sched_setaffinity(0, sizeof(all), &all), 0);
  for (size_t r = 0; r < ranks.size(); ++r) {
    EXPECT_EQ(ranks[r].cpu_group, RankId(static_cast<int32_t>(r % 2)));
  }
}

TEST(Exchange, EveryRankLearnsAddressesOfAnyLengthAndOneNonce) {
  auto ranks = launch->AssignRoles(1, std::nullopt, 42);
  const auto me = static_cast<size_t>(launch->world_rank());
  const auto length = [](size_t r) { return r == 1 ? 0 : 100 + r * 1000; };
  const std::vector<std::byte> address(length(me), static_cast<std::byte>(me + 1));
  const uint64_t nonce =
      launch->Exchange(ranks, static_cast<uint32_t>(10 + me), (uint64_t{1} << 40) + me, address);
  for (size_t r = 0; r < ranks.size(); ++r) {
    EXPECT_EQ(ranks[r].threads, 10 + r);
    EXPECT_EQ(ranks[r].memory_bytes, (uint64_t{1} << 40) + r);
    EXPECT_EQ(ranks[r].address, std::vector<std::byte>(length(r), static_cast<std::byte>(r + 1)));
  }
  EXPECT_NE(nonce, 0u);
  for (const uint64_t other : AllGatherValues(nonce, launch->world_size(), MPI_COMM_WORLD)) {
    EXPECT_EQ(other, nonce);
  }
  EXPECT_NE(launch->Exchange(ranks, 1, 0, address), nonce);
}

TEST(Collectives, OfTheModelRanksAlone) {
  const auto ranks = launch->AssignRoles(2, std::nullopt, 42);
  const auto collectives = launch->MakeModelCollectives(ranks);
  if (launch->world_rank() == 2) {
    EXPECT_EQ(collectives, nullptr);
    return;
  }
  ASSERT_NE(collectives, nullptr);
  EXPECT_EQ(collectives->rank(), launch->world_rank());
  EXPECT_EQ(collectives->size(), 2);
  std::vector<float> data{1.0f, static_cast<float>(launch->world_rank())};
  collectives->AllReduceSum(data);
  EXPECT_EQ(data, (std::vector<float>{2, 1}));
}

float Value(int rank, size_t i) {
  Random random((uint64_t{static_cast<uint32_t>(rank)} << 32) + i);
  return static_cast<float>(random.Normal() * std::exp2(static_cast<double>(random.Next() % 30)));
}

TEST(Collectives, SumsInRankOrderToTheBit) {
  MpiCollectives collectives(MPI_COMM_WORLD);
  size_t order_matters = 0;
  for (const size_t n : {0, 1, 2, 3, 1000, 70'001, (4 << 20) + 5}) {
    std::vector<float> data(n);
    const size_t step = n > 100'000 ? 4099 : 1;  // the largest: a sample of its elements
    for (size_t i = 0; i < n; i += step) data[i] = Value(collectives.rank(), i);
    collectives.AllReduceSum(data);
    size_t wrong = 0;
    for (size_t i = 0; i < n; i += step) {
      const float a = Value(0, i), b = Value(1, i), c = Value(2, i);
      wrong += std::bit_cast<uint32_t>(data[i]) != std::bit_cast<uint32_t>((a + b) + c);
      order_matters += (a + b) + c != a + (b + c);
    }
    EXPECT_EQ(wrong, 0u) << n << " elements";
  }
  EXPECT_GT(order_matters, 100u);
}

TEST(Collectives, GathersUnequalParts) {
  MpiCollectives collectives(MPI_COMM_WORLD);
  const std::vector<size_t> counts{3, 0, 70'000};
  const auto me = static_cast<size_t>(collectives.rank());
  const std::vector<float> in(counts[me], static_cast<float>(me));
  std::vector<float> out(70'003, -1);
  collectives.AllGather(in, counts, out);
  EXPECT_EQ(out[2], 0);
  EXPECT_EQ(std::accumulate(out.begin(), out.end(), 0.0), 140'000.0);
  EXPECT_THROW(collectives.AllGather(in, counts, std::span(out).first(5)), Error);
}

TEST(Collectives, Broadcasts) {
  MpiCollectives collectives(MPI_COMM_WORLD);
  for (int root = 0; root < collectives.size(); ++root) {
    std::vector<std::byte> data(100'001, static_cast<std::byte>(collectives.rank()));
    collectives.Broadcast(data, root);
    EXPECT_EQ(data, std::vector<std::byte>(100'001, static_cast<std::byte>(root)));
  }
  EXPECT_THROW(collectives.Broadcast({}, 3), Error);
}

}  // namespace
}  // namespace passel::cluster

int main(int argc, char** argv) {
  passel::cluster::Launch launch(&argc, &argv);
  // Rank 0 lists the tests; the others print failures alone.
  if (launch.world_rank() != 0) GTEST_FLAG_SET(brief, true);
  testing::InitGoogleTest(&argc, argv);
  if (launch.world_size() != 3) {
    std::fprintf(stderr, "expected 3 ranks (mpirun -np 3), got %d\n", launch.world_size());
    return 1;
  }
  passel::cluster::launch = &launch;
  return RUN_ALL_TESTS();
}
