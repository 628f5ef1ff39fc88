/* NumPy arrays as the core sees them: checked, then viewed as pointers and strides.
 *
 * Every function that can fail sets a Python exception, naming the argument, what it got and what it takes.
 */
#ifndef MOELORA_ARRAYS_H
#define MOELORA_ARRAYS_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#define NPY_NO_DEPRECATED_API NPY_2_0_API_VERSION
#define PY_ARRAY_UNIQUE_SYMBOL moelora_array_api
#ifndef MOELORA_IMPORTS_NUMPY
#define NO_IMPORT_ARRAY
#endif
#include <numpy/arrayobject.h>

#include "moelora.h"

/* What errors call an argument: "x", or "lora_A[3]" where index >= 0. */
typedef struct {
  const char *name;
  Py_ssize_t index;
} argument;

#define ARG(name) ((argument){name, -1})

/* Sets an exception whose text is the argument's name and the formatted rest. Returns false. */
bool raise_for(PyObject *exception, argument arg, const char *format, ...);

/* Sets a ValueError: arg must have shape `expected`, got that of array. Returns false. */
bool raise_shape(PyArrayObject *array, argument arg, const char *expected);

const char *typenum_text(int typenum);

/* Whether obj is an ndarray; -1: an error is set. A masked array's mask would be ignored, so it is none here. */
int is_array(PyObject *obj);

/* An input of type NPY_FLOAT or NPY_DOUBLE, or of either where typenum is NPY_NOTYPE. A new reference to obj itself or,
 * where its elements are not aligned, to a copy. NULL: an error is set. */
PyArrayObject *input_array(PyObject *obj, argument arg, int typenum);

/* Checks ndim and dims; ANY stands for every number but 0, and name for it in the error. */
enum { ANY = -1 };
bool has_shape(PyArrayObject *array, argument arg, int ndim, const npy_intp *dims, const char *name);

/* Checks that obj can be written to as an output of that type and shape: no copy helps here. Borrows obj. */
PyArrayObject *output_array(PyObject *obj, argument arg, int typenum, int ndim, const npy_intp *dims);

/* Checks that out shares no memory with input (NULL: nothing to share). shares_memory is numpy.shares_memory. */
bool is_apart(PyArrayObject *out, PyArrayObject *input, argument arg, PyObject *shares_memory);

/* A new contiguous array, not initialised. */
PyArrayObject *new_array(int ndim, const npy_intp *dims, int typenum);

/* The whole of an array of 1 to 3 axes, the last one being the row of a token: two axes are one batch, one axis is the
 * same row for every token. */
ml_tokens tokens_view(PyArrayObject *array);

/* [B, N] as one row for each sequence. */
ml_tokens sequences_view(PyArrayObject *array);

/* The whole of a two-dimensional array; NULL: data == NULL. */
ml_matrix matrix_view(PyArrayObject *array);

#endif
