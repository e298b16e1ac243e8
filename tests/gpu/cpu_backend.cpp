#include "tests/gpu/device_matrix.h"

namespace passel::gpu {

std::unique_ptr<Device> MakeTestDevice(const DeviceOptions& options) {
  return MakeCpuDevice(options);
}
std::string TestBackend() { return "CPU"; }

}  // namespace passel::gpu
