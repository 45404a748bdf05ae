# One source, isa.cpp, compiled once per instruction set into its own namespace; launch.cpp chooses at run time.
# Those objects must not share inline functions (std templates), or the linker could keep a copy that the
# processor at hand cannot run.
set(EVENER_KERNELS src/evener/kernels/native)

function(evener_isa name source width)
  add_library(evener_isa_${name} OBJECT ${EVENER_KERNELS}/${source})
  target_compile_definitions(evener_isa_${name} PRIVATE EVENER_ISA=${name} EVENER_WIDTH=${width})
  target_compile_options(evener_isa_${name} PRIVATE -O3 -ffp-contract=fast -fno-math-errno -fno-exceptions ${ARGN})
  set_property(TARGET evener_isa_${name} PROPERTY INTERPROCEDURAL_OPTIMIZATION OFF)
  list(APPEND EVENER_ISA_OBJECTS $<TARGET_OBJECTS:evener_isa_${name}>)
  set(EVENER_ISA_OBJECTS ${EVENER_ISA_OBJECTS} PARENT_SCOPE)
endfunction()

evener_isa(generic isa.cpp 4)
if(CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|AMD64|amd64)$")
  evener_isa(avx2 isa.cpp 8 -march=x86-64-v3)
  evener_isa(avx512 isa.cpp 16 -march=x86-64-v4 -mprefer-vector-width=512)
  evener_isa(avx512vnni int8.cpp 16 -march=x86-64-v4 -mavx512vnni -mprefer-vector-width=512 -DEVENER_DOT4)
  evener_isa(avx512bf16 bf16.cpp 16 -march=x86-64-v4 -mavx512bf16 -mprefer-vector-width=512)
  evener_isa(avx512amx amx.cpp 16 -march=x86-64-v4 -mavx512vnni -mavx512bf16 -mamx-tile -mamx-int8 -mamx-bf16
             -mprefer-vector-width=512 -DEVENER_DOT4)
endif()

find_package(Threads REQUIRED)
nanobind_add_module(_native NB_STATIC NOMINSIZE
  ${EVENER_KERNELS}/module.cpp ${EVENER_KERNELS}/launch.cpp ${EVENER_KERNELS}/layer.cpp
  ${EVENER_KERNELS}/pool.cpp ${EVENER_ISA_OBJECTS})
target_link_libraries(_native PRIVATE Threads::Threads)
install(TARGETS _native LIBRARY DESTINATION evener/kernels)
