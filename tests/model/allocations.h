#pragma once

#include <cstdint>

namespace passel {

// Bytes that operator new has given out in this program and not got back.
int64_t AllocatedBytes();
// The most of them at any time since the last call of ResetPeak.
int64_t PeakAllocatedBytes();
void ResetPeak();

}  // namespace passel
