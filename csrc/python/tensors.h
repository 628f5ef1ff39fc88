/* torch tensors as the core sees them, without linking torch: they are read through DLPack's C exchange API, which
 * torch.Tensor offers in a capsule.
 */
#ifndef MOELORA_TENSORS_H
#define MOELORA_TENSORS_H

#include "arrays.h"

typedef struct dl_exchange_api dl_exchange_api;

/* What is known of torch; exchange == NULL: nothing, and no tensor is plain. Written while moelora.nn is imported. */
typedef struct {
  PyObject *tensor, *parameter; /* the types torch.Tensor and torch.nn.Parameter */
  PyObject *is_neg;             /* torch.Tensor.is_neg */
  PyObject *requires_grad;      /* the name of the attribute */
  PyObject *empty;              /* (shape, strides, dtype) -> a new CPU tensor */
  PyObject *empty_cuda;         /* the same on the current GPU */
  PyObject *empty_like, *linear;
  PyObject *float32, *float64, *bfloat16, *float16, *int64;
  const dl_exchange_api *exchange;
} torch_api;

int visit_torch(const torch_api *torch, visitproc visit, void *arg);
void clear_torch(torch_api *torch);

/* Entries of the module, which _core.pyi describes. */
PyObject *use_torch(PyObject *module, PyObject *const *args, Py_ssize_t n_args);
PyObject *are_plain(PyObject *module, PyObject *const *args, Py_ssize_t n_args);
PyObject *plain_call(PyObject *module, PyObject *const *args, Py_ssize_t n_args);
PyObject *forward_tensors(PyObject *module, PyObject *const *args, Py_ssize_t n_args);
PyObject *backward_tensors(PyObject *module, PyObject *const *args, Py_ssize_t n_args);
PyObject *cuda_call(PyObject *module, PyObject *const *args, Py_ssize_t n_args);
PyObject *cuda_forward(PyObject *module, PyObject *const *args, Py_ssize_t n_args);
PyObject *cuda_backward(PyObject *module, PyObject *const *args, Py_ssize_t n_args);
PyObject *cuda_prepare(PyObject *module, PyObject *const *args, Py_ssize_t n_args);
PyObject *cuda_mix(PyObject *module, PyObject *const *args, Py_ssize_t n_args);
PyObject *cuda_mix_backward(PyObject *module, PyObject *const *args, Py_ssize_t n_args);
PyObject *cuda_drop_backward(PyObject *module, PyObject *const *args, Py_ssize_t n_args);
PyObject *cuda_way(PyObject *module, PyObject *const *args, Py_ssize_t n_args);
PyObject *set_cuda_way(PyObject *module, PyObject *name);
PyObject *route_tensors(PyObject *module, PyObject *const *args, Py_ssize_t n_args);
PyObject *route_backward_tensors(PyObject *module, PyObject *const *args, Py_ssize_t n_args);

#endif
