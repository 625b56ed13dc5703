# Debian: libzmq3-dev, libmsgpack-cxx-dev. If they are not found, set the variables DRP_ZMQ_INCLUDE and so on.
find_package(Threads REQUIRED)
find_path(DRP_ZMQ_INCLUDE zmq.h REQUIRED)
find_library(DRP_ZMQ_LIBRARY zmq REQUIRED)
find_path(DRP_MSGPACK_INCLUDE msgpack.hpp REQUIRED)

if(NOT TARGET drp::zmq)
  add_library(drp::zmq INTERFACE IMPORTED)
  target_include_directories(drp::zmq SYSTEM INTERFACE "${DRP_ZMQ_INCLUDE}")
  target_link_libraries(drp::zmq INTERFACE "${DRP_ZMQ_LIBRARY}")
  add_library(drp::msgpack INTERFACE IMPORTED)
  target_include_directories(drp::msgpack SYSTEM INTERFACE "${DRP_MSGPACK_INCLUDE}")
endif()
