/* What Python may ask about CUDA: entries of the module, which _core.pyi describes. */
#ifndef MOELORA_PYTHON_CUDA_H
#define MOELORA_PYTHON_CUDA_H

#include "arrays.h"

PyObject *cuda_compile(PyObject *module, PyObject *const *args, Py_ssize_t n_args);
PyObject *cuda_cubin(PyObject *module, PyObject *const *args, Py_ssize_t n_args);
PyObject *set_cuda_places(PyObject *module, PyObject *const *args, Py_ssize_t n_args);
PyObject *cuda_sources(PyObject *module, PyObject *unused);
PyObject *cuda_driver(PyObject *module, PyObject *unused);
PyObject *cuda_compiler(PyObject *module, PyObject *unused);
PyObject *cuda_cache(PyObject *module, PyObject *unused);
PyObject *cuda_device(PyObject *module, PyObject *ordinal);

#endif
