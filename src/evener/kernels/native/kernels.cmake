nanobind_add_module(_native NB_STATIC src/evener/kernels/native/module.cpp)
install(TARGETS _native LIBRARY DESTINATION evener/kernels)
