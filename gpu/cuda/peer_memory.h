#pragma once

#include <functional>
#include <memory>
#include <vector>

#include "gpu/cuda/memory.h"
#include "gpu/cuda/product_chain.h"
#include "runtime/base/collectives.h"

namespace passel::gpu::cuda {

// Memory of each of some ranks, on GPUs of one machine, that the kernels of all of them write to:
// where chains of products sum over the ranks.
class PeerMemory {
 public:
  // Null where a rank is not `able`, or cannot reach another's memory. Every rank must call it, and
  // all get the same answer. `host`: broadcasts host memory.
  static std::shared_ptr<PeerMemory> Join(Collectives& host, bool able);
  ~PeerMemory();
  PeerMemory(const PeerMemory&) = delete;
  PeerMemory& operator=(const PeerMemory&) = delete;

  const PeerInboxes& inboxes() const { return inboxes_; }
  // 0, 1, 0, 1, … for one sum after another.
  int NextTurn() { return turn_ = 1 - turn_; }
  // Ends what waits for another rank now or later, with any result.
  void Abandon();

  // Called when a chain that sums has been issued; may be empty.
  std::function<void()> issued;

 private:
  PeerMemory() = default;
  bool MakeInbox(int ranks, cudaIpcMemHandle_t* handle);

  PeerInboxes inboxes_;
  std::unique_ptr<Buffer> abandoned_;  // pinned, one number
  std::vector<void*> opened_;
  int turn_ = 0;
};

}  // namespace passel::gpu::cuda
