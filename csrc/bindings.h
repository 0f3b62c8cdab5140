// How both Python modules bind a kernel: its struct of arguments is the only list of them. A Python function takes its
// fields in order, those of nested structs one after another: addresses (0: null), numbers and enums as Python's
// numbers, matrices and psi as objects.
#pragma once

#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>

#include "margin.h"
#include "matrix.h"

#if defined(__clang__)
#pragma clang diagnostic ignored "-Wmissing-braces"  // left out on purpose: an argument for each field
#endif

namespace fused_margins {
namespace py = pybind11;

template <class T>
constexpr bool is_object = std::is_same_v<T, Matrix> || std::is_same_v<T, Psi>;
template <class T>
constexpr bool is_field = is_object<T> || std::is_scalar_v<T>;

// One Python argument, which becomes whatever a field is.
struct Argument {
  PyObject* object;

  template <class T, std::enable_if_t<is_field<T>, int> = 0>
  operator T() const {
    if constexpr (is_object<T>) {
      return py::cast<const T&>(py::handle(object));
    } else if constexpr (std::is_pointer_v<T>) {
      return static_cast<T>(checked(PyLong_AsVoidPtr(object)));
    } else if constexpr (std::is_floating_point_v<T>) {
      return checked(PyFloat_AsDouble(object));
    } else {
      const long long value = checked(PyLong_AsLongLong(object));
      if constexpr (std::is_enum_v<T>) {
        if (value < 0 || value > int(T::last))
          throw std::invalid_argument("enum: expected a value in [0, " + std::to_string(int(T::last)) + "], got " +
                                      std::to_string(value));
      } else if (static_cast<long long>(T(value)) != value) {
        throw std::invalid_argument("argument out of range: " + std::to_string(value));
      }
      return T(value);
    }
  }

 private:
  template <class V>
  static V checked(V value) {
    if (value == V(-1) && PyErr_Occurred()) throw py::error_already_set();
    return value;
  }
};

// How many arguments make a struct: one for each of its fields.
template <class Struct, class Indices, class = void>
constexpr bool takes = false;
template <class Struct, size_t... I>
constexpr bool takes<Struct, std::index_sequence<I...>, std::void_t<decltype(Struct{Argument{(void(I), nullptr)}...})>> =
    true;
template <class Struct, size_t count = 1>
constexpr size_t count_fields() {
  if constexpr (takes<Struct, std::make_index_sequence<count + 1>>)
    return count_fields<Struct, count + 1>();
  else
    return count;
}

template <class Struct, size_t... I>
Struct convert(const py::args& arguments, std::index_sequence<I...>) {
  return Struct{Argument{PyTuple_GET_ITEM(arguments.ptr(), Py_ssize_t(I))}...};
}
template <class Struct>
Struct make(const py::args& arguments) {
  constexpr size_t count = count_fields<Struct>();
  if (arguments.size() != count)
    throw py::type_error("expected " + std::to_string(count) + " arguments, got " + std::to_string(arguments.size()));
  return convert<Struct>(arguments, std::make_index_sequence<count>());
}

// A function of the module that calls a kernel; Python's lock is given back meanwhile.
template <class Struct>
void define(py::module_& m, const char* name, void (*kernel)(const Struct&)) {
  m.def(name, [kernel](const py::args& arguments) {
    const Struct made = make<Struct>(arguments);
    py::gil_scoped_release release;
    kernel(made);
  });
}

// The classes of the objects. Local to a module: both have them.
inline void define_objects(py::module_& m) {
  py::class_<Matrix>(m, "Matrix", py::module_local()).def(py::init(&make<Matrix>));
  py::class_<Psi>(m, "Psi", py::module_local()).def(py::init(&make<Psi>));
}

}  // namespace fused_margins
