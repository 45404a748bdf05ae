#include <nanobind/nanobind.h>
NB_MODULE(_shm, m) {}
