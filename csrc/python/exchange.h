/* How torch tensors are read: DLPack's C exchange API. */
#ifndef MOELORA_EXCHANGE_H
#define MOELORA_EXCHANGE_H

#include <stdint.h>

#include "tensors.h"

/* The part of DLPack's ABI, major version 1, that is used here. */

enum { DL_MAJOR = 1, DL_CPU = 1, DL_CUDA = 2, DL_INT = 0, DL_FLOAT = 2, DL_BFLOAT = 4, DL_BOOL = 6 };

typedef struct {
  void *data;
  struct {
    int32_t type, id;
  } device;
  int32_t ndim;
  struct {
    uint8_t code, bits;
    uint16_t lanes;
  } dtype;
  int64_t *shape, *strides; /* [ndim]; strides count elements */
  uint64_t byte_offset;
} dl_tensor;

/* A tensor that is owned; who has it calls delete, or gives it away. */
typedef struct dl_owned {
  uint32_t major, minor;
  void *context;
  void (*delete)(struct dl_owned *);
  uint64_t flags;
  dl_tensor tensor;
} dl_owned;

typedef void dl_raise(void *context, const char *kind, const char *message);

struct dl_exchange_api {
  uint32_t major, minor;
  const dl_exchange_api *older;
  int (*allocate)(dl_tensor *prototype, dl_owned **out, void *context, dl_raise *raise);
  void (*unused)(void);
  int (*wrap)(dl_owned *tensor, void **out);  /* takes the tensor; other than 0: an exception is set */
  int (*read)(void *tensor, dl_tensor *view); /* NULL: not offered. Borrows; other than 0: an exception is set */
  int (*stream)(int32_t device_type, int32_t id, void **out); /* on which the device's work is now */
};

/* Whether obj is exactly a torch.Tensor or Parameter with memory of its own on a device of that type. The view lives as long as
 * obj. */
bool view_on(const torch_api *torch, int32_t device_type, PyObject *obj, dl_tensor *view);

bool is_of(const dl_tensor *view, uint8_t code, uint8_t bits);

/* Whether `ndim` leading axes are as good as one, of n numbers that lie `stride` apart, in memory that is there. */
bool is_one_axis(const dl_tensor *view, int ndim, int64_t *n, int64_t *stride);

/* Whether one of the tensors (None is passed over) holds the negatives of what its memory does; requires a gradient (-1 with an
 * exception). */
bool any_negated(const torch_api *torch, PyObject *const *tensors, Py_ssize_t n);
int any_requires_grad(const torch_api *torch, PyObject *const *tensors, Py_ssize_t n);

/* lora_A and lora_B, two lists or tuples of as many items, as one tuple; a float for all experts, or a list or tuple, as a
 * tuple. None where they are something else; NULL with an exception. */
PyObject *joined(PyObject *lora_A, PyObject *lora_B);
PyObject *spread_scaling(PyObject *scaling, Py_ssize_t n);

/* What scaling and dropout are in the plain case: a tuple of a float for each of n experts, none beyond `largest`, and None or a seed
 * with a tuple of a probability for each. To `to`, and `step` doubles further for each expert after the first. false: something
 * else. */
bool read_scalings(PyObject *scaling, Py_ssize_t n, double largest, double *to, size_t step);
bool read_dropout(PyObject *dropout, Py_ssize_t n, uint64_t *seed, double *to, size_t step);

/* The tensors that a forward saved, then its adapters; the arguments of its autograd node, then the adapters. */
enum { SAVED_X, SAVED_HIDDEN, SAVED_ROUTING_WEIGHTS, SAVED_WEIGHT, N_SAVED };
enum { NODE_X, NODE_ROUTING_WEIGHTS, NODE_BASE_OUTPUT, NODE_FROZEN, NODE_SETTINGS, N_NODE };

/* Whether something is the plain case; ERROR: an exception is set. */
typedef enum { NO = 0, YES = 1, ERROR = -1 } answer;

/* A new tensor without gaps by torch's empty_strided, not initialised; NULL with an exception. */
PyObject *new_dense(PyObject *empty, PyObject *dtype, int axes, const int64_t *sizes);

#endif
