# What travels in frames: the typed payloads (a library of its own, so that its parsers are tested
# without MPI) and the generated code of the control messages, cluster/control.pb.h.
passel_library(passel_messages
  SOURCES messages.cpp
  PUBLIC_HEADERS messages.h
  LINK passel_base)

add_library(passel_control STATIC)
protobuf_generate(TARGET passel_control LANGUAGE cpp
                  PROTOS ${CMAKE_CURRENT_SOURCE_DIR}/control.proto
                  IMPORT_DIRS ${PROJECT_SOURCE_DIR} PROTOC_OUT_DIR ${PROJECT_BINARY_DIR})
target_include_directories(passel_control SYSTEM PUBLIC ${PROJECT_BINARY_DIR})
target_link_libraries(passel_control PUBLIC protobuf::libprotobuf)
