/* moelora._core: the border between Python and the core, the only C beside arrays.c, tensors.c and cuda.c that sees
 * Python.h.
 *
 * No arithmetic happens here. An entry checks everything while it holds the GIL, releases it around one call of the
 * core, and leaves through `done`. moelora.functional documents the NumPy entries, _core.pyi the positions of their
 * arguments.
 */
#define MOELORA_IMPORTS_NUMPY
#include "arrays.h"

#include <float.h>
#include <math.h>

#include "compiler.h"
#include "cuda.h"
#include "module.h"

module_state *state_of(PyObject *module) { return PyModule_GetState(module); }

bool raise_status(ml_status status) {
  if (status == ML_ERR_NO_MEMORY) {
    PyErr_NoMemory();
  } else if (status != ML_OK) {
    PyErr_SetString(PyExc_ValueError, ml_status_message(status));
  }
  return status != ML_OK;
}

bool takes(const char *function, Py_ssize_t wanted, Py_ssize_t got) {
  if (wanted != got) {
    PyErr_Format(PyExc_TypeError, "%s takes %zd arguments, got %zd", function, wanted, got);
  }
  return wanted == got;
}

/* ---- numbers ---- */

bool read_int64(PyObject *obj, const char *name, int64_t *value) {
  if (!PyLong_Check(obj)) {
    return raise_for(PyExc_TypeError, ARG(name), "must be an int, got %s", Py_TYPE(obj)->tp_name);
  }
  int overflow = 0;
  *value = PyLong_AsLongLongAndOverflow(obj, &overflow);
  if (overflow != 0) {
    return raise_for(PyExc_ValueError, ARG(name), "must fit into 64 bits, got %S", obj);
  }
  return *value != -1 || !PyErr_Occurred();
}

bool read_n_threads(PyObject *obj, int *n_threads) {
  int64_t n = 0;
  if (!read_int64(obj, "n_threads", &n)) {
    return false;
  }
  if (n < 0) {
    return raise_for(PyExc_ValueError, ARG("n_threads"), "must not be negative, got %S", obj);
  }
  *n_threads = (int)Py_MIN(n, ML_MAX_THREADS);
  return true;
}

/* None is 0, which is how the core says dense. */
static bool read_top_k(PyObject *obj, int64_t n_experts, int64_t *top_k) {
  *top_k = 0;
  if (obj == Py_None) {
    return true;
  }
  bool is_bool = PyBool_Check(obj) || PyArray_IsScalar(obj, Bool);
  if (!is_bool) {
    *top_k = PyNumber_AsSsize_t(obj, NULL); /* clips what doesn't fit */
  }
  if (is_bool || (PyErr_Occurred() && PyErr_ExceptionMatches(PyExc_TypeError))) {
    return raise_for(PyExc_TypeError, ARG("top_k"), "must be None or an integer in [1, %lld], got %s",
                     (long long)n_experts, Py_TYPE(obj)->tp_name);
  }
  if (PyErr_Occurred()) {
    return false;
  }
  if (*top_k < 1 || *top_k > n_experts) {
    return raise_for(PyExc_ValueError, ARG("top_k"), "must be None or an integer in [1, %lld], got %S",
                     (long long)n_experts, obj);
  }
  return true;
}

/* False with an exception set where obj is no real number; complex NumPy numbers have a __float__ too. */
static bool read_real(PyObject *obj, argument arg, double *value) {
  bool is_complex = PyArray_IsScalar(obj, ComplexFloating) ||
                    (PyArray_Check(obj) && PyTypeNum_ISCOMPLEX(PyArray_TYPE((PyArrayObject *)obj)));
  *value = is_complex ? -1.0 : PyFloat_AsDouble(obj);
  if (!is_complex && (*value != -1.0 || !PyErr_Occurred())) {
    return true;
  }
  if (is_complex || PyErr_ExceptionMatches(PyExc_TypeError)) {
    raise_for(PyExc_TypeError, arg, "must be a real number, got %s", Py_TYPE(obj)->tp_name);
  } else if (PyErr_ExceptionMatches(PyExc_OverflowError)) {
    raise_for(PyExc_ValueError, arg, "must be finite, got an integer beyond every float");
  }
  return false;
}

ml_expert *experts_for(Py_ssize_t n, ml_expert few[FEW_EXPERTS]) {
  ml_expert *experts = n <= FEW_EXPERTS ? few : PyMem_New(ml_expert, (size_t)n);
  if (experts == NULL) {
    PyErr_NoMemory();
    return NULL;
  }
  memset(experts, 0, (size_t)n * sizeof *experts);
  return experts;
}

void free_experts(ml_expert *experts, const ml_expert few[FEW_EXPERTS]) {
  if (experts != few) {
    PyMem_Free(experts);
  }
}

/* ---- NumPy: what forward and backward share ---- */

typedef struct {
  ml_routed_lora core;
  ml_expert few[FEW_EXPERTS], *experts;
  int64_t n_experts, total_rank;
  int typenum;
  PyArrayObject *x, *routing_weights, *weight; /* weight: NULL where None */
  PyObject *lora_A, *lora_B;                   /* tuples of the arrays that the core reads */
} mixture;

static void free_mixture(mixture *m) {
  free_experts(m->experts, m->few);
  Py_XDECREF(m->x);
  Py_XDECREF(m->routing_weights);
  Py_XDECREF(m->weight);
  Py_XDECREF(m->lora_A);
  Py_XDECREF(m->lora_B);
}

static PyArrayObject *expert_array(PyObject *arrays, int64_t e) { return (PyArrayObject *)PyTuple_GET_ITEM(arrays, e); }

/* A tuple of the arrays in a sequence. */
static PyObject *read_arrays(PyObject *obj, const char *name, int typenum) {
  if (!PySequence_Check(obj)) {
    raise_for(PyExc_TypeError, ARG(name), "must be a sequence of arrays, got %s", Py_TYPE(obj)->tp_name);
    return NULL;
  }
  PyObject *given = PySequence_Tuple(obj);
  PyObject *arrays = given == NULL ? NULL : PyTuple_New(PyTuple_GET_SIZE(given));
  for (Py_ssize_t e = 0; arrays != NULL && e < PyTuple_GET_SIZE(given); e++) {
    PyArrayObject *array = input_array(PyTuple_GET_ITEM(given, e), (argument){name, e}, typenum);
    if (array == NULL) {
      Py_CLEAR(arrays);
    } else {
      PyTuple_SET_ITEM(arrays, e, (PyObject *)array);
    }
  }
  Py_XDECREF(given);
  return arrays;
}

static bool read_x(mixture *m, PyObject *obj) {
  m->x = input_array(obj, ARG("x"), NPY_NOTYPE);
  if (m->x == NULL) {
    return false;
  }
  int ndim = PyArray_NDIM(m->x);
  if ((ndim != 2 && ndim != 3) || PyArray_DIM(m->x, ndim - 1) == 0) {
    return raise_shape(m->x, ARG("x"), "[T, d_in] or [B, S, d_in] with d_in > 0");
  }
  m->typenum = PyArray_TYPE(m->x);
  m->core.dtype = m->typenum == NPY_FLOAT ? ML_F32 : ML_F64;
  m->core.batch = ndim == 3 ? PyArray_DIM(m->x, 0) : 1;
  m->core.seq = PyArray_DIM(m->x, ndim - 2);
  m->core.d_in = PyArray_DIM(m->x, ndim - 1);
  m->core.x = tokens_view(m->x);
  return true;
}

static bool read_experts(mixture *m, PyObject *lora_A, PyObject *lora_B) {
  m->lora_A = read_arrays(lora_A, "lora_A", m->typenum);
  m->lora_B = m->lora_A == NULL ? NULL : read_arrays(lora_B, "lora_B", m->typenum);
  if (m->lora_B == NULL) {
    return false;
  }
  m->n_experts = m->core.n_experts = PyTuple_GET_SIZE(m->lora_A);
  if (m->n_experts == 0) {
    PyErr_SetString(PyExc_ValueError, "lora_A must hold at least one array, got none");
    return false;
  }
  if (PyTuple_GET_SIZE(m->lora_B) != m->n_experts) {
    PyErr_Format(PyExc_ValueError, "lora_B must hold %lld arrays, as many as lora_A, got %zd", (long long)m->n_experts,
                 PyTuple_GET_SIZE(m->lora_B));
    return false;
  }
  m->core.experts = m->experts = experts_for(m->n_experts, m->few);
  if (m->experts == NULL) {
    return false;
  }
  for (int64_t e = 0; e < m->n_experts; e++) {
    PyArrayObject *a = expert_array(m->lora_A, e), *b = expert_array(m->lora_B, e);
    if (!has_shape(a, (argument){"lora_A", e}, 2, (npy_intp[]){ANY, m->core.d_in}, "r")) {
      return false;
    }
    int64_t rank = PyArray_DIM(a, 0);
    if (!has_shape(b, (argument){"lora_B", e}, 2, (npy_intp[]){e == 0 ? ANY : m->core.d_out, rank}, "d_out")) {
      return false;
    }
    m->core.d_out = PyArray_DIM(b, 0);
    m->experts[e] = (ml_expert){.a = matrix_view(a), .b = matrix_view(b), .rank = rank};
    if (ML_ADD_OVERFLOWS(m->total_rank, rank, &m->total_rank)) {
      PyErr_SetString(PyExc_ValueError, "lora_A holds more ranks than can be counted");
      return false;
    }
  }
  return true;
}

/* A real number for all experts, or one for each. */
static bool read_scalings(mixture *m, PyObject *obj) {
  bool many = PyArray_Check(obj) ? PyArray_NDIM((PyArrayObject *)obj) > 0
                                 : PySequence_Check(obj) && !PyUnicode_Check(obj) && !PyBytes_Check(obj);
  PyObject *numbers = many ? PySequence_Tuple(obj) : PyTuple_Pack(1, obj);
  if (numbers == NULL) {
    return false;
  }
  bool read = false;
  if (many && PyTuple_GET_SIZE(numbers) != m->n_experts) {
    PyErr_Format(PyExc_ValueError, "scaling must be a real number or %lld of them, one per expert, got %zd",
                 (long long)m->n_experts, PyTuple_GET_SIZE(numbers));
    goto done;
  }
  double largest = m->typenum == NPY_FLOAT ? (double)FLT_MAX : DBL_MAX;
  for (int64_t e = 0; e < m->n_experts; e++) {
    argument arg = {"scaling", many ? e : -1};
    PyObject *number = PyTuple_GET_ITEM(numbers, many ? e : 0);
    if (!read_real(number, arg, &m->experts[e].scaling)) {
      goto done;
    }
    if (!(fabs(m->experts[e].scaling) <= largest)) {
      raise_for(PyExc_ValueError, arg, "must be finite in %s, got %S", typenum_text(m->typenum), number);
      goto done;
    }
  }
  read = true;
done:
  Py_DECREF(numbers);
  return read;
}

/* The shape of anything that has `width` numbers for each token; returns how many axes that is. */
static int token_shape(const mixture *m, int64_t width, npy_intp dims[3]) {
  int ndim = PyArray_NDIM(m->x);
  dims[0] = PyArray_DIM(m->x, 0);
  dims[1] = PyArray_DIM(m->x, 1);
  dims[ndim - 1] = width;
  return ndim;
}

/* Whether the core can count the numbers, and NumPy the bytes, of a [tokens, width] array. */
static bool is_addressable(const mixture *m, int64_t width, const char *name) {
  int64_t bytes;
  if (ML_MUL_OVERFLOWS(m->core.batch, m->core.seq, &bytes) || ML_MUL_OVERFLOWS(bytes, width, &bytes) ||
      ML_MUL_OVERFLOWS(bytes, (int64_t)sizeof(double), &bytes) || bytes > PTRDIFF_MAX) {
    PyErr_Format(PyExc_ValueError, "%s would be too large: %lld x %lld tokens of %lld numbers", name,
                 (long long)m->core.batch, (long long)m->core.seq, (long long)width);
    return false;
  }
  return true;
}

/* The number of axes decides what an array is: [N], [B, N] or one row per token. */
static ml_tokens weights_view(const mixture *m, PyArrayObject *array) {
  bool per_sequence = PyArray_NDIM(array) == 2 && PyArray_NDIM(m->x) == 3;
  return per_sequence ? sequences_view(array) : tokens_view(array);
}

static bool read_weights(mixture *m, PyObject *obj) {
  m->routing_weights = input_array(obj, ARG("routing_weights"), m->typenum);
  if (m->routing_weights == NULL) {
    return false;
  }
  npy_intp dims[3];
  int x_ndim = token_shape(m, m->n_experts, dims), ndim = PyArray_NDIM(m->routing_weights);
  bool right = ndim >= 1 && ndim <= x_ndim && PyArray_DIM(m->routing_weights, ndim - 1) == m->n_experts;
  for (int i = 0; right && i < ndim - 1; i++) {
    right = PyArray_DIM(m->routing_weights, i) == dims[i];
  }
  if (!right) {
    char expected[160];
    long long b = dims[0], s = dims[1], n = m->n_experts;
    if (x_ndim == 3) {
      snprintf(expected, sizeof expected, "[%lld], [%lld, %lld] or [%lld, %lld, %lld]", n, b, n, b, s, n);
    } else {
      snprintf(expected, sizeof expected, "[%lld] or [%lld, %lld]", n, b, n);
    }
    return raise_shape(m->routing_weights, ARG("routing_weights"), expected);
  }
  m->core.routing_weights = weights_view(m, m->routing_weights);
  return true;
}

static bool read_weight(mixture *m, PyObject *obj) {
  if (obj == Py_None) {
    return true;
  }
  m->weight = input_array(obj, ARG("weight"), m->typenum);
  if (m->weight == NULL || !has_shape(m->weight, ARG("weight"), 2, (npy_intp[]){m->core.d_out, m->core.d_in}, NULL)) {
    return false;
  }
  m->core.weight = matrix_view(m->weight);
  return true;
}

/* On failure an exception is set; free_mixture wants m in either case. m must be all zeros. */
static bool read_mixture(mixture *m, PyObject *x, PyObject *lora_A, PyObject *lora_B, PyObject *routing_weights,
                         PyObject *scaling, PyObject *weight, PyObject *top_k, PyObject *n_threads) {
  return read_x(m, x) && read_experts(m, lora_A, lora_B) && read_weights(m, routing_weights) &&
         read_scalings(m, scaling) && read_weight(m, weight) && read_top_k(top_k, m->n_experts, &m->core.top_k) &&
         read_n_threads(n_threads, &m->core.n_threads) && is_addressable(m, m->core.d_in, "x") &&
         is_addressable(m, m->core.d_out, "y") && is_addressable(m, m->total_rank, "hidden") &&
         is_addressable(m, m->n_experts, "routing_weights");
}

/* ---- NumPy: forward ---- */

static bool out_is_apart(const mixture *m, PyArrayObject *out, PyArrayObject *bias, PyObject *shares_memory) {
  for (int64_t e = 0; e < m->n_experts; e++) {
    if (!is_apart(out, expert_array(m->lora_A, e), (argument){"lora_A", e}, shares_memory) ||
        !is_apart(out, expert_array(m->lora_B, e), (argument){"lora_B", e}, shares_memory)) {
      return false;
    }
  }
  return is_apart(out, m->x, ARG("x"), shares_memory) &&
         is_apart(out, m->routing_weights, ARG("routing_weights"), shares_memory) &&
         is_apart(out, m->weight, ARG("weight"), shares_memory) && is_apart(out, bias, ARG("bias"), shares_memory);
}

/* (x, lora_A, lora_B, routing_weights, scaling, weight, bias, top_k, out, n_threads) -> (y, hidden) */
static PyObject *routed_lora_forward(PyObject *module, PyObject *const *args, Py_ssize_t n_args) {
  PyObject *result = NULL;
  PyArrayObject *bias = NULL, *y = NULL, *hidden = NULL;
  mixture m = {0};
  if (!takes("routed_lora_forward", 10, n_args) ||
      !read_mixture(&m, args[0], args[1], args[2], args[3], args[4], args[5], args[7], args[9])) {
    goto done;
  }
  if (args[6] != Py_None) {
    if (m.weight == NULL) {
      PyErr_SetString(PyExc_ValueError, "bias needs weight: it belongs to the base product");
      goto done;
    }
    bias = input_array(args[6], ARG("bias"), m.typenum);
    if (bias == NULL || !has_shape(bias, ARG("bias"), 1, (npy_intp[]){m.core.d_out}, NULL)) {
      goto done;
    }
  }
  npy_intp dims[3];
  int ndim = token_shape(&m, m.core.d_out, dims);
  if (args[8] == Py_None) {
    y = new_array(ndim, dims, m.typenum);
  } else {
    y = output_array(args[8], ARG("out"), m.typenum, ndim, dims);
    Py_XINCREF(y);
    if (y != NULL && !out_is_apart(&m, y, bias, state_of(module)->shares_memory)) {
      goto done;
    }
  }
  token_shape(&m, m.total_rank, dims);
  hidden = y == NULL ? NULL : new_array(ndim, dims, m.typenum);
  if (hidden == NULL) {
    goto done;
  }
  ml_tokens y_view = tokens_view(y), hidden_view = tokens_view(hidden), no_base = {0};
  ml_tokens bias_view = bias == NULL ? (ml_tokens){0} : tokens_view(bias);
  ml_status status;
  Py_BEGIN_ALLOW_THREADS;
  status = ml_routed_lora_forward(&m.core, y_view, hidden_view, no_base, bias_view.data, bias_view.col);
  Py_END_ALLOW_THREADS;
  if (!raise_status(status)) {
    result = PyTuple_Pack(2, y, hidden);
  }
done:
  Py_XDECREF(hidden);
  Py_XDECREF(y);
  Py_XDECREF(bias);
  free_mixture(&m);
  return result;
}

/* ---- NumPy: backward ---- */

enum { NEED_X, NEED_A, NEED_B, NEED_W, N_GRADS };
static const char *const grad_names[N_GRADS] = {"x", "lora_A", "lora_B", "routing_weights"};

static bool read_need(PyObject *obj, bool need[N_GRADS]) {
  PyObject *names = PyUnicode_Check(obj) ? NULL : PySequence_Tuple(obj);
  if (names == NULL) {
    if (!PyErr_Occurred() || PyErr_ExceptionMatches(PyExc_TypeError)) {
      PyErr_Format(PyExc_TypeError, "need must be a collection of names, got %s", Py_TYPE(obj)->tp_name);
    }
    return false;
  }
  bool known = true;
  for (Py_ssize_t i = 0; known && i < PyTuple_GET_SIZE(names); i++) {
    PyObject *name = PyTuple_GET_ITEM(names, i);
    known = false;
    for (int grad = 0; PyUnicode_Check(name) && !known && grad < N_GRADS; grad++) {
      known = PyUnicode_CompareWithASCIIString(name, grad_names[grad]) == 0;
      need[grad] |= known;
    }
    if (!known) {
      PyErr_Format(PyExc_ValueError, "need takes the names x, lora_A, lora_B and routing_weights, got %R", name);
    }
  }
  Py_DECREF(names);
  return known;
}

/* A list of new arrays, one in the shape of each of those given. */
static PyObject *new_arrays_like(PyObject *arrays, int typenum) {
  PyObject *list = PyList_New(PyTuple_GET_SIZE(arrays));
  for (Py_ssize_t e = 0; list != NULL && e < PyTuple_GET_SIZE(arrays); e++) {
    PyArrayObject *array = new_array(2, PyArray_DIMS(expert_array(arrays, e)), typenum);
    if (array == NULL) {
      Py_CLEAR(list);
    } else {
      PyList_SET_ITEM(list, e, (PyObject *)array);
    }
  }
  return list;
}

/* (grad_y, x, hidden, lora_A, lora_B, routing_weights, scaling, weight, top_k, need, n_threads)
 * -> (x, lora_A, lora_B, routing_weights), None for what need doesn't name */
static PyObject *routed_lora_backward(PyObject *module, PyObject *const *args, Py_ssize_t n_args) {
  (void)module;
  PyObject *result = NULL, *grads[N_GRADS] = {NULL};
  PyArrayObject *grad_y = NULL, *hidden = NULL;
  mixture m = {0};
  bool need[N_GRADS] = {false};
  if (!takes("routed_lora_backward", 11, n_args) || !read_need(args[9], need) ||
      !read_mixture(&m, args[1], args[3], args[4], args[5], args[6], args[7], args[8], args[10])) {
    goto done;
  }
  npy_intp dims[3];
  int ndim = token_shape(&m, m.core.d_out, dims);
  grad_y = input_array(args[0], ARG("grad_y"), m.typenum);
  if (grad_y == NULL || !has_shape(grad_y, ARG("grad_y"), ndim, dims, NULL)) {
    goto done;
  }
  token_shape(&m, m.total_rank, dims);
  hidden = input_array(args[2], ARG("hidden"), m.typenum);
  if (hidden == NULL || !has_shape(hidden, ARG("hidden"), ndim, dims, NULL)) {
    goto done;
  }
  PyArrayObject *w = m.routing_weights;
  grads[NEED_X] = need[NEED_X] ? (PyObject *)new_array(ndim, PyArray_DIMS(m.x), m.typenum) : Py_NewRef(Py_None);
  grads[NEED_A] = need[NEED_A] ? new_arrays_like(m.lora_A, m.typenum) : Py_NewRef(Py_None);
  grads[NEED_B] = need[NEED_B] ? new_arrays_like(m.lora_B, m.typenum) : Py_NewRef(Py_None);
  grads[NEED_W] =
      need[NEED_W] ? (PyObject *)new_array(PyArray_NDIM(w), PyArray_DIMS(w), m.typenum) : Py_NewRef(Py_None);
  for (int grad = 0; grad < N_GRADS; grad++) {
    if (grads[grad] == NULL) {
      goto done;
    }
  }
  for (int64_t e = 0; e < m.n_experts; e++) {
    if (need[NEED_A]) {
      m.experts[e].grad_a = matrix_view((PyArrayObject *)PyList_GET_ITEM(grads[NEED_A], e));
    }
    if (need[NEED_B]) {
      m.experts[e].grad_b = matrix_view((PyArrayObject *)PyList_GET_ITEM(grads[NEED_B], e));
    }
  }
  ml_tokens grad_y_view = tokens_view(grad_y), hidden_view = tokens_view(hidden), none = {0};
  ml_tokens grad_x_view = need[NEED_X] ? tokens_view((PyArrayObject *)grads[NEED_X]) : none;
  ml_tokens grad_w_view = need[NEED_W] ? weights_view(&m, (PyArrayObject *)grads[NEED_W]) : none;
  ml_status status;
  Py_BEGIN_ALLOW_THREADS;
  status = ml_routed_lora_backward(&m.core, grad_y_view, hidden_view, grad_x_view, grad_w_view, 0);
  Py_END_ALLOW_THREADS;
  if (!raise_status(status)) {
    result = PyTuple_Pack(N_GRADS, grads[NEED_X], grads[NEED_A], grads[NEED_B], grads[NEED_W]);
  }
done:
  for (int grad = 0; grad < N_GRADS; grad++) {
    Py_XDECREF(grads[grad]);
  }
  Py_XDECREF(hidden);
  Py_XDECREF(grad_y);
  free_mixture(&m);
  return result;
}

/* ---- raw pointers: the door for tensors. moelora.nn.cpu vouches for every pointer, stride and rank. ---- */

/* A tuple of n ints: a pointer, then strides. */
static bool read_view(PyObject *obj, const char *name, Py_ssize_t n, void **data, int64_t strides[3]) {
  if (!PyTuple_Check(obj) || PyTuple_GET_SIZE(obj) != n) {
    PyErr_Format(PyExc_TypeError, "%s must be a tuple of a pointer and %zd strides, got %R", name, n - 1, obj);
    return false;
  }
  *data = PyLong_AsVoidPtr(PyTuple_GET_ITEM(obj, 0));
  if (*data == NULL && PyErr_Occurred()) {
    return false;
  }
  for (Py_ssize_t i = 1; i < n; i++) {
    if (!read_int64(PyTuple_GET_ITEM(obj, i), name, &strides[i - 1])) {
      return false;
    }
  }
  return true;
}

static bool read_tokens(PyObject *obj, const char *name, ml_tokens *view) {
  int64_t strides[3];
  if (!read_view(obj, name, 4, &view->data, strides)) {
    return false;
  }
  view->batch = strides[0];
  view->seq = strides[1];
  view->col = strides[2];
  return true;
}

static bool read_matrix(PyObject *obj, const char *name, ml_matrix *view) {
  int64_t strides[3];
  if (!read_view(obj, name, 3, &view->data, strides)) {
    return false;
  }
  view->row = strides[0];
  view->col = strides[1];
  return true;
}

/* None leaves the view as it is: data == NULL. */
static bool read_optional_tokens(PyObject *obj, const char *name, ml_tokens *view) {
  return obj == Py_None || read_tokens(obj, name, view);
}

static bool read_optional_matrix(PyObject *obj, const char *name, ml_matrix *view) {
  return obj == Py_None || read_matrix(obj, name, view);
}

bool is_items(PyObject *obj, const char *name, Py_ssize_t n) {
  if (!PyList_Check(obj) && !PyTuple_Check(obj)) {
    PyErr_Format(PyExc_TypeError, "%s must be a list or a tuple, got %s", name, Py_TYPE(obj)->tp_name);
    return false;
  }
  if (n >= 0 && PySequence_Fast_GET_SIZE(obj) != n) {
    PyErr_Format(PyExc_ValueError, "%s must hold %zd items, got %zd", name, n, PySequence_Fast_GET_SIZE(obj));
    return false;
  }
  return true;
}

/* No other number: a __float__ could change the very lists that are being read. */
static bool read_float(PyObject *obj, argument arg, double *value) {
  if (!PyFloat_Check(obj)) {
    return raise_for(PyExc_TypeError, arg, "must be a float, got %s", Py_TYPE(obj)->tp_name);
  }
  *value = PyFloat_AS_DOUBLE(obj);
  return true;
}

typedef struct {
  ml_routed_lora core;
  ml_expert few[FEW_EXPERTS], *experts;
} raw_mixture;

/* args: dtype, shape, x, lora_A, lora_B, ranks, routing_weights, scaling */
static bool read_raw_mixture(raw_mixture *m, PyObject *const *args, PyObject *top_k, PyObject *n_threads) {
  PyObject *shape = args[1], *lora_A = args[3], *lora_B = args[4], *ranks = args[5], *scaling = args[7];
  int64_t dtype = 0;
  if (!read_int64(args[0], "dtype", &dtype) || !is_items(shape, "shape", 4) || !is_items(lora_A, "lora_A", -1)) {
    return false;
  }
  if (dtype != ML_F32 && dtype != ML_F64) {
    PyErr_Format(PyExc_ValueError, "dtype must be 0 (float32) or 1 (float64), got %lld", (long long)dtype);
    return false;
  }
  m->core.dtype = (ml_dtype)dtype;
  PyObject **dims = PySequence_Fast_ITEMS(shape);
  if (!read_int64(dims[0], "shape", &m->core.batch) || !read_int64(dims[1], "shape", &m->core.seq) ||
      !read_int64(dims[2], "shape", &m->core.d_in) || !read_int64(dims[3], "shape", &m->core.d_out)) {
    return false;
  }
  Py_ssize_t n = PySequence_Fast_GET_SIZE(lora_A);
  if (!is_items(lora_B, "lora_B", n) || !is_items(ranks, "ranks", n) || !is_items(scaling, "scaling", n) ||
      !read_tokens(args[2], "x", &m->core.x) || !read_tokens(args[6], "routing_weights", &m->core.routing_weights) ||
      !read_int64(top_k, "top_k", &m->core.top_k) || !read_n_threads(n_threads, &m->core.n_threads)) {
    return false;
  }
  m->core.n_experts = n;
  m->core.experts = m->experts = experts_for(n, m->few);
  if (m->experts == NULL) {
    return false;
  }
  for (Py_ssize_t e = 0; e < n; e++) {
    ml_expert *expert = &m->experts[e];
    if (!read_matrix(PySequence_Fast_GET_ITEM(lora_A, e), "lora_A", &expert->a) ||
        !read_matrix(PySequence_Fast_GET_ITEM(lora_B, e), "lora_B", &expert->b) ||
        !read_int64(PySequence_Fast_GET_ITEM(ranks, e), "ranks", &expert->rank) ||
        !read_float(PySequence_Fast_GET_ITEM(scaling, e), (argument){"scaling", e}, &expert->scaling)) {
      return false;
    }
  }
  return true;
}

/* None, or (seed, the experts' probabilities); the last argument, which may be left out. */
static bool read_raw_dropout(raw_mixture *m, PyObject *obj) {
  int64_t seed = 0;
  if (obj == Py_None) {
    return true;
  }
  if (!is_items(obj, "dropout", 2)) {
    return false;
  }
  PyObject *probabilities = PySequence_Fast_GET_ITEM(obj, 1);
  if (!read_int64(PySequence_Fast_GET_ITEM(obj, 0), "dropout", &seed) ||
      !is_items(probabilities, "dropout", (Py_ssize_t)m->core.n_experts)) {
    return false;
  }
  m->core.dropout_seed = (uint64_t)seed;
  for (Py_ssize_t e = 0; e < m->core.n_experts; e++) {
    PyObject *probability = PySequence_Fast_GET_ITEM(probabilities, e);
    if (!read_float(probability, (argument){"dropout", e}, &m->experts[e].dropout)) {
      return false;
    }
  }
  return true;
}

/* (dtype, shape, x, lora_A, lora_B, ranks, routing_weights, scaling, base, y, hidden, top_k, n_threads, dropout)
 * -> None */
static PyObject *forward_raw(PyObject *module, PyObject *const *args, Py_ssize_t n_args) {
  (void)module;
  PyObject *result = NULL;
  raw_mixture m = {.experts = m.few};
  ml_tokens base = {0}, y = {0}, hidden = {0};
  if (!takes("forward_raw", n_args == 14 ? 14 : 13, n_args) || !read_raw_mixture(&m, args, args[11], args[12]) ||
      (n_args == 14 && !read_raw_dropout(&m, args[13])) || !read_optional_tokens(args[8], "base", &base) ||
      !read_tokens(args[9], "y", &y) || !read_optional_tokens(args[10], "hidden", &hidden)) {
    goto done;
  }
  ml_status status;
  Py_BEGIN_ALLOW_THREADS;
  status = ml_routed_lora_forward(&m.core, y, hidden, base, NULL, 0);
  Py_END_ALLOW_THREADS;
  if (!raise_status(status)) {
    result = Py_NewRef(Py_None);
  }
done:
  free_experts(m.experts, m.few);
  return result;
}

/* (dtype, shape, x, lora_A, lora_B, ranks, routing_weights, scaling, grad_y, hidden, grad_x, grad_A, grad_B, grad_w,
 * top_k, n_threads, accumulate, dropout) -> None */
static PyObject *backward_raw(PyObject *module, PyObject *const *args, Py_ssize_t n_args) {
  (void)module;
  PyObject *result = NULL;
  raw_mixture m = {.experts = m.few};
  ml_tokens grad_y = {0}, hidden = {0}, grad_x = {0}, grad_w = {0};
  int64_t accumulate = 0;
  if (!takes("backward_raw", n_args == 18 ? 18 : 17, n_args) || !read_raw_mixture(&m, args, args[14], args[15]) ||
      (n_args == 18 && !read_raw_dropout(&m, args[17])) || !read_tokens(args[8], "grad_y", &grad_y) ||
      !read_optional_tokens(args[9], "hidden", &hidden) || !read_optional_tokens(args[10], "grad_x", &grad_x) ||
      !read_optional_tokens(args[13], "grad_w", &grad_w) || !read_int64(args[16], "accumulate", &accumulate)) {
    goto done;
  }
  if (accumulate & ~(int64_t)(ML_ACCUMULATE_X | ML_ACCUMULATE_A | ML_ACCUMULATE_B | ML_ACCUMULATE_W)) {
    raise_for(PyExc_ValueError, ARG("accumulate"), "has unknown bits, got %S", args[16]);
    goto done;
  }
  PyObject *grad_A = args[11], *grad_B = args[12];
  if ((grad_A != Py_None && !is_items(grad_A, "grad_A", m.core.n_experts)) ||
      (grad_B != Py_None && !is_items(grad_B, "grad_B", m.core.n_experts))) {
    goto done;
  }
  for (Py_ssize_t e = 0; e < m.core.n_experts; e++) {
    if ((grad_A != Py_None &&
         !read_optional_matrix(PySequence_Fast_GET_ITEM(grad_A, e), "grad_A", &m.experts[e].grad_a)) ||
        (grad_B != Py_None &&
         !read_optional_matrix(PySequence_Fast_GET_ITEM(grad_B, e), "grad_B", &m.experts[e].grad_b))) {
      goto done;
    }
  }
  ml_status status;
  Py_BEGIN_ALLOW_THREADS;
  status = ml_routed_lora_backward(&m.core, grad_y, hidden, grad_x, grad_w, (unsigned)accumulate);
  Py_END_ALLOW_THREADS;
  if (!raise_status(status)) {
    result = Py_NewRef(Py_None);
  }
done:
  free_experts(m.experts, m.few);
  return result;
}

/* ---- NumPy: routing ---- */

/* What route and route_backward share. */
typedef struct {
  ml_route_params core;
  int typenum;
  PyArrayObject *logits;      /* [..., N] as given */
  PyArrayObject *rows, *mask; /* [T, N] and [T]; mask: NULL where None */
} routing;

static void free_routing(routing *r) {
  Py_XDECREF(r->logits);
  Py_XDECREF(r->rows);
  Py_XDECREF(r->mask);
}

/* array as [T, width] where width > 0, else as [T]; a view where its strides allow that. Not of its subclass, which may
 * have another idea of the shape, as np.matrix has. */
static PyArrayObject *as_rows(PyArrayObject *array, int64_t n_tokens, int64_t width) {
  npy_intp dims[] = {n_tokens, width};
  PyArray_Dims shape = {dims, width > 0 ? 2 : 1};
  PyArrayObject *plain = (PyArrayObject *)PyArray_EnsureArray(Py_NewRef(array)), *rows = NULL;
  if (plain != NULL) {
    rows = (PyArrayObject *)PyArray_Newshape(plain, &shape, NPY_CORDER);
  }
  Py_XDECREF(plain);
  return rows;
}

/* Checks that array has one row of `width` for each token of logits, or one number where width is 0. */
static bool has_tokens_of(const routing *r, PyArrayObject *array, argument arg, int64_t width) {
  npy_intp dims[NPY_MAXDIMS];
  int ndim = PyArray_NDIM(r->logits);
  memcpy(dims, PyArray_DIMS(r->logits), (size_t)ndim * sizeof *dims);
  dims[ndim - 1] = width;
  return has_shape(array, arg, width > 0 ? ndim : ndim - 1, dims, NULL);
}

/* grad_weights in the shape of logits, as rows. */
static PyArrayObject *read_like_logits(const routing *r, PyObject *obj, argument arg) {
  PyArrayObject *given = input_array(obj, arg, r->typenum), *rows = NULL;
  if (given != NULL && has_tokens_of(r, given, arg, r->core.n_experts)) {
    rows = as_rows(given, r->core.n_tokens, r->core.n_experts);
  }
  Py_XDECREF(given);
  return rows;
}

static bool read_mask(routing *r, PyObject *obj) {
  if (obj == Py_None) {
    return true;
  }
  int array = is_array(obj);
  if (array < 0) {
    return false;
  }
  if (!array || PyArray_TYPE((PyArrayObject *)obj) != NPY_BOOL) {
    return raise_for(PyExc_TypeError, ARG("mask"), "must be a NumPy array of bool, got %S",
                     array ? (PyObject *)PyArray_DESCR((PyArrayObject *)obj) : (PyObject *)Py_TYPE(obj));
  }
  if (!has_tokens_of(r, (PyArrayObject *)obj, ARG("mask"), 0)) {
    return false;
  }
  r->mask = as_rows((PyArrayObject *)obj, r->core.n_tokens, 0);
  if (r->mask == NULL) {
    return false;
  }
  r->core.mask = PyArray_DATA(r->mask);
  r->core.mask_stride = PyArray_STRIDE(r->mask, 0);
  return true;
}

static bool read_routing(routing *r, PyObject *logits, PyObject *temperature, PyObject *renormalize, PyObject *mask,
                         PyObject *n_threads) {
  r->logits = input_array(logits, ARG("logits"), NPY_NOTYPE);
  if (r->logits == NULL) {
    return false;
  }
  int ndim = PyArray_NDIM(r->logits);
  if (ndim == 0 || PyArray_DIM(r->logits, ndim - 1) == 0) {
    return raise_shape(r->logits, ARG("logits"), "[..., N] with N > 0");
  }
  r->typenum = PyArray_TYPE(r->logits);
  r->core.dtype = r->typenum == NPY_FLOAT ? ML_F32 : ML_F64;
  r->core.n_experts = PyArray_DIM(r->logits, ndim - 1);
  r->core.n_tokens = PyArray_SIZE(r->logits) / r->core.n_experts;
  r->rows = as_rows(r->logits, r->core.n_tokens, r->core.n_experts);
  if (r->rows == NULL) {
    return false;
  }
  r->core.logits = matrix_view(r->rows);
  if (!read_real(temperature, ARG("temperature"), &r->core.temperature)) {
    return false;
  }
  if (!(r->core.temperature > 0 && r->core.temperature <= DBL_MAX)) {
    return raise_for(PyExc_ValueError, ARG("temperature"), "must be positive and finite, got %S", temperature);
  }
  int truth = PyObject_IsTrue(renormalize);
  r->core.renormalize = truth > 0;
  return truth >= 0 && read_mask(r, mask) && read_n_threads(n_threads, &r->core.n_threads);
}

/* (logits, top_k, temperature, renormalize, mask, n_threads) -> (weights, indices, counts, prob_sums) */
static PyObject *route(PyObject *module, PyObject *const *args, Py_ssize_t n_args) {
  (void)module;
  PyObject *result = NULL, *indices = NULL;
  PyArrayObject *weights = NULL, *counts = NULL, *prob_sums = NULL;
  routing r = {0};
  if (!takes("route", 6, n_args) || !read_routing(&r, args[0], args[2], args[3], args[4], args[5]) ||
      !read_top_k(args[1], r.core.n_experts, &r.core.top_k)) {
    goto done;
  }
  npy_intp dims[NPY_MAXDIMS];
  int ndim = PyArray_NDIM(r.logits);
  memcpy(dims, PyArray_DIMS(r.logits), (size_t)ndim * sizeof *dims);
  weights = new_array(ndim, dims, r.typenum);
  counts = new_array(1, (npy_intp[]){r.core.n_experts}, NPY_INT64);
  prob_sums = new_array(1, (npy_intp[]){r.core.n_experts}, r.typenum);
  dims[ndim - 1] = r.core.top_k;
  indices = r.core.top_k > 0 ? (PyObject *)new_array(ndim, dims, NPY_INT64) : Py_NewRef(Py_None);
  if (weights == NULL || counts == NULL || prob_sums == NULL || indices == NULL) {
    goto done;
  }
  int64_t *indices_data = r.core.top_k > 0 ? PyArray_DATA((PyArrayObject *)indices) : NULL;
  ml_status status;
  Py_BEGIN_ALLOW_THREADS;
  status = ml_route(&r.core, PyArray_DATA(weights), indices_data, PyArray_DATA(counts), PyArray_DATA(prob_sums));
  Py_END_ALLOW_THREADS;
  if (!raise_status(status)) {
    result = PyTuple_Pack(4, weights, indices, counts, prob_sums);
  }
done:
  Py_XDECREF(prob_sums);
  Py_XDECREF(counts);
  Py_XDECREF(indices);
  Py_XDECREF(weights);
  free_routing(&r);
  return result;
}

/* indices [..., k] of int64, each in [0, N); None for dense. Sets top_k; on success *indices is NULL or a contiguous
 * array. */
static bool read_indices(routing *r, PyObject *obj, PyArrayObject **indices) {
  if (obj == Py_None) {
    return true;
  }
  int array = is_array(obj);
  if (array < 0) {
    return false;
  }
  PyArrayObject *given = (PyArrayObject *)obj;
  if (!array || !PyArray_EquivTypenums(PyArray_TYPE(given), NPY_INT64) || !PyArray_ISNOTSWAPPED(given)) {
    return raise_for(PyExc_TypeError, ARG("indices"), "must be a NumPy array of int64, got %S",
                     array ? (PyObject *)PyArray_DESCR(given) : (PyObject *)Py_TYPE(obj));
  }
  int ndim = PyArray_NDIM(given);
  int64_t k = ndim > 0 ? PyArray_DIM(given, ndim - 1) : 0;
  if (k < 1 || k > r->core.n_experts) {
    return raise_shape(given, ARG("indices"), "[..., k] with k in [1, N]");
  }
  if (!has_tokens_of(r, given, ARG("indices"), k)) {
    return false;
  }
  r->core.top_k = k;
  *indices = (PyArrayObject *)PyArray_FromArray(given, NULL, NPY_ARRAY_IN_ARRAY);
  return *indices != NULL;
}

/* (grad_weights, logits, indices, temperature, renormalize, mask, grad_prob_sums, n_threads) -> grad_logits */
static PyObject *route_backward(PyObject *module, PyObject *const *args, Py_ssize_t n_args) {
  (void)module;
  PyObject *result = NULL;
  PyArrayObject *grad_weights = NULL, *indices = NULL, *given_sums = NULL, *grad_sums = NULL, *grad_logits = NULL;
  routing r = {0};
  if (!takes("route_backward", 8, n_args) || !read_routing(&r, args[1], args[3], args[4], args[5], args[7]) ||
      !read_indices(&r, args[2], &indices)) {
    goto done;
  }
  grad_weights = read_like_logits(&r, args[0], ARG("grad_weights"));
  if (grad_weights == NULL) {
    goto done;
  }
  if (args[6] != Py_None) {
    given_sums = input_array(args[6], ARG("grad_prob_sums"), r.typenum);
    if (given_sums == NULL || !has_shape(given_sums, ARG("grad_prob_sums"), 1, (npy_intp[]){r.core.n_experts}, NULL)) {
      goto done;
    }
    grad_sums = (PyArrayObject *)PyArray_FromArray(given_sums, NULL, NPY_ARRAY_IN_ARRAY);
    if (grad_sums == NULL) {
      goto done;
    }
  }
  grad_logits = new_array(PyArray_NDIM(r.logits), PyArray_DIMS(r.logits), r.typenum);
  if (grad_logits == NULL) {
    goto done;
  }
  ml_matrix grad_weights_view = matrix_view(grad_weights);
  const int64_t *indices_data = indices == NULL ? NULL : PyArray_DATA(indices);
  const void *grad_sums_data = grad_sums == NULL ? NULL : PyArray_DATA(grad_sums);
  ml_status status;
  Py_BEGIN_ALLOW_THREADS;
  status = ml_route_backward(&r.core, PyArray_DATA(grad_logits), grad_weights_view, indices_data, grad_sums_data);
  Py_END_ALLOW_THREADS;
  if (status == ML_ERR_VALUE) { /* temperature has been checked */
    raise_for(PyExc_ValueError, ARG("indices"), "must lie in [0, %lld)", (long long)r.core.n_experts);
  } else if (!raise_status(status)) {
    result = Py_NewRef(grad_logits);
  }
done:
  Py_XDECREF(grad_logits);
  Py_XDECREF(grad_sums);
  Py_XDECREF(given_sums);
  Py_XDECREF(indices);
  Py_XDECREF(grad_weights);
  free_routing(&r);
  return result;
}

/* ---- settings ---- */

static PyObject *set_num_threads(PyObject *module, PyObject *n) {
  (void)module;
  int n_threads = 0; /* the default again */
  if (n != Py_None && !read_n_threads(n, &n_threads)) {
    return NULL;
  }
  ml_set_num_threads(n_threads);
  Py_RETURN_NONE;
}

static PyObject *get_num_threads(PyObject *module, PyObject *unused) {
  (void)module, (void)unused;
  return PyLong_FromLong(ml_get_num_threads());
}

static PyObject *isa_available(PyObject *module, PyObject *unused) {
  (void)module, (void)unused;
  const char *const *names = ml_isa_available();
  Py_ssize_t n = 0;
  while (names[n] != NULL) {
    n++;
  }
  PyObject *result = PyTuple_New(n);
  for (Py_ssize_t i = 0; result != NULL && i < n; i++) {
    PyObject *name = PyUnicode_FromString(names[i]);
    if (name == NULL) {
      Py_CLEAR(result);
    } else {
      PyTuple_SET_ITEM(result, i, name);
    }
  }
  return result;
}

/* A str that C can hold, or None: NULL. */
static bool read_name(PyObject *obj, const char **name) {
  *name = NULL;
  if (obj == Py_None) {
    return true;
  }
  if (!PyUnicode_Check(obj)) {
    return raise_for(PyExc_TypeError, ARG("name"), "must be a str or None, got %s", Py_TYPE(obj)->tp_name);
  }
  Py_ssize_t length;
  *name = PyUnicode_AsUTF8AndSize(obj, &length);
  if (*name != NULL && strlen(*name) == (size_t)length) {
    return true;
  }
  PyErr_Clear(); /* characters that UTF-8 has not */
  return raise_for(PyExc_ValueError, ARG("name"), "must be a name, got %R", obj);
}

static PyObject *set_isa(PyObject *module, PyObject *obj) {
  const char *name;
  if (!read_name(obj, &name)) {
    return NULL;
  }
  if (ml_set_isa(name) == ML_OK) {
    Py_RETURN_NONE;
  }
  PyObject *available = isa_available(module, NULL);
  if (available != NULL) {
    raise_for(PyExc_ValueError, ARG("name"), "must be one of %R on this CPU, got %R", available, obj);
    Py_DECREF(available);
  }
  return NULL;
}

static PyObject *get_isa(PyObject *module, PyObject *unused) {
  (void)module, (void)unused;
  return PyUnicode_FromString(ml_get_isa());
}

static PyObject *set_base_product(PyObject *module, PyObject *obj) {
  (void)module;
  const char *name;
  if (!read_name(obj, &name)) {
    return NULL;
  }
  if (ml_set_base(name) == ML_OK) {
    Py_RETURN_NONE;
  }
  raise_for(PyExc_ValueError, ARG("name"), "must be 'own', 'torch' or None, got %R", obj);
  return NULL;
}

static PyObject *get_base_product(PyObject *module, PyObject *unused) {
  (void)module, (void)unused;
  const char *name = ml_get_base();
  return name == NULL ? Py_NewRef(Py_None) : PyUnicode_FromString(name);
}

static PyObject *base_limits(PyObject *module, PyObject *unused) {
  (void)module, (void)unused;
  ml_base_limits limits = ml_base_rule();
  return Py_BuildValue("LL", (long long)limits.product, (long long)limits.transposed);
}

static PyObject *threading_layer(PyObject *module, PyObject *unused) {
  (void)module, (void)unused;
  return PyUnicode_FromString(ml_threading_layer());
}

static PyObject *blas_config(PyObject *module, PyObject *unused) {
  (void)module, (void)unused;
  return PyUnicode_FromString(ml_blas_config());
}

/* ---- the module ---- */

#define FAST(function) {#function, (PyCFunction)(void (*)(void))function, METH_FASTCALL, NULL}

static PyMethodDef methods[] = {
    FAST(routed_lora_forward),
    FAST(routed_lora_backward),
    FAST(forward_raw),
    FAST(backward_raw),
    FAST(use_torch),
    FAST(are_plain),
    FAST(plain_call),
    FAST(forward_tensors),
    FAST(backward_tensors),
    FAST(cuda_call),
    FAST(cuda_forward),
    FAST(cuda_backward),
    FAST(cuda_prepare),
    FAST(cuda_mix),
    FAST(cuda_mix_backward),
    FAST(cuda_drop_backward),
    FAST(cuda_way),
    {"set_cuda_way", set_cuda_way, METH_O, NULL},
    FAST(cuda_route),
    FAST(cuda_route_backward),
    FAST(route_tensors),
    FAST(route_backward_tensors),
    FAST(route),
    FAST(route_backward),
    FAST(cuda_compile),
    FAST(cuda_cubin),
    FAST(set_cuda_places),
    {"cuda_sources", cuda_sources, METH_NOARGS, NULL},
    {"cuda_driver", cuda_driver, METH_NOARGS, NULL},
    {"cuda_compiler", cuda_compiler, METH_NOARGS, NULL},
    {"cuda_cache", cuda_cache, METH_NOARGS, NULL},
    {"cuda_device", cuda_device, METH_O, NULL},
    {"set_num_threads", set_num_threads, METH_O, NULL},
    {"get_num_threads", get_num_threads, METH_NOARGS, NULL},
    {"set_isa", set_isa, METH_O, NULL},
    {"get_isa", get_isa, METH_NOARGS, NULL},
    {"isa_available", isa_available, METH_NOARGS, NULL},
    {"set_base_product", set_base_product, METH_O, NULL},
    {"get_base_product", get_base_product, METH_NOARGS, NULL},
    {"base_limits", base_limits, METH_NOARGS, NULL},
    {"threading_layer", threading_layer, METH_NOARGS, NULL},
    {"blas_config", blas_config, METH_NOARGS, NULL},
    {NULL, NULL, 0, NULL},
};

static int execute(PyObject *module) {
  if (PyArray_ImportNumPyAPI() < 0) {
    return -1;
  }
  ml_status status = ml_init();
  if (status == ML_ERR_ISA &&
      PyErr_WarnFormat(PyExc_RuntimeWarning, 1, "MOELORA_ISA names no instruction set of this CPU; %s is used",
                       ml_get_isa()) < 0) {
    return -1;
  }
  if (status == ML_ERR_BASE &&
      PyErr_WarnEx(
          PyExc_RuntimeWarning,
          "MOELORA_BASE_PRODUCT is neither 'own' nor 'torch'; who computes base products follows from the shape",
          1) < 0) {
    return -1;
  }
  PyObject *numpy = PyImport_ImportModule("numpy");
  if (numpy == NULL) {
    return -1;
  }
  Py_XSETREF(state_of(module)->shares_memory, PyObject_GetAttrString(numpy, "shares_memory"));
  Py_DECREF(numpy);
  return state_of(module)->shares_memory == NULL ? -1 : 0;
}

static int traverse(PyObject *module, visitproc visit, void *arg) {
  Py_VISIT(state_of(module)->shares_memory);
  return visit_torch(&state_of(module)->torch, visit, arg);
}

static int clear(PyObject *module) {
  Py_CLEAR(state_of(module)->shares_memory);
  clear_torch(&state_of(module)->torch);
  return 0;
}

static void dispose(void *module) { clear(module); }

static PyModuleDef_Slot slots[] = {
    {Py_mod_exec, (void *)(uintptr_t)execute},
#ifdef Py_mod_multiple_interpreters
    {Py_mod_multiple_interpreters, Py_MOD_MULTIPLE_INTERPRETERS_NOT_SUPPORTED}, /* as NumPy */
#endif
#ifdef Py_mod_gil
    {Py_mod_gil, Py_MOD_GIL_NOT_USED}, /* the core takes calls from any thread, and nothing here is shared */
#endif
    {0, NULL},
};

static PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, .m_name = "moelora._core", .m_size = sizeof(module_state),
    .m_methods = methods,  .m_slots = slots,          .m_traverse = traverse,
    .m_clear = clear,      .m_free = dispose,
};

PyMODINIT_FUNC PyInit__core(void) { return PyModuleDef_Init(&definition); }
