#pragma once

namespace passel::host {

// The next operator new of this thread throws.
void FailNextAllocation();

}  // namespace passel::host
