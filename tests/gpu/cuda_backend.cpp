// The device tests on a GPU. Where there is none, every test but a listing is reported as skipped.

#include <gtest/gtest.h>

#include <cstdio>
#include <string>

#include "runtime/base/error.h"
#include "tests/gpu/device_matrix.h"

namespace passel::gpu {

std::unique_ptr<Device> MakeTestDevice(const DeviceOptions& options) {
  std::string why;
  auto device = MakeCudaDevice(options, &why);
  if (!device) throw Error(ErrorClass::kUsage, why);
  return device;
}
std::string TestBackend() { return "CUDA"; }

}  // namespace passel::gpu

int main(int argc, char** argv) {
  testing::InitGoogleTest(&argc, argv);
  std::string why;
  if (!testing::GTEST_FLAG(list_tests) && !passel::gpu::MakeCudaDevice({}, &why)) {
    std::printf("[  SKIPPED ] %s\n", why.c_str());
    return 0;
  }
  return RUN_ALL_TESTS();
}
