#pragma once

namespace passel::gpu {

// Bytes per second at which the current GPU reads its own memory: the best of some sequential reads
// of 4 GiB, or of half of what is free. 0 without a GPU or in a build without CUDA.
double CudaReadBandwidth();

}  // namespace passel::gpu
