// How both Python modules bind a kernel: its struct of arguments is the only list of them. A Python function takes its
// fields in order, those of nested structs one after another: tensors for their memory (None: null), or for a matrix of
// any strides; numbers and enums as Python's numbers; psi, and addresses where there is no tensor, as objects.
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

// torch's dtypes in the order of DType, as Python handed them over; this header knows no torch.
inline PyObject* torch_dtypes[4];

inline PyObject* own(PyObject* object) {
  if (!object) throw py::error_already_set();
  return object;
}
inline void* address_of(PyObject* tensor) {
  static PyObject* const name = PyUnicode_InternFromString("data_ptr");
  const py::object address = py::reinterpret_steal<py::object>(own(PyObject_CallMethodNoArgs(tensor, name)));
  return PyLong_AsVoidPtr(address.ptr());
}
// A tensor of two axes as it lies.
inline Matrix matrix_of(PyObject* tensor) {
  static PyObject *const shape = PyUnicode_InternFromString("shape"),
                         *const stride = PyUnicode_InternFromString("stride"),
                         *const dtype = PyUnicode_InternFromString("dtype");
  const auto sizes = py::reinterpret_steal<py::object>(own(PyObject_GetAttr(tensor, shape)));
  const auto strides = py::reinterpret_steal<py::object>(own(PyObject_CallMethodNoArgs(tensor, stride)));
  const auto type = py::reinterpret_steal<py::object>(own(PyObject_GetAttr(tensor, dtype)));
  if (!PyTuple_Check(sizes.ptr()) || PyTuple_GET_SIZE(sizes.ptr()) != 2) throw py::type_error("expected a matrix");
  const auto number = [](const py::object& tuple, int axis) {
    return int64_t(PyLong_AsLongLong(PyTuple_GET_ITEM(tuple.ptr(), axis)));
  };
  for (int i = 0; i < 4; ++i)
    if (type.ptr() == torch_dtypes[i])
      return {address_of(tensor), number(sizes, 0), number(sizes, 1), number(strides, 0), number(strides, 1), DType(i)};
  throw py::type_error("expected a tensor of float64, float32, bfloat16 or float16");
}

// One Python argument, which becomes whatever a field is.
struct Argument {
  PyObject* object;

  template <class T, std::enable_if_t<is_field<T>, int> = 0>
  operator T() const {
    if constexpr (std::is_same_v<T, Matrix>) {
      return py::isinstance<Matrix>(object) ? py::cast<const Matrix&>(py::handle(object)) : matrix_of(object);
    } else if constexpr (is_object<T>) {
      return py::cast<const T&>(py::handle(object));
    } else if constexpr (std::is_pointer_v<T>) {
      if (object == Py_None) return nullptr;
      return static_cast<T>(PyLong_Check(object) ? checked(PyLong_AsVoidPtr(object)) : address_of(object));
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
constexpr bool
    takes<Struct, std::index_sequence<I...>, std::void_t<decltype(Struct{Argument{(void(I), nullptr)}...})>> = true;
template <class Struct, size_t count = 1>
constexpr size_t count_fields() {
  if constexpr (takes<Struct, std::make_index_sequence<count + 1>>)
    return count_fields<Struct, count + 1>();
  else
    return count;
}

template <class Struct, size_t... I>
Struct convert(PyObject* const* arguments, std::index_sequence<I...>) {
  return Struct{Argument{arguments[I]}...};
}
template <class Struct>
Struct make(PyObject* const* arguments, Py_ssize_t given) {
  constexpr size_t count = count_fields<Struct>();
  if (size_t(given) != count)
    throw py::type_error("expected " + std::to_string(count) + " arguments, got " + std::to_string(given));
  return convert<Struct>(arguments, std::make_index_sequence<count>());
}
template <class Struct>
Struct make_of(const py::args& arguments) {
  return make<Struct>(PySequence_Fast_ITEMS(arguments.ptr()), Py_ssize_t(arguments.size()));
}

// What Python calls: a kernel, without Python's lock. Not pybind11's own way, which takes as long as a small problem.
template <auto kernel, class Struct>
PyObject* called(PyObject*, PyObject* const* arguments, Py_ssize_t given) {
  try {
    const Struct made = make<Struct>(arguments, given);
    const py::gil_scoped_release release;
    kernel(made);
  } catch (py::error_already_set& error) {
    error.restore();
  } catch (const py::type_error& error) {
    PyErr_SetString(PyExc_TypeError, error.what());
  } catch (const std::out_of_range& error) {
    PyErr_SetString(PyExc_IndexError, error.what());
  } catch (const std::invalid_argument& error) {
    PyErr_SetString(PyExc_ValueError, error.what());
  } catch (const std::bad_alloc&) {
    PyErr_NoMemory();
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
  }
  return PyErr_Occurred() ? nullptr : Py_NewRef(Py_None);
}
template <class Struct>
Struct struct_of(void (*)(const Struct&));  // of a kernel's argument

template <auto kernel>
void define(py::module_& m, const char* name) {
  using Struct = decltype(struct_of(kernel));
  static PyMethodDef method{name, reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(&called<kernel, Struct>)),
                            METH_FASTCALL, nullptr};
  m.add_object(name, py::reinterpret_steal<py::object>(own(PyCFunction_New(&method, nullptr))));
}

// The classes of the objects. Local to a module: both have them.
inline void define_objects(py::module_& m) {
  py::class_<Matrix>(m, "Matrix", py::module_local()).def(py::init(&make_of<Matrix>));
  py::class_<Psi>(m, "Psi", py::module_local()).def(py::init(&make_of<Psi>));
  m.def("set_dtypes", [](const py::object& a, const py::object& b, const py::object& c, const py::object& d) {
    int i = 0;
    for (const py::object& dtype : {a, b, c, d}) torch_dtypes[i++] = py::object(dtype).release().ptr();
  });
}

}  // namespace fused_margins
