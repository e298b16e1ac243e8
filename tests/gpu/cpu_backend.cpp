#include <gtest/gtest.h>

#include <cstdlib>

#include "tests/gpu/device_matrix.h"

namespace passel::gpu {

std::unique_ptr<Device> MakeTestDevice(const DeviceOptions& options) {
  return MakeCpuDevice(options);
}
std::string TestBackend() { return "CPU"; }

// Guards the f32.* registration of these tests: its variable must arrive.
TEST(CpuBackend, ActivationsAreF32WithoutBf16Arithmetic) {
  const char* most = std::getenv("ONEDNN_MAX_CPU_ISA");
  if (!most) GTEST_SKIP() << "this CPU's own arithmetic; f32.* has the test";
  EXPECT_STREQ(most, "AVX2");
  EXPECT_EQ(MakeCpuDevice({})->activation_type(), DType::kF32);
}

}  // namespace passel::gpu
