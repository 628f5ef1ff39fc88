#include "arrays.h"

#include <stdio.h>
#include <stdlib.h>

/* So NPY_ARRAY_ALIGNED means that every stride is a whole number of elements, which is how the core counts them. */
_Static_assert(_Alignof(double) == sizeof(double) && _Alignof(float) == sizeof(float), "elements align to their size");

bool raise_for(PyObject *exception, argument arg, const char *format, ...) {
  va_list values;
  va_start(values, format);
  PyObject *rest = PyUnicode_FromFormatV(format, values);
  va_end(values);
  if (rest != NULL && arg.index < 0) {
    PyErr_Format(exception, "%s %U", arg.name, rest);
  } else if (rest != NULL) {
    PyErr_Format(exception, "%s[%zd] %U", arg.name, arg.index, rest);
  }
  Py_XDECREF(rest);
  return false;
}

bool raise_shape(PyArrayObject *array, argument arg, const char *expected) {
  /* Not the attribute, whose name CPython's cache of types would keep, one for each call. */
  PyObject *got = PyArray_IntTupleFromIntp(PyArray_NDIM(array), PyArray_DIMS(array));
  if (got != NULL) {
    raise_for(PyExc_ValueError, arg, "must have shape %s, got %S", expected, got);
    Py_DECREF(got);
  }
  return false;
}

const char *typenum_text(int typenum) { return typenum == NPY_FLOAT ? "float32" : "float64"; }

int is_array(PyObject *obj) {
  if (!PyArray_Check(obj) || PyArray_CheckExact(obj)) {
    return PyArray_Check(obj);
  }
  PyObject *module = PyImport_ImportModule("numpy.ma");
  PyObject *masked = module == NULL ? NULL : PyObject_GetAttrString(module, "MaskedArray");
  int result = masked == NULL ? -1 : PyObject_IsInstance(obj, masked);
  Py_XDECREF(masked);
  Py_XDECREF(module);
  return result < 0 ? -1 : !result;
}

static bool check_type(PyObject *obj, argument arg, int typenum) {
  int array = is_array(obj);
  if (array < 0) {
    return false;
  }
  if (!array) {
    return raise_for(PyExc_TypeError, arg, "must be a NumPy array of float32 or float64, got %s",
                     Py_TYPE(obj)->tp_name);
  }
  PyArrayObject *a = (PyArrayObject *)obj;
  int got = PyArray_TYPE(a);
  if ((got != NPY_FLOAT && got != NPY_DOUBLE) || !PyArray_ISNOTSWAPPED(a)) {
    return raise_for(PyExc_TypeError, arg, "must be a NumPy array of float32 or float64 in native byte order, got %S",
                     PyArray_DESCR(a));
  }
  if (typenum != NPY_NOTYPE && got != typenum) {
    return raise_for(PyExc_TypeError, arg, "must be %s like the other arrays, got %s", typenum_text(typenum),
                     typenum_text(got));
  }
  return true;
}

PyArrayObject *input_array(PyObject *obj, argument arg, int typenum) {
  if (!check_type(obj, arg, typenum)) {
    return NULL;
  }
  if (PyArray_ISALIGNED((PyArrayObject *)obj)) {
    return (PyArrayObject *)Py_NewRef(obj);
  }
  return (PyArrayObject *)PyArray_NewCopy((PyArrayObject *)obj, NPY_CORDER);
}

bool has_shape(PyArrayObject *array, argument arg, int ndim, const npy_intp *dims, const char *name) {
  bool right = PyArray_NDIM(array) == ndim;
  for (int i = 0; right && i < ndim; i++) {
    right = dims[i] == ANY ? PyArray_DIM(array, i) > 0 : PyArray_DIM(array, i) == dims[i];
  }
  if (right) {
    return true;
  }
  char expected[NPY_MAXDIMS * 24] = "["; /* an axis takes 22 at most */
  size_t length = 1;
  for (int i = 0; i < ndim; i++) {
    const char *comma = i == 0 ? "" : ", ";
    char *end = expected + length;
    size_t room = sizeof expected - length;
    int wrote = dims[i] == ANY ? snprintf(end, room, "%s%s > 0", comma, name)
                               : snprintf(end, room, "%s%lld", comma, (long long)dims[i]);
    length += (size_t)wrote;
  }
  snprintf(expected + length, sizeof expected - length, "]");
  return raise_shape(array, arg, expected);
}

typedef struct {
  npy_intp stride, length;
} axis;

static int by_stride(const void *left, const void *right) {
  npy_intp a = ((const axis *)left)->stride, b = ((const axis *)right)->stride;
  return (a > b) - (a < b);
}

/* Whether two indices may name the same byte. Exact for whatever slicing, transposing and broadcasting can make; of the
 * stranger products of as_strided some that do not overlap are taken to. */
static bool overlaps_itself(PyArrayObject *array) {
  axis axes[NPY_MAXDIMS];
  size_t n = 0;
  for (int i = 0; i < PyArray_NDIM(array); i++) {
    if (PyArray_DIM(array, i) > 1) {
      npy_intp stride = PyArray_STRIDE(array, i);
      axes[n++] = (axis){stride < 0 ? -stride : stride, PyArray_DIM(array, i)};
    }
  }
  qsort(axes, n, sizeof *axes, by_stride);
  npy_intp reach = 0; /* from the first to the last element along the axes seen so far */
  for (size_t i = 0; i < n; i++) {
    if (axes[i].stride <= reach) {
      return true;
    }
    reach += axes[i].stride * (axes[i].length - 1);
  }
  return false;
}

PyArrayObject *output_array(PyObject *obj, argument arg, int typenum, int ndim, const npy_intp *dims) {
  PyArrayObject *array = (PyArrayObject *)obj;
  if (!check_type(obj, arg, typenum) || !has_shape(array, arg, ndim, dims, NULL)) {
    return NULL;
  }
  if (PyArray_FailUnlessWriteable(array, arg.name) < 0) {
    return NULL;
  }
  if (!PyArray_ISALIGNED(array)) {
    raise_for(PyExc_ValueError, arg, "must be aligned, got an unaligned array");
    return NULL;
  }
  if (PyArray_SIZE(array) > 0 && overlaps_itself(array)) {
    PyObject *strides = PyArray_IntTupleFromIntp(PyArray_NDIM(array), PyArray_STRIDES(array));
    if (strides != NULL) {
      raise_for(PyExc_ValueError, arg, "must not overlap itself, got strides %S", strides);
      Py_DECREF(strides);
    }
    return NULL;
  }
  return array;
}

/* The first byte of an array's memory and the first one behind it. */
static void memory_bounds(PyArrayObject *array, uintptr_t *first, uintptr_t *end) {
  *first = *end = (uintptr_t)PyArray_DATA(array);
  for (int i = 0; i < PyArray_NDIM(array); i++) {
    npy_intp reach = PyArray_STRIDE(array, i) * (PyArray_DIM(array, i) - 1);
    *(reach < 0 ? first : end) += (uintptr_t)reach;
  }
  *end += (uintptr_t)PyArray_ITEMSIZE(array);
}

bool is_apart(PyArrayObject *out, PyArrayObject *input, argument arg, PyObject *shares_memory) {
  if (input == NULL || PyArray_SIZE(out) == 0 || PyArray_SIZE(input) == 0) {
    return true;
  }
  uintptr_t out_first, out_end, first, end;
  memory_bounds(out, &out_first, &out_end);
  memory_bounds(input, &first, &end);
  if (out_end <= first || end <= out_first) {
    return true;
  }
  /* Two slices of one buffer, say: whether they have an element in common is an integer problem that NumPy solves. */
  PyObject *answer = PyObject_CallFunctionObjArgs(shares_memory, (PyObject *)out, (PyObject *)input, NULL);
  int shared = answer == NULL ? -1 : PyObject_IsTrue(answer);
  Py_XDECREF(answer);
  if (shared > 0) {
    raise_for(PyExc_ValueError, arg, "must not overlap out");
  }
  return shared == 0;
}

PyArrayObject *new_array(int ndim, const npy_intp *dims, int typenum) {
  return (PyArrayObject *)PyArray_SimpleNew(ndim, (npy_intp *)dims, typenum);
}

/* In elements. What NumPy leaves in the stride of an axis of length 1 means nothing, and the core's choice of kernel
 * must not depend on it: such an axis is given the stride of a contiguous array. */
static int64_t stride(PyArrayObject *array, int i, int64_t contiguous) {
  return PyArray_DIM(array, i) > 1 ? PyArray_STRIDE(array, i) / PyArray_ITEMSIZE(array) : contiguous;
}

ml_tokens tokens_view(PyArrayObject *array) {
  int last = PyArray_NDIM(array) - 1;
  if (PyArray_SIZE(array) == 0) {
    return (ml_tokens){PyArray_DATA(array), 1, 1, 1}; /* never followed, but a zero would mean something */
  }
  ml_tokens view = {.data = PyArray_DATA(array), .col = stride(array, last, 1)};
  if (last > 0) {
    view.seq = stride(array, last - 1, PyArray_DIM(array, last));
    view.batch = last == 2 ? stride(array, 0, view.seq * PyArray_DIM(array, 1)) : view.seq * PyArray_DIM(array, 0);
  }
  return view;
}

ml_tokens sequences_view(PyArrayObject *array) {
  ml_matrix rows = matrix_view(array);
  return (ml_tokens){.data = rows.data, .batch = rows.row, .seq = 0, .col = rows.col};
}

ml_matrix matrix_view(PyArrayObject *array) {
  if (array == NULL) {
    return (ml_matrix){NULL, 0, 0};
  }
  return (ml_matrix){PyArray_DATA(array), stride(array, 0, PyArray_DIM(array, 1)), stride(array, 1, 1)};
}
