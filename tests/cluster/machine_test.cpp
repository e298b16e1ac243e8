#include "cluster/machine.h"

#include <gtest/gtest.h>
#include <sched.h>

#include <limits>

#include "runtime/base/error.h"

namespace passel::cluster {
namespace {

Machine SomeMachine() {
  Machine machine;
  machine.host_name = "node7";
  machine.cpus = 16;
  machine.cpus_in_mask = 1;
  machine.free_memory_bytes = 1000;
  return machine;
}

TEST(Machine, ReadsThisOne) {
  const Machine machine = ReadMachine();
  cpu_set_t mask;
  ASSERT_EQ(sched_getaffinity(0, sizeof(mask), &mask), 0);
  EXPECT_EQ(machine.cpus_in_mask, static_cast<uint32_t>(CPU_COUNT(&mask)));
  EXPECT_GE(machine.cpus, machine.cpus_in_mask);
  EXPECT_GE(machine.numa_nodes, 1u);
  EXPECT_GT(machine.memory_bytes, uint64_t{1} << 26);
  EXPECT_GT(machine.free_memory_bytes, 0u);
  EXPECT_LE(machine.free_memory_bytes, machine.memory_bytes);
  EXPECT_FALSE(machine.host_name.empty());
}

TEST(AffinityWarning, WarnsWhereTheMaskIsNarrowerThanTheShare) {
  Machine machine = SomeMachine();
  EXPECT_NE(AffinityWarning(machine, 0, 3).find("leaves this rank 1 of 16 CPUs"),
            std::string::npos);
  EXPECT_NE(AffinityWarning(machine, 4, 3).find("--bind-to none"), std::string::npos);
  EXPECT_EQ(AffinityWarning(machine, 1, 3), "");
  EXPECT_EQ(AffinityWarning(machine, 0, 16), "");
  EXPECT_EQ(AffinityWarning(machine, 0, 40), "");
  machine.cpus_in_mask = 16;
  EXPECT_EQ(AffinityWarning(machine, 0, 1), "");
  EXPECT_NE(AffinityWarning(machine, 17, 1), "");
}

TEST(HostThreads, LeaveTheRanksOwnThreadACpuWhereItIsAlone) {
  Machine machine;
  machine.cpus_in_mask = 16;
  config::Host host;
  EXPECT_EQ(HostThreads(host, machine, true), 15u);
  EXPECT_EQ(SpinTime(machine, 1 + HostThreads(host, machine, true)), SpinTime(machine, 1));
  EXPECT_EQ(HostThreads(host, machine, false), 16u);
  for (const uint32_t cpus : {0u, 1u}) {
    machine.cpus_in_mask = cpus;
    EXPECT_EQ(HostThreads(host, machine, true), cpus);
  }
  host.set_threads(40);
  EXPECT_EQ(HostThreads(host, machine, true), 40u);
}

TEST(SpinTime, IsLongWhereEachThreadHasACpu) {
  Machine machine = SomeMachine();
  machine.cpus_in_mask = 16;
  EXPECT_GE(SpinTime(machine, 16), std::chrono::milliseconds(1));
  EXPECT_LE(SpinTime(machine, 17), std::chrono::microseconds(50));
}

TEST(HostMemoryBudget, SharesTheNodeAndRefusesMoreThanItHas) {
  const Machine machine = SomeMachine();
  config::Host host;
  EXPECT_EQ(HostMemoryBudget(host, machine, 1), 800u);
  EXPECT_EQ(HostMemoryBudget(host, machine, 4), 200u);
  host.set_memory_bytes(500);
  EXPECT_EQ(HostMemoryBudget(host, machine, 2), 500u);
  for (const uint64_t bytes : {uint64_t{501}, std::numeric_limits<uint64_t>::max()}) {
    host.set_memory_bytes(bytes);
    try {
      HostMemoryBudget(host, machine, 2);
      FAIL();
    } catch (const Error& e) {
      EXPECT_EQ(e.error_class(), ErrorClass::kMemory);
    }
  }
}

}  // namespace
}  // namespace passel::cluster
