#include "runtime/cli/doctor/doctor.h"

#include <gtest/gtest.h>

#include <sstream>

#include "cluster/machine.h"
#include "runtime/cli/doctor/ucx_report.h"

namespace passel {
namespace {

TEST(Doctor, NamesEveryPartOfTheMachine) {
  std::ostringstream out;
  EXPECT_EQ(RunDoctor(out), 0);
  for (const char* name : {"\nMPI ", "\nUCX ", "\nCUDA ", "\nNCCL ", "\nCPU ", "\nNUMA ",
                           "\nMemory ", "\nHuge pages ", "\nLimits ", "\n/dev/shm "}) {
    EXPECT_NE(out.str().find(name), std::string::npos) << name << "in\n" << out.str();
  }
  EXPECT_EQ(out.str().rfind("Host         " + cluster::ReadMachine().host_name + "\n", 0), 0u);
  EXPECT_NE(out.str().find("Open MPI"), std::string::npos) << out.str();
}

TEST(Doctor, UcxOffersSelfAndSomeSharedMemoryOrNetwork) {
  std::vector<std::string> names;
  for (const UcxTransport& transport : UcxTransports()) {
    names.push_back(transport.name);
    EXPECT_FALSE(transport.devices.empty()) << transport.name;
  }
  EXPECT_NE(std::find(names.begin(), names.end(), "self"), names.end());
  EXPECT_GE(names.size(), 2u);
  EXPECT_EQ(UcxVersion().rfind("1.", 0), 0u) << UcxVersion();
}

}  // namespace
}  // namespace passel
