#pragma once

#include <ucp/api/ucp.h>

#include <memory>
#include <source_location>
#include <string>
#include <string_view>

namespace passel::transport {

// Throws Error{kCluster} naming the call, UCX's reason and the place, unless `status` is UCS_OK.
void CheckUcx(ucs_status_t status, std::string_view call,
              std::source_location where = std::source_location::current());

struct UcxContextDeleter {
  void operator()(ucp_context_h context) const { ucp_cleanup(context); }
};
using UcxContext = std::unique_ptr<ucp_context, UcxContextDeleter>;

struct UcxWorkerDeleter {
  void operator()(ucp_worker_h worker) const { ucp_worker_destroy(worker); }
};
using UcxWorker = std::unique_ptr<ucp_worker, UcxWorkerDeleter>;

// Environment variables that UCX reads, for what its defaults do badly here; what the user has set
// stays. Must run before UCX is initialised and while no other thread reads the environment.
void SetUcxDefaults();

// A context with active messages and wake-up, and a worker of it that one thread uses.
UcxContext MakeUcxContext();
UcxWorker MakeUcxWorker(ucp_context_h context);

// Whole active messages of number `id` go to `callback`.
void SetUcxHandler(ucp_worker_h worker, unsigned id, ucp_am_recv_callback_t callback, void* arg);

// Which transports carry an endpoint's bytes: "shared memory (posix)", "tcp (eth0)", …
std::string DescribeUcxEndpoint(ucp_ep_h endpoint);

}  // namespace passel::transport
