# What travels in frames: the typed payloads (a library of its own, so that its parsers are tested
# without MPI) and the generated code of the control messages, cluster/control.pb.h.
passel_library(passel_messages
  SOURCES messages.cpp
  PUBLIC_HEADERS messages.h
  LINK passel_base)

passel_proto(passel_control cluster/control.proto)
