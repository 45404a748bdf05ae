nanobind_add_module(_shm NB_STATIC src/evener/execute/live/transport/native/module.cpp)
install(TARGETS _shm LIBRARY DESTINATION evener/execute/live/transport)
