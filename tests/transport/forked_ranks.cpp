#include "tests/transport/forked_ranks.h"

#include <poll.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <stdexcept>

namespace passel::transport {
namespace {

using Bytes = std::vector<std::byte>;

bool ReadAll(int fd, void* to, size_t bytes) {
  auto* p = static_cast<char*>(to);
  while (bytes > 0) {
    const ssize_t n = read(fd, p, bytes);
    if (n <= 0) return false;
    p += n;
    bytes -= static_cast<size_t>(n);
  }
  return true;
}

bool WriteMessage(int fd, int32_t from, const Bytes& bytes) {
  const uint64_t head[] = {static_cast<uint64_t>(from), bytes.size()};
  if (send(fd, head, sizeof(head), MSG_NOSIGNAL) != ssize_t{sizeof(head)}) return false;
  return bytes.empty() ||
         send(fd, bytes.data(), bytes.size(), MSG_NOSIGNAL) == static_cast<ssize_t>(bytes.size());
}

bool ReadMessage(int fd, int32_t* from, Bytes* bytes) {
  uint64_t head[2];
  if (!ReadAll(fd, head, sizeof(head))) return false;
  *from = static_cast<int32_t>(head[0]);
  bytes->resize(head[1]);
  return ReadAll(fd, bytes->data(), bytes->size());
}

// Answers every round of Exchange until all processes have closed their sockets.
void Coordinate(std::vector<int> sockets) {
  while (!sockets.empty()) {
    std::vector<std::pair<int32_t, Bytes>> round;
    std::vector<int> alive;
    for (const int fd : sockets) {
      int32_t from = -1;
      Bytes bytes;
      if (ReadMessage(fd, &from, &bytes)) {
        round.emplace_back(from, std::move(bytes));
        alive.push_back(fd);
      } else {
        close(fd);
      }
    }
    sockets = alive;
    for (const int fd : sockets) {
      for (const auto& [from, bytes] : round) WriteMessage(fd, from, bytes);
      WriteMessage(fd, -1, {});
    }
  }
}

}  // namespace

void ForkedRank::Require(bool condition, std::string_view what) {
  if (!condition) throw std::runtime_error(std::string(what));
}

void ForkedRank::Until(Channel& channel, const std::function<bool()>& ready,
                       std::string_view what) {
  const auto end = std::chrono::steady_clock::now() + std::chrono::seconds(20);
  while (!ready()) {
    Require(std::chrono::steady_clock::now() < end, what);
    if (!channel.Progress()) channel.Wait(std::chrono::milliseconds(10));
  }
}

std::map<int32_t, Bytes> ForkedRank::Exchange(const Bytes& mine, Channel* channel) const {
  Require(WriteMessage(socket_, rank_, mine), "the coordinator is gone");
  std::map<int32_t, Bytes> out;
  while (true) {
    pollfd fd{socket_, POLLIN, 0};
    while (channel != nullptr && poll(&fd, 1, 1) == 0) channel->Progress();
    int32_t from = -1;
    Bytes bytes;
    Require(ReadMessage(socket_, &from, &bytes), "the coordinator is gone");
    if (from < 0) return out;
    out.emplace(from, std::move(bytes));
  }
}

std::unique_ptr<UcxChannel> ForkedRank::Start(uint64_t nonce, const UcxOptions& options) const {
  auto channel = MakeUcxChannel(options);
  std::map<RankId, Bytes> addresses;
  for (auto& [rank, address] : Exchange(channel->address(), nullptr)) {
    addresses.emplace(RankId(rank), std::move(address));
  }
  channel->Connect(addresses, nonce);
  return channel;
}

std::string RunForked(int32_t ranks, const std::map<std::string, std::string>& environment,
                      const std::function<void(ForkedRank&)>& body,
                      const std::vector<int32_t>& may_die) {
  std::vector<pid_t> pids;
  std::vector<int> sockets;
  std::fflush(nullptr);
  for (int32_t rank = 0; rank < ranks; ++rank) {
    int pair[2];
    if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair) != 0) return "socketpair failed";
    const pid_t pid = fork();
    if (pid < 0) return "fork failed";
    if (pid == 0) {
      close(pair[0]);
      for (const int fd : sockets) close(fd);
      alarm(60);
      for (const auto& [name, value] : environment) setenv(name.c_str(), value.c_str(), 1);
      int code = 0;
      try {
        ForkedRank me(rank, ranks, pair[1]);
        body(me);
      } catch (const std::exception& e) {
        std::fprintf(stderr, "rank %d: %s\n", rank, e.what());
        code = 1;
      }
      std::fflush(nullptr);
      _exit(code);
    }
    close(pair[1]);
    pids.push_back(pid);
    sockets.push_back(pair[0]);
  }
  Coordinate(sockets);
  std::string wrong;
  for (int32_t rank = 0; rank < ranks; ++rank) {
    int status = 0;
    waitpid(pids[static_cast<size_t>(rank)], &status, 0);
    const bool may = std::find(may_die.begin(), may_die.end(), rank) != may_die.end();
    if (may && WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL) continue;
    if (!WIFEXITED(status) || WEXITSTATUS(status) != 0) {
      wrong +=
          "rank " + std::to_string(rank) + " ended with status " + std::to_string(status) + "; ";
    }
  }
  return wrong;
}

}  // namespace passel::transport
