#include "transport/ucx_handles.h"

extern "C" {
#include <ucs/config/global_opts.h>
}

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <sstream>
#include <utility>
#include <vector>

#include "runtime/base/error.h"

namespace passel::transport {

void CheckUcx(ucs_status_t status, std::string_view call, std::source_location where) {
  if (status == UCS_OK) return;
  throw Error(ErrorClass::kCluster, std::string(call) + " failed: " + ucs_status_string(status) +
                                        " (" + where.file_name() + ":" +
                                        std::to_string(where.line()) + ")");
}

void SetUcxDefaults() {
  constexpr std::pair<const char*, const char*> kDefaults[] = {
      // Eager up to 128 KiB: by default TCP may send 8 KiB by rendezvous, six times slower.
      {"UCX_RNDV_THRESH", "131072"},
      {"UCX_TCP_TX_SEG_SIZE", "256k"},
      {"UCX_TCP_RX_SEG_SIZE", "256k"},
      // A cut cable is noticed in 4 s where the link is idle, not in two hours.
      {"UCX_TCP_KEEPIDLE", "1s"},
      {"UCX_TCP_KEEPINTVL", "1s"},
      {"UCX_TCP_KEEPCNT", "3"},
      // Without these, peer error handling excludes shared memory.
      {"UCX_POSIX_ERROR_HANDLING", "y"},
      {"UCX_SYSV_ERROR_HANDLING", "y"},
  };
  for (const auto& [name, value] : kDefaults) setenv(name, value, /*overwrite=*/0);
  // UCX reads this one when it is loaded, too early for setenv; without it, it complains of every
  // variable above that the transports in use do not know.
  if (std::getenv("UCX_WARN_UNUSED_ENV_VARS") == nullptr) {
    CheckUcx(ucs_global_opts_set_value("WARN_UNUSED_ENV_VARS", "n"), "ucs_global_opts_set_value");
  }
}

UcxContext MakeUcxContext() {
  ucp_config_t* config = nullptr;
  CheckUcx(ucp_config_read(nullptr, nullptr, &config), "ucp_config_read");
  const std::unique_ptr<ucp_config_t, decltype(&ucp_config_release)> owner(config,
                                                                           &ucp_config_release);
  ucp_params_t params{};
  params.field_mask = UCP_PARAM_FIELD_FEATURES | UCP_PARAM_FIELD_NAME;
  params.features = UCP_FEATURE_AM | UCP_FEATURE_WAKEUP;
  params.name = "passel";
  ucp_context_h context = nullptr;
  CheckUcx(ucp_init(&params, config, &context), "ucp_init");
  return UcxContext(context);
}

UcxWorker MakeUcxWorker(ucp_context_h context) {
  ucp_worker_params_t params{};
  params.field_mask = UCP_WORKER_PARAM_FIELD_THREAD_MODE | UCP_WORKER_PARAM_FIELD_AM_ALIGNMENT;
  params.thread_mode = UCS_THREAD_MODE_SINGLE;
  params.am_alignment = 16;
  ucp_worker_h worker = nullptr;
  CheckUcx(ucp_worker_create(context, &params, &worker), "ucp_worker_create");
  return UcxWorker(worker);
}

void SetUcxHandler(ucp_worker_h worker, unsigned id, ucp_am_recv_callback_t callback, void* arg) {
  ucp_am_handler_param_t param{};
  param.field_mask = UCP_AM_HANDLER_PARAM_FIELD_ID | UCP_AM_HANDLER_PARAM_FIELD_FLAGS |
                     UCP_AM_HANDLER_PARAM_FIELD_CB | UCP_AM_HANDLER_PARAM_FIELD_ARG;
  param.id = id;
  param.flags = UCP_AM_FLAG_WHOLE_MSG;
  param.cb = callback;
  param.arg = arg;
  CheckUcx(ucp_worker_set_am_recv_handler(worker, &param), "ucp_worker_set_am_recv_handler");
}

namespace {

// "2:tcp/eth0.0" → {"tcp", "eth0"}; empty where it is nothing of the kind.
std::pair<std::string, std::string> ParseLane(const std::string& word) {
  const size_t colon = word.find(':');
  const size_t slash = word.find('/');
  if (colon == std::string::npos || slash == std::string::npos || colon > slash) return {};
  std::string device = word.substr(slash + 1);
  device.resize(std::min(device.size(), device.rfind('.')));
  return {word.substr(colon + 1, slash - colon - 1), device};
}

}  // namespace

std::string DescribeUcxEndpoint(ucp_ep_h endpoint) {
  // ucp_ep_query cannot name transports before UCX 1.14; the printed form names them in all.
  char* text = nullptr;
  size_t size = 0;
  FILE* stream = open_memstream(&text, &size);
  if (stream == nullptr) return "ucx";
  ucp_ep_print_info(endpoint, stream);
  std::fclose(stream);
  const std::unique_ptr<char, decltype(&std::free)> owner(text, &std::free);

  std::string out;
  std::istringstream lines(std::string(text, size));
  for (std::string line; std::getline(lines, line);) {
    const size_t lane = line.find("lane[");
    if (lane == std::string::npos) continue;
    std::istringstream words(line.substr(lane));
    std::string index, word;
    words >> index >> word;
    const auto [transport, device] = ParseLane(word);
    if (transport.empty()) continue;
    const bool memory = device == "memory" || transport == "cma" || transport == "knem";
    const std::string name = memory           ? "shared memory (" + transport + ")"
                             : device.empty() ? transport
                                              : transport + " (" + device + ")";
    if (out.find(name) == std::string::npos) out += (out.empty() ? "" : ", ") + name;
  }
  return out.empty() ? "ucx" : out;
}

}  // namespace passel::transport
