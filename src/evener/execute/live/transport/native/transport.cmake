# memfd and futex: Linux only. Elsewhere shm.py says so, and torchdist.py remains.
if(NOT CMAKE_SYSTEM_NAME STREQUAL "Linux")
  return()
endif()

nanobind_add_module(_shm NB_STATIC NOMINSIZE
  src/evener/execute/live/transport/native/module.cpp
  src/evener/execute/live/transport/native/segment.cpp
  src/evener/execute/live/transport/native/wait.cpp
  src/evener/execute/live/transport/native/pace.cpp
  src/evener/execute/live/transport/native/sum.cpp
  src/evener/execute/live/transport/native/group.cpp
  src/evener/execute/live/transport/native/pipe.cpp)
target_compile_options(_shm PRIVATE -Wall -Wextra)
install(TARGETS _shm LIBRARY DESTINATION evener/execute/live/transport)
