/* What Python may ask about CUDA: entries of the module, which _core.pyi describes. */
#ifndef MOELORA_PYTHON_CUDA_H
#define MOELORA_PYTHON_CUDA_H

#include "arrays.h"
#include "driver.h"

/* Sets the exception for a status; false for ML_CUDA_OK. */
bool raise_cuda(ml_cuda_status status);

PyObject *cuda_compile(PyObject *module, PyObject *const *args, Py_ssize_t n_args);
PyObject *cuda_cubin(PyObject *module, PyObject *const *args, Py_ssize_t n_args);
PyObject *set_cuda_places(PyObject *module, PyObject *const *args, Py_ssize_t n_args);
PyObject *cuda_sources(PyObject *module, PyObject *unused);
PyObject *cuda_driver(PyObject *module, PyObject *unused);
PyObject *cuda_compiler(PyObject *module, PyObject *unused);
PyObject *cuda_cache(PyObject *module, PyObject *unused);
PyObject *cuda_device(PyObject *module, PyObject *ordinal);

/* Routing on a GPU. */
PyObject *cuda_route(PyObject *module, PyObject *const *args, Py_ssize_t n_args);
PyObject *cuda_route_backward(PyObject *module, PyObject *const *args, Py_ssize_t n_args);

#endif
