#include "transport/channel.h"

#include <memory>
#include <utility>

namespace passel::transport {

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
