#include "transport/channel.h"

#include <memory>
#include <utility>

namespace passel::transport {

uint64_t OutgoingFrame::payload_bytes() const {
  uint64_t bytes = payload.size();
  for (const auto& piece : pieces) bytes += piece.size();
  return bytes;
}

OutgoingFrame OutgoingFrame::Own(FrameHeader header, std::vector<std::byte> payload) {
  // std::function copies its target, so the payload is held by a pointer.
  const auto held = std::make_shared<const std::vector<std::byte>>(std::move(payload));
  OutgoingFrame frame;
  frame.header = header;
  frame.payload = *held;
  frame.done = [held] {};
  return frame;
}

}  // namespace passel::transport
