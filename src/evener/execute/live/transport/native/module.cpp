// Bindings. Tensors come as addresses: checking them is the wrapper's work (shm.py), and an address costs nothing.
#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>

#include <system_error>

#include "group.hpp"
#include "pipe.hpp"

namespace nb = nanobind;
using namespace nb::literals;
using namespace evener;

namespace {

PyObject *aborted_error, *late_error, *mismatch_error;

PyObject* new_error(nb::module_& m, const char* name) {
  std::string full = std::string("evener.execute.live.transport._shm.") + name;
  PyObject* error = PyErr_NewException(full.c_str(), PyExc_Exception, nullptr);
  if (!error) throw nb::python_error();
  m.attr(name) = nb::borrow(error);
  return error;  // kept for the life of the module
}

void translate(const std::exception_ptr& p, void*) {
  try {
    std::rethrow_exception(p);
  } catch (const Aborted& e) {
    PyErr_SetObject(aborted_error, nb::make_tuple(e.device, e.reason).ptr());
  } catch (const Late& e) {
    PyErr_SetObject(late_error, nb::make_tuple(e.missing).ptr());
  } catch (const Mismatch& e) {
    PyErr_SetString(mismatch_error, e.what.c_str());
  } catch (const std::system_error& e) {
    PyErr_SetObject(PyExc_OSError, nb::make_tuple(e.code().value(), e.what()).ptr());
  }
}

nb::tuple as_tuple(const Stamp& s) { return nb::make_tuple(s.entered, s.arrived, s.ended, s.cpu_entered, s.cpu_ended); }

}  // namespace

NB_MODULE(_shm, m) {
  aborted_error = new_error(m, "Aborted");
  late_error = new_error(m, "Late");
  mismatch_error = new_error(m, "Mismatch");
  nb::register_exception_translator(translate);

  m.attr("MAX_RANKS") = kMaxRanks;
  m.attr("PAGE") = kPage;
  m.attr("BELL") = sizeof(Bell);
  m.def("group_bytes", &Group::region_bytes, "size"_a, "slot_bytes"_a);
  m.def("pipe_bytes", &Pipe::region_bytes, "capacity"_a);

  nb::class_<Segment>(m, "Segment")
      .def_static("create", &Segment::create, "size"_a, "bells"_a)
      .def_static("attach", &Segment::attach, "fd"_a)
      .def_prop_ro("fd", &Segment::fd)
      .def_prop_ro("size", [](const Segment& s) { return s.map()->size(); })
      .def("abort", [](const Segment& s, const std::string& device,
                       const std::string& reason) { return !s.closed() && s.map()->abort(device, reason); },
           "device"_a, "reason"_a)
      .def("aborted",
           [](const Segment& s) -> std::optional<std::pair<std::string, std::string>> {
             auto map = s.map();
             if (!map->aborted()) return std::nullopt;
             Aborted a = map->why();
             return std::pair{a.device, a.reason};
           })
      .def("share", &Segment::share)
      .def("close", &Segment::close);

  m.attr("SUM") = reinterpret_cast<uintptr_t>(&Group::sum_for_native);

  nb::class_<Pace>(m, "Pace")
      .def(nb::init<double, int, bool>(), "slowdown"_a, "threads"_a = 1, "sleeps"_a = true)
      .def("pay",
           [](Pace& p) {
             Gil gil;
             p.pay(gil);
           })
      .def("skip", &Pace::skip)
      .def("idled", &Pace::idled)
      .def_prop_ro("owed_ns", &Pace::owed)
      .def_prop_ro("slept_ns", &Pace::slept)
      .def_prop_ro("waited_ns", &Pace::waited)
      .def_prop_ro("spent_ns", &Pace::spent);

  nb::class_<Group>(m, "Group")
      .def(nb::init<const Segment&, uint64_t, uint64_t, int, int, uint64_t, uint64_t, int64_t, int64_t,
                    Pace*>(),
           "segment"_a, "offset"_a, "first_bell"_a, "rank"_a, "size"_a, "slot_bytes"_a, "direct_bytes"_a,
           "deadline_ns"_a, "spin_ns"_a, "pace"_a.none(), nb::keep_alive<1, 11>())
      .def_prop_ro("operations", &Group::operations)
      .def_prop_ro("address", [](Group& g) { return reinterpret_cast<uintptr_t>(&g); })
      .def("rethrow", &Group::rethrow)
      .def("all_reduce", [](Group& g, uintptr_t t, uint64_t count, int dtype,
                            int64_t floor_ns) { return as_tuple(g.all_reduce(t, count, dtype, floor_ns)); })
      .def("all_gather", [](Group& g, uintptr_t t, uintptr_t out, uint64_t bytes,
                            int64_t floor_ns) { return as_tuple(g.all_gather(t, out, bytes, floor_ns)); })
      .def("all_to_all", [](Group& g, uintptr_t t, uintptr_t out, uint64_t bytes_each,
                            int64_t floor_ns) { return as_tuple(g.all_to_all(t, out, bytes_each, floor_ns)); });

  nb::class_<Pipe>(m, "Pipe")
      .def(nb::init<const Segment&, uint64_t, uint64_t, bool, uint64_t, int64_t, int64_t, int64_t, double, Pace*>(),
           "segment"_a, "offset"_a, "first_bell"_a, "sender"_a, "capacity"_a, "deadline_ns"_a, "spin_ns"_a,
           "delay_ns"_a, "ns_per_byte"_a, "pace"_a.none(), nb::keep_alive<1, 11>())
      .def("send", [](Pipe& p, uintptr_t t, uint64_t bytes) { return as_tuple(p.send(t, bytes)); })
      .def("recv", [](Pipe& p, uintptr_t out, uint64_t bytes) { return as_tuple(p.recv(out, bytes)); })
      .def("poll", &Pipe::poll);
}
