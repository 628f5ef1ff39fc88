/* What the entries of moelora._core share. */
#ifndef MOELORA_MODULE_H
#define MOELORA_MODULE_H

#include "arrays.h"
#include "tensors.h"

typedef struct {
  PyObject *shares_memory; /* numpy.shares_memory */
  torch_api torch;
} module_state;

module_state *state_of(PyObject *module);

/* Sets the exception for a status; false for ML_OK. */
bool raise_status(ml_status status);

/* Whether `function` got as many arguments as it takes; otherwise an exception is set. */
bool takes(const char *function, Py_ssize_t wanted, Py_ssize_t got);

bool read_int64(PyObject *obj, const char *name, int64_t *value);
bool read_n_threads(PyObject *obj, int *n_threads);

/* Whether obj is a list or tuple, of n items where n >= 0; otherwise an exception is set. Borrows obj. */
bool is_items(PyObject *obj, const char *name, Py_ssize_t n);

/* What a call may keep on the stack; more experts than that go to the heap. */
enum { FEW_EXPERTS = 64 };

ml_expert *experts_for(Py_ssize_t n, ml_expert few[FEW_EXPERTS]);
void free_experts(ml_expert *experts, const ml_expert few[FEW_EXPERTS]);

#endif
