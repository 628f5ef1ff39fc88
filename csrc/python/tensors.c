/* The door for torch tensors in their plain case: memory of the CPU, dtypes that go together, nothing unusual about them.
 *
 * What is not the plain case gets no exception but the answer no: moelora.nn then takes its own way, which
 * converts, and whose errors name the argument.
 */
#include <float.h>
#include <math.h>

#include "compiler.h"
#include "exchange.h"
#include "module.h"

static const dl_exchange_api *find_exchange(PyObject *tensor_type) {
  PyObject *capsule = PyObject_GetAttrString(tensor_type, "__dlpack_c_exchange_api__");
  const dl_exchange_api *api = capsule == NULL ? NULL : PyCapsule_GetPointer(capsule, "dlpack_exchange_api");
  Py_XDECREF(capsule); /* what it points to is static */
  PyErr_Clear();       /* a torch without it */
  while (api != NULL && (api->major != DL_MAJOR || api->read == NULL)) {
    api = api->older;
  }
  return api;
}

int visit_torch(const torch_api *torch, visitproc visit, void *arg) {
  Py_VISIT(torch->tensor);
  Py_VISIT(torch->parameter);
  Py_VISIT(torch->is_neg);
  Py_VISIT(torch->requires_grad);
  Py_VISIT(torch->empty);
  Py_VISIT(torch->empty_like);
  Py_VISIT(torch->linear);
  Py_VISIT(torch->float32);
  Py_VISIT(torch->float64);
  Py_VISIT(torch->bfloat16);
  Py_VISIT(torch->float16);
  Py_VISIT(torch->int64);
  Py_VISIT(torch->empty_cuda);
  return 0;
}

void clear_torch(torch_api *torch) {
  torch->exchange = NULL;
  Py_CLEAR(torch->tensor);
  Py_CLEAR(torch->parameter);
  Py_CLEAR(torch->is_neg);
  Py_CLEAR(torch->requires_grad);
  Py_CLEAR(torch->empty);
  Py_CLEAR(torch->empty_like);
  Py_CLEAR(torch->linear);
  Py_CLEAR(torch->float32);
  Py_CLEAR(torch->float64);
  Py_CLEAR(torch->bfloat16);
  Py_CLEAR(torch->float16);
  Py_CLEAR(torch->int64);
  Py_CLEAR(torch->empty_cuda);
}

/* (Tensor, Parameter, empty, empty_cuda, empty_like, linear, float32, float64, bfloat16, float16, int64) -> bool */
PyObject *use_torch(PyObject *module, PyObject *const *args, Py_ssize_t n_args) {
  if (!takes("use_torch", 11, n_args)) {
    return NULL;
  }
  torch_api *torch = &state_of(module)->torch;
  clear_torch(torch);
  torch->tensor = Py_NewRef(args[0]);
  torch->parameter = Py_NewRef(args[1]);
  torch->is_neg = PyObject_GetAttrString(args[0], "is_neg");
  torch->requires_grad = PyUnicode_InternFromString("requires_grad");
  PyObject **const fields[] = {&torch->empty,   &torch->empty_cuda, &torch->empty_like, &torch->linear, &torch->float32,
                               &torch->float64, &torch->bfloat16,   &torch->float16,    &torch->int64};
  for (int i = 0; i < 9; i++) {
    *fields[i] = Py_NewRef(args[2 + i]);
  }
  if (torch->is_neg == NULL || torch->requires_grad == NULL) {
    clear_torch(torch);
    return NULL;
  }
  torch->exchange = find_exchange(args[0]);
  return PyBool_FromLong(torch->exchange != NULL);
}

/* ---- one tensor ---- */

bool view_on(const torch_api *torch, int32_t device_type, PyObject *obj, dl_tensor *view) {
  PyObject *type = (PyObject *)Py_TYPE(obj);
  if (torch->exchange == NULL || (type != torch->tensor && type != torch->parameter)) {
    return false;
  }
  if (torch->exchange->read(obj, view) != 0) { /* no memory of its own: sparse, meta, batched, functional, ... */
    PyErr_Clear();
    return false;
  }
  if (view->device.type != device_type || (view->strides == NULL && view->ndim > 0)) {
    return false;
  }
  if (view->data != NULL) {
    view->data = (char *)view->data + view->byte_offset;
  }
  return true;
}

bool is_of(const dl_tensor *view, uint8_t code, uint8_t bits) {
  return view->dtype.code == code && view->dtype.bits == bits && view->dtype.lanes == 1;
}

/* Whether the core may read obj's memory, as far as type and place go. */
static bool view_of(const torch_api *torch, PyObject *obj, dl_tensor *view) {
  return view_on(torch, DL_CPU, obj, view);
}

/* Whether the tensor's numbers are the negatives of what its memory holds, which a view does not say. */
static bool is_negated(const torch_api *torch, PyObject *tensor) {
  PyObject *answer = torch->is_neg == NULL ? NULL : PyObject_CallOneArg(torch->is_neg, tensor);
  bool negated = answer != Py_False;
  if (answer == NULL) {
    PyErr_Clear();
  }
  Py_XDECREF(answer);
  return negated;
}

/* 1, 0, or -1 with an exception. */
static int requires_grad(const torch_api *torch, PyObject *tensor) {
  PyObject *answer = PyObject_GetAttr(tensor, torch->requires_grad);
  int required = answer == NULL ? -1 : PyObject_IsTrue(answer);
  Py_XDECREF(answer);
  return required;
}

/* (*tensors) -> bool; None is passed over */
PyObject *are_plain(PyObject *module, PyObject *const *args, Py_ssize_t n_args) {
  const torch_api *torch = &state_of(module)->torch;
  for (Py_ssize_t i = 0; i < n_args; i++) {
    dl_tensor view;
    if (args[i] != Py_None && (!view_of(torch, args[i], &view) || is_negated(torch, args[i]))) {
      Py_RETURN_FALSE;
    }
  }
  Py_RETURN_TRUE;
}

/* ---- the numbers of the experts ---- */

bool read_scalings(PyObject *scaling, Py_ssize_t n, double largest, double *to, size_t step) {
  if (!PyTuple_CheckExact(scaling) || PyTuple_GET_SIZE(scaling) != n) {
    return false;
  }
  for (Py_ssize_t e = 0; e < n; e++, to += step) {
    PyObject *s = PyTuple_GET_ITEM(scaling, e);
    if (!PyFloat_CheckExact(s) || !(fabs(PyFloat_AS_DOUBLE(s)) <= largest)) {
      return false;
    }
    *to = PyFloat_AS_DOUBLE(s);
  }
  return true;
}

bool read_dropout(PyObject *dropout, Py_ssize_t n, uint64_t *seed, double *to, size_t step) {
  if (dropout == Py_None) {
    return true;
  }
  PyObject *each = PyTuple_CheckExact(dropout) && PyTuple_GET_SIZE(dropout) == 2 ? PyTuple_GET_ITEM(dropout, 1) : NULL;
  if (each == NULL || !PyLong_CheckExact(PyTuple_GET_ITEM(dropout, 0)) || !PyTuple_CheckExact(each) ||
      PyTuple_GET_SIZE(each) != n) {
    return false;
  }
  *seed = PyLong_AsUnsignedLongLong(PyTuple_GET_ITEM(dropout, 0));
  if (PyErr_Occurred()) {
    PyErr_Clear();
    return false;
  }
  for (Py_ssize_t e = 0; e < n; e++, to += step) {
    PyObject *p = PyTuple_GET_ITEM(each, e);
    if (!PyFloat_CheckExact(p) || !(PyFloat_AS_DOUBLE(p) >= 0 && PyFloat_AS_DOUBLE(p) <= 1)) {
      return false;
    }
    *to = PyFloat_AS_DOUBLE(p);
  }
  return true;
}

/* ---- one call ---- */

typedef struct {
  const torch_api *torch;
  ml_routed_lora core;
  ml_expert few[FEW_EXPERTS], *experts;
  int64_t total_rank;
  int axes;         /* of x: 2 or 3 */
  int64_t shape[3]; /* [T, width] or [B, S, width] */
} tensor_call;

/* The core's dtype of a tensor that has memory; false: it has none of them. */
static bool read_dtype(const dl_tensor *view, ml_dtype *dtype) {
  bool bf16 = view->dtype.code == DL_BFLOAT;
  uint8_t bits = view->dtype.bits;
  *dtype = bf16 ? ML_BF16 : bits == 64 ? ML_F64 : ML_F32;
  return view->data != NULL && view->dtype.lanes == 1 &&
         (bf16 ? bits == 16 : view->dtype.code == DL_FLOAT && (bits == 32 || bits == 64));
}

static bool has_dtype(const dl_tensor *view, ml_dtype dtype) {
  ml_dtype got;
  return read_dtype(view, &got) && got == dtype;
}

/* What is computed in, and hidden is kept in; the dtypes of adapters and of routing weights. */
static ml_dtype wide_dtype(const tensor_call *c) { return c->core.dtype == ML_F64 ? ML_F64 : ML_F32; }
static ml_dtype adapter_dtype(const tensor_call *c) { return c->core.bf16_adapters ? ML_BF16 : wide_dtype(c); }
static ml_dtype weight_dtype(const tensor_call *c) { return c->core.bf16_weights ? ML_BF16 : wide_dtype(c); }

static ml_tokens tokens_of(const dl_tensor *view) {
  const int64_t *strides = view->strides;
  return view->ndim == 3 ? (ml_tokens){view->data, strides[0], strides[1], strides[2]}
                         : (ml_tokens){view->data, 0, strides[0], strides[1]};
}

/* What decides dtype and tokens of the call: x, or the gradient of its output. */
static bool read_shape(tensor_call *c, PyObject *obj) {
  dl_tensor view;
  if (!view_of(c->torch, obj, &view) || (view.ndim != 2 && view.ndim != 3)) {
    return false;
  }
  c->axes = view.ndim;
  memcpy(c->shape, view.shape, (size_t)view.ndim * sizeof *view.shape);
  c->core.batch = view.ndim == 3 ? view.shape[0] : 1;
  c->core.seq = view.shape[view.ndim - 2];
  return read_dtype(&view, &c->core.dtype) && c->core.batch > 0 && c->core.seq > 0;
}

/* Beside a bfloat16 x all adapters are of either dtype, and so are the routing weights; the others then have to agree. */
static void read_narrow(tensor_call *c, PyObject *first_adapter, PyObject *weights) {
  dl_tensor view;
  if (c->core.dtype == ML_BF16) {
    c->core.bf16_adapters = view_of(c->torch, first_adapter, &view) && view.dtype.code == DL_BFLOAT;
    c->core.bf16_weights = view_of(c->torch, weights, &view) && view.dtype.code == DL_BFLOAT;
  }
}

/* A tensor with `width` numbers for each token. */
static bool read_rows(const tensor_call *c, PyObject *obj, ml_dtype dtype, int64_t width, ml_tokens *rows) {
  dl_tensor view;
  if (!view_of(c->torch, obj, &view) || !has_dtype(&view, dtype) || view.ndim != c->axes ||
      view.shape[c->axes - 1] != width) {
    return false;
  }
  for (int i = 0; i < c->axes - 1; i++) {
    if (view.shape[i] != c->shape[i]) {
      return false;
    }
  }
  *rows = tokens_of(&view);
  return true;
}

/* None leaves the rows as they are: data == NULL. */
static bool read_optional_rows(const tensor_call *c, PyObject *obj, ml_dtype dtype, int64_t width, ml_tokens *rows) {
  return obj == Py_None || read_rows(c, obj, dtype, width, rows);
}

/* The forward's own has no gaps; one from a hook on saved tensors may, which beside bfloat16 the core does not take. */
static bool read_hidden(const tensor_call *c, PyObject *obj, ml_tokens *hidden) {
  dl_tensor view;
  int64_t n, stride;
  if (obj == Py_None) {
    return true;
  }
  return read_rows(c, obj, wide_dtype(c), c->total_rank, hidden) &&
         (c->core.dtype != ML_BF16 || (hidden->col == 1 && view_of(c->torch, obj, &view) &&
                                       is_one_axis(&view, view.ndim, &n, &stride) && (n <= 1 || stride == 1)));
}

static bool read_factor(const tensor_call *c, PyObject *obj, ml_dtype dtype, ml_matrix *matrix, int64_t *rows,
                        int64_t *cols) {
  dl_tensor view;
  if (!view_of(c->torch, obj, &view) || !has_dtype(&view, dtype) || view.ndim != 2) {
    return false;
  }
  *matrix = (ml_matrix){view.data, view.strides[0], view.strides[1]};
  *rows = view.shape[0];
  *cols = view.shape[1];
  return *rows > 0 && *cols > 0;
}

/* adapters: the N A's, then the N B's. */
static bool read_experts(tensor_call *c, PyObject *const *adapters) {
  Py_ssize_t n = c->core.n_experts;
  for (Py_ssize_t e = 0; e < n; e++) {
    ml_expert *expert = &c->experts[e];
    int64_t d_in, d_out, rank;
    if (!read_factor(c, adapters[e], adapter_dtype(c), &expert->a, &expert->rank, &d_in) ||
        !read_factor(c, adapters[n + e], adapter_dtype(c), &expert->b, &d_out, &rank) || rank != expert->rank ||
        (e > 0 && (d_in != c->core.d_in || d_out != c->core.d_out)) ||
        ML_ADD_OVERFLOWS(c->total_rank, rank, &c->total_rank)) {
      return false;
    }
    c->core.d_in = d_in;
    c->core.d_out = d_out;
  }
  return true;
}

/* [N], [B, N] where x has three axes, or one row for each token: the number of axes decides. */
static bool read_weights(const tensor_call *c, PyObject *obj, ml_tokens *weights) {
  dl_tensor view;
  int64_t n = c->core.n_experts;
  if (!view_of(c->torch, obj, &view)) {
    return false;
  }
  if (view.ndim == c->axes) {
    return read_rows(c, obj, weight_dtype(c), n, weights);
  }
  int axes = view.ndim;
  if (!has_dtype(&view, weight_dtype(c)) || axes < 1 || axes > c->axes || view.shape[axes - 1] != n ||
      (axes == 2 && view.shape[0] != c->shape[0])) {
    return false;
  }
  *weights = (ml_tokens){view.data, axes == 2 ? view.strides[0] : 0, 0, view.strides[axes - 1]};
  return true;
}

/* Doubles between the scalings, and the probabilities, of experts that follow each other. */
enum { EXPERT_STEP = sizeof(ml_expert) / sizeof(double) };
_Static_assert(sizeof(ml_expert) % sizeof(double) == 0, "a whole number of them");

static bool read_numbers(tensor_call *c, PyObject *scaling, PyObject *dropout) {
  Py_ssize_t n = (Py_ssize_t)c->core.n_experts;
  double largest = c->core.dtype == ML_F64 ? DBL_MAX : FLT_MAX;
  return read_scalings(scaling, n, largest, &c->experts->scaling, EXPERT_STEP) &&
         read_dropout(dropout, n, &c->core.dropout_seed, &c->experts->dropout, EXPERT_STEP);
}

/* Room for the experts of a call. free_experts wants c->experts in any case. */
static answer begin(tensor_call *c, PyObject *module, int64_t n_experts) {
  c->torch = &state_of(module)->torch;
  c->core = (ml_routed_lora){.n_experts = n_experts};
  c->experts = c->few;
  c->total_rank = 0;
  if (n_experts < 1 || c->torch->exchange == NULL) {
    return NO;
  }
  c->core.experts = c->experts = experts_for((Py_ssize_t)n_experts, c->few);
  return c->experts == NULL ? ERROR : YES;
}

/* How many experts a tuple of their A's, then their B's, is of; 0: of none. */
static int64_t experts_in(PyObject *adapters) {
  Py_ssize_t n = PyTuple_CheckExact(adapters) ? PyTuple_GET_SIZE(adapters) : 1;
  return n % 2 == 0 ? n / 2 : 0;
}

/* ---- is it the plain case? ---- */

PyObject *joined(PyObject *lora_A, PyObject *lora_B) {
  bool lists = PyList_CheckExact(lora_A) && PyList_CheckExact(lora_B);
  bool tuples = PyTuple_CheckExact(lora_A) && PyTuple_CheckExact(lora_B);
  if (!lists && !tuples) {
    return Py_NewRef(Py_None);
  }
  PyObject *a = PySequence_Tuple(lora_A), *b = a == NULL ? NULL : PySequence_Tuple(lora_B), *both = NULL;
  if (b != NULL) {
    bool alike = PyTuple_GET_SIZE(a) == PyTuple_GET_SIZE(b);
    both = alike ? PySequence_Concat(a, b) : Py_NewRef(Py_None);
  }
  Py_XDECREF(b);
  Py_XDECREF(a);
  return both;
}

PyObject *spread_scaling(PyObject *scaling, Py_ssize_t n) {
  if (PyList_CheckExact(scaling) || PyTuple_CheckExact(scaling)) {
    return PySequence_Tuple(scaling);
  }
  if (!PyFloat_CheckExact(scaling)) {
    return Py_NewRef(Py_None);
  }
  PyObject *scalings = PyTuple_New(n);
  for (Py_ssize_t e = 0; scalings != NULL && e < n; e++) {
    PyTuple_SET_ITEM(scalings, e, Py_NewRef(scaling));
  }
  return scalings;
}

/* None, or the frozen weight [d_out, d_in] of the base layer. */
static answer is_frozen(const tensor_call *c, PyObject *obj, bool matrix) {
  dl_tensor view;
  if (obj == Py_None) {
    return YES;
  }
  if (!view_of(c->torch, obj, &view) || !has_dtype(&view, c->core.dtype) || view.ndim != (matrix ? 2 : 1) ||
      view.shape[0] != c->core.d_out || (matrix && view.shape[1] != c->core.d_in)) {
    return NO;
  }
  int required = requires_grad(c->torch, obj);
  return required < 0 ? ERROR : required > 0 ? NO : YES;
}

/* Whether one of the tensors (None is passed over) has the property; -1 with an exception. */
static int any_of(const torch_api *torch, PyObject *const *tensors, Py_ssize_t n,
                  int (*has)(const torch_api *, PyObject *)) {
  int found = 0;
  for (Py_ssize_t i = 0; found == 0 && i < n; i++) {
    found = tensors[i] == Py_None ? 0 : has(torch, tensors[i]);
  }
  return found;
}

static int negated(const torch_api *torch, PyObject *tensor) { return is_negated(torch, tensor); }

bool any_negated(const torch_api *torch, PyObject *const *tensors, Py_ssize_t n) {
  return any_of(torch, tensors, n, negated) != 0;
}

int any_requires_grad(const torch_api *torch, PyObject *const *tensors, Py_ssize_t n) {
  return any_of(torch, tensors, n, requires_grad);
}

/* (x, lora_A, lora_B, routing_weights, scaling, base_output, weight, bias)
 * -> None, or (adapters, scaling, total_rank, requires_grad) */
PyObject *plain_call(PyObject *module, PyObject *const *args, Py_ssize_t n_args) {
  if (!takes("plain_call", 8, n_args)) {
    return NULL;
  }
  PyObject *x = args[0], *weights = args[3], *base = args[5], *weight = args[6], *bias = args[7];
  PyObject *result = NULL, *scaling = NULL, *adapters = joined(args[1], args[2]);
  if (adapters == NULL) {
    return NULL;
  }
  tensor_call c;
  answer plain = begin(&c, module, experts_in(adapters));
  if (plain != YES) {
    goto done;
  }
  PyObject *const *factors = &PyTuple_GET_ITEM(adapters, 0);
  scaling = spread_scaling(args[4], (Py_ssize_t)c.core.n_experts);
  if (scaling == NULL) {
    plain = ERROR;
    goto done;
  }
  ml_tokens unused;
  plain = read_shape(&c, x);
  if (plain != YES) {
    goto done;
  }
  read_narrow(&c, factors[0], weights);
  plain = read_experts(&c, factors) && read_rows(&c, x, c.core.dtype, c.core.d_in, &unused) &&
          read_weights(&c, weights, &unused) && read_numbers(&c, scaling, Py_None) &&
          read_optional_rows(&c, base, c.core.dtype, c.core.d_out, &unused) && (base == Py_None || weight == Py_None) &&
          (bias == Py_None || weight != Py_None);
  plain = plain == YES ? is_frozen(&c, weight, true) : plain;
  plain = plain == YES ? is_frozen(&c, bias, false) : plain;
  if (plain != YES) {
    goto done;
  }
  PyObject *const others[] = {x, weights, base, weight, bias};
  if (any_negated(c.torch, others, 5) || any_negated(c.torch, factors, 2 * c.core.n_experts)) {
    plain = NO;
    goto done;
  }
  int required = any_requires_grad(c.torch, factors, 2 * c.core.n_experts);
  required = required == 0 ? any_requires_grad(c.torch, others, 3) : required;
  result = required < 0
               ? NULL
               : Py_BuildValue("OOLO", adapters, scaling, (long long)c.total_rank, required ? Py_True : Py_False);
done:
  if (plain == NO) {
    result = Py_NewRef(Py_None);
  }
  free_experts(c.experts, c.few);
  Py_XDECREF(scaling);
  Py_DECREF(adapters);
  return result;
}

/* ---- forward and backward ----
 *
 * New tensors come first: making them may run other code (a garbage collection, a mode), and pointers are good only
 * until anybody else runs. Then everything is read.
 */

/* What a dense tensor is allocated by: (shape, strides, dtype). */
static PyObject *dense_arguments(PyObject *dtype, int axes, const int64_t *sizes) {
  int64_t stride = 1;
  PyObject *shape = PyTuple_New(axes), *strides = PyTuple_New(axes), *arguments = NULL;
  for (int i = axes - 1; shape != NULL && strides != NULL && i >= 0; i--) {
    PyTuple_SET_ITEM(shape, i, PyLong_FromLongLong(sizes[i]));
    PyTuple_SET_ITEM(strides, i, PyLong_FromLongLong(stride));
    stride = ML_MUL_OVERFLOWS(stride, sizes[i], &stride) ? INT64_MAX : stride; /* torch refuses that */
  }
  if (!PyErr_Occurred()) {
    arguments = PyTuple_Pack(3, shape, strides, dtype);
  }
  Py_XDECREF(strides);
  Py_XDECREF(shape);
  return arguments;
}

PyObject *new_dense(PyObject *empty, PyObject *dtype, int axes, const int64_t *sizes) {
  PyObject *arguments = dense_arguments(dtype, axes, sizes);
  PyObject *tensor = arguments == NULL ? NULL : PyObject_CallObject(empty, arguments);
  Py_XDECREF(arguments);
  return tensor;
}

static PyObject *torch_dtype(const tensor_call *c, ml_dtype dtype) {
  PyObject *const dtypes[] = {
      [ML_F32] = c->torch->float32, [ML_F64] = c->torch->float64, [ML_BF16] = c->torch->bfloat16};
  return dtypes[dtype];
}

/* A tensor with `width` numbers for each token; NULL with an exception. */
static PyObject *new_rows(const tensor_call *c, ml_dtype dtype, int64_t width) {
  int64_t sizes[3];
  memcpy(sizes, c->shape, sizeof sizes);
  sizes[c->axes - 1] = width;
  return new_dense(c->torch->empty, torch_dtype(c, dtype), c->axes, sizes);
}

/* What the gradient before was allocated by: experts are mostly of one shape. */
typedef struct {
  PyObject *arguments; /* NULL: there was none */
  ml_dtype dtype;
  int64_t sizes[2];
} last_dense;

/* A tensor for the gradient of another one, which autograd wants to have the same strides; NULL with an exception. */
static PyObject *new_like(const tensor_call *c, PyObject *like, last_dense *last) {
  dl_tensor view;
  ml_dtype dtype;
  if (!view_of(c->torch, like, &view) || !read_dtype(&view, &dtype) || view.ndim != 2 || view.strides[1] != 1 ||
      view.strides[0] != view.shape[1]) {
    return PyObject_CallOneArg(c->torch->empty_like, like); /* takes longer */
  }
  if (last->arguments == NULL || last->dtype != dtype || memcmp(last->sizes, view.shape, sizeof last->sizes) != 0) {
    last->dtype = dtype;
    memcpy(last->sizes, view.shape, sizeof last->sizes);
    Py_XSETREF(last->arguments, dense_arguments(torch_dtype(c, dtype), 2, last->sizes));
  }
  return last->arguments == NULL ? NULL : PyObject_CallObject(c->torch->empty, last->arguments);
}

/* The frozen weight [d_out, d_in]; None leaves the core without it. */
static bool read_weight(tensor_call *c, PyObject *obj) {
  int64_t rows, cols;
  return obj == Py_None || (read_factor(c, obj, c->core.dtype, &c->core.weight, &rows, &cols) &&
                            rows == c->core.d_out && cols == c->core.d_in);
}

static bool read_bias(const tensor_call *c, PyObject *obj, ml_matrix *bias) {
  dl_tensor view;
  if (obj == Py_None) {
    return true;
  }
  if (!view_of(c->torch, obj, &view) || !has_dtype(&view, c->core.dtype) || view.ndim != 1 ||
      view.shape[0] != c->core.d_out) {
    return false;
  }
  *bias = (ml_matrix){view.data, 0, view.strides[0]};
  return true;
}

/* Whether the core computes the base product x W^T itself, or torch. */
static bool is_own_base(const tensor_call *c) {
  const ml_routed_lora *p = &c->core;
  return p->weight.data != NULL && ml_base_is_faster(p->dtype, p->batch * p->seq, p->weight.col != 1);
}

/* The same for g W. */
static bool is_own_base_backward(const tensor_call *c) {
  const ml_routed_lora *p = &c->core;
  return p->weight.data != NULL && ml_base_is_faster(p->dtype, p->batch * p->seq, p->weight.col == 1);
}

/* (x, adapters, routing_weights, scaling, base_output, weight, bias, dropout, total_rank, top_k, n_threads)
 * -> (y, hidden); total_rank 0: hidden is None; top_k 0: dense */
PyObject *forward_tensors(PyObject *module, PyObject *const *args, Py_ssize_t n_args) {
  if (!takes("forward_tensors", 11, n_args)) {
    return NULL;
  }
  PyObject *x = args[0], *base_output = args[4], *weight = args[5], *bias = args[6];
  PyObject *result = NULL, *y = NULL, *hidden = NULL;
  int64_t total_rank = 0;
  tensor_call c;
  answer plain = begin(&c, module, experts_in(args[1]));
  if (plain != YES || !read_int64(args[8], "total_rank", &total_rank) || !read_int64(args[9], "top_k", &c.core.top_k) ||
      !read_n_threads(args[10], &c.core.n_threads)) {
    goto done;
  }
  PyObject *const *adapters = &PyTuple_GET_ITEM(args[1], 0);
  int64_t rank;
  ml_matrix last_b;
  plain = read_shape(&c, x) && total_rank >= 0;
  if (plain == YES) {
    read_narrow(&c, adapters[0], args[2]);
    c.core.d_in = c.shape[c.axes - 1];
    plain = read_factor(&c, adapters[2 * c.core.n_experts - 1], adapter_dtype(&c), &last_b, &c.core.d_out, &rank) &&
            read_weight(&c, weight);
  }
  if (plain != YES) {
    goto done;
  }
  if (weight == Py_None || is_own_base(&c)) {
    y = new_rows(&c, c.core.dtype, c.core.d_out);
  } else {
    y = base_output = PyObject_CallFunctionObjArgs(c.torch->linear, x, weight, bias, NULL);
    weight = bias = Py_None;
    c.core.weight.data = NULL;
  }
  hidden = y == NULL ? NULL : total_rank > 0 ? new_rows(&c, wide_dtype(&c), total_rank) : Py_NewRef(Py_None);
  if (hidden == NULL) {
    goto done;
  }
  ml_tokens base = {0}, out = {0}, kept = {0};
  ml_matrix bias_row = {0};
  plain = read_experts(&c, adapters) && read_rows(&c, x, c.core.dtype, c.core.d_in, &c.core.x) &&
          read_weights(&c, args[2], &c.core.routing_weights) && read_numbers(&c, args[3], args[7]) &&
          read_optional_rows(&c, base_output, c.core.dtype, c.core.d_out, &base) && read_weight(&c, weight) &&
          read_bias(&c, bias, &bias_row) && read_rows(&c, y, c.core.dtype, c.core.d_out, &out) &&
          read_optional_rows(&c, hidden, wide_dtype(&c), c.total_rank, &kept);
  if (plain != YES) {
    goto done;
  }
  ml_status status;
  Py_BEGIN_ALLOW_THREADS;
  status = ml_routed_lora_forward(&c.core, out, kept, base, bias_row.data, bias_row.col);
  Py_END_ALLOW_THREADS;
  if (!raise_status(status)) {
    result = PyTuple_Pack(2, y, hidden);
  }
done:
  if (plain == NO) {
    PyErr_SetString(PyExc_ValueError, "forward_tensors takes plain tensors of dtypes and shapes that agree");
  }
  Py_XDECREF(hidden);
  Py_XDECREF(y);
  free_experts(c.experts, c.few);
  return result;
}

static bool read_grad(const tensor_call *c, PyObject *obj, int64_t rows, int64_t cols, ml_matrix *grad) {
  int64_t got_rows, got_cols;
  return obj == Py_None ||
         (read_factor(c, obj, adapter_dtype(c), grad, &got_rows, &got_cols) && got_rows == rows && got_cols == cols);
}

/* grads: those of the A's, then those of the B's. */
static bool read_grads(tensor_call *c, PyObject *const *grads) {
  int64_t n = c->core.n_experts;
  for (int64_t e = 0; e < n; e++) {
    ml_expert *expert = &c->experts[e];
    if (!read_grad(c, grads[e], expert->rank, c->core.d_in, &expert->grad_a) ||
        !read_grad(c, grads[n + e], c->core.d_out, expert->rank, &expert->grad_b)) {
      return false;
    }
  }
  return true;
}

/* Tensors for the gradients that are wanted, None for the others; NULL with an exception. */
static PyObject *new_grads(const tensor_call *c, PyObject *const *saved, PyObject *needed, PyObject *grad_y,
                           bool torch_base) {
  Py_ssize_t n = PyTuple_GET_SIZE(needed);
  PyObject *grads = PyTuple_New(n);
  last_dense last = {0};
  for (Py_ssize_t i = 0; grads != NULL && i < n; i++) {
    PyObject *grad = NULL;
    if (PyTuple_GET_ITEM(needed, i) != Py_True || i == NODE_FROZEN || i == NODE_SETTINGS) {
      grad = Py_NewRef(Py_None);
    } else if (i == NODE_X) {
      grad =
          torch_base ? PyNumber_MatrixMultiply(grad_y, saved[SAVED_WEIGHT]) : new_rows(c, c->core.dtype, c->core.d_in);
    } else if (i == NODE_BASE_OUTPUT) {
      grad = Py_NewRef(grad_y);
    } else {
      PyObject *like = saved[i == NODE_ROUTING_WEIGHTS ? SAVED_ROUTING_WEIGHTS : i - N_NODE + N_SAVED];
      grad = new_like(c, like, &last);
    }
    if (grad == NULL) {
      Py_CLEAR(grads);
    } else {
      PyTuple_SET_ITEM(grads, i, grad);
    }
  }
  Py_XDECREF(last.arguments);
  return grads;
}

/* (saved, needs_input_grad, scaling, grad_y, dropout, top_k, n_threads) -> the gradients of the node's arguments, or None where
 * this is not the plain case */
PyObject *backward_tensors(PyObject *module, PyObject *const *args, Py_ssize_t n_args) {
  if (!takes("backward_tensors", 7, n_args)) {
    return NULL;
  }
  PyObject *grads = NULL, *needed = args[1], *grad_y = args[3];
  Py_ssize_t n_saved = PyTuple_CheckExact(args[0]) ? PyTuple_GET_SIZE(args[0]) : 0;
  bool fits = n_saved > N_SAVED && (n_saved - N_SAVED) % 2 == 0 && PyTuple_CheckExact(needed) &&
              PyTuple_GET_SIZE(needed) == n_saved - N_SAVED + N_NODE;
  tensor_call c;
  answer plain = begin(&c, module, fits ? (n_saved - N_SAVED) / 2 : 0);
  if (plain != YES || !read_int64(args[5], "top_k", &c.core.top_k) || !read_n_threads(args[6], &c.core.n_threads)) {
    goto done;
  }
  PyObject *const *saved = &PyTuple_GET_ITEM(args[0], 0), *const *adapters = saved + N_SAVED;
  if (any_negated(c.torch, &grad_y, 1) || any_negated(c.torch, saved, n_saved)) {
    plain = NO;
    goto done;
  }
  int64_t rank;
  ml_matrix first_a;
  plain = read_shape(&c, grad_y);
  if (plain == YES) {
    read_narrow(&c, adapters[0], saved[SAVED_ROUTING_WEIGHTS]);
    c.core.d_out = c.shape[c.axes - 1];
    plain = read_factor(&c, adapters[0], adapter_dtype(&c), &first_a, &rank, &c.core.d_in) &&
            read_weight(&c, saved[SAVED_WEIGHT]);
  }
  if (plain != YES) {
    goto done;
  }
  bool own_base = is_own_base_backward(&c);
  bool torch_base = saved[SAVED_WEIGHT] != Py_None && !own_base;
  c.core.weight.data = NULL;
  grads = new_grads(&c, saved, needed, grad_y, torch_base);
  if (grads == NULL) {
    goto done;
  }
  ml_tokens g = {0}, hidden = {0}, grad_x = {0}, grad_w = {0};
  PyObject *const *grad = &PyTuple_GET_ITEM(grads, 0);
  plain = read_experts(&c, adapters) && read_optional_rows(&c, saved[SAVED_X], c.core.dtype, c.core.d_in, &c.core.x) &&
          read_weights(&c, saved[SAVED_ROUTING_WEIGHTS], &c.core.routing_weights) &&
          read_numbers(&c, args[2], args[4]) && (!own_base || read_weight(&c, saved[SAVED_WEIGHT])) &&
          read_rows(&c, grad_y, c.core.dtype, c.core.d_out, &g) && read_hidden(&c, saved[SAVED_HIDDEN], &hidden) &&
          read_optional_rows(&c, grad[NODE_X], c.core.dtype, c.core.d_in, &grad_x) &&
          (grad[NODE_ROUTING_WEIGHTS] == Py_None || read_weights(&c, grad[NODE_ROUTING_WEIGHTS], &grad_w)) &&
          read_grads(&c, grad + N_NODE);
  if (plain != YES) {
    goto done;
  }
  ml_status status;
  Py_BEGIN_ALLOW_THREADS;
  status = ml_routed_lora_backward(&c.core, g, hidden, grad_x, grad_w, torch_base ? (unsigned)ML_ACCUMULATE_X : 0u);
  Py_END_ALLOW_THREADS;
  if (raise_status(status)) {
    Py_CLEAR(grads);
  }
done:
  if (plain == NO) {
    Py_XSETREF(grads, Py_NewRef(Py_None));
  }
  free_experts(c.experts, c.few);
  return grads;
}

/* ---- routing ---- */

static void raise_from_torch(void *context, const char *kind, const char *message) {
  (void)context;
  PyErr_Format(PyExc_RuntimeError, "%s: %s", kind, message);
}

/* A new tensor, not initialised, and where its memory is. */
static PyObject *new_tensor(const torch_api *torch, uint8_t code, uint8_t bits, int32_t ndim, int64_t *shape,
                            void **data) {
  dl_tensor prototype = {.device = {.type = DL_CPU}, .ndim = ndim, .dtype = {code, bits, 1}, .shape = shape};
  dl_owned *owned = NULL;
  if (torch->exchange->allocate(&prototype, &owned, NULL, raise_from_torch) != 0) {
    return NULL;
  }
  *data = (char *)owned->tensor.data + owned->tensor.byte_offset;
  void *tensor = NULL;
  return torch->exchange->wrap(owned, &tensor) == 0 ? tensor : NULL;
}

bool is_one_axis(const dl_tensor *view, int ndim, int64_t *n, int64_t *stride) {
  *n = 1;
  *stride = 0;
  for (int i = ndim - 1; i >= 0; i--) {
    if (view->shape[i] == 1) {
      continue;
    }
    if (*n > 1 && view->strides[i] != *n * *stride) {
      return false;
    }
    *stride = *n > 1 ? *stride : view->strides[i];
    *n *= view->shape[i];
  }
  return view->data != NULL || *n == 0;
}

enum { MAX_AXES = 16 };

typedef struct {
  const torch_api *torch;
  ml_route_params core;
  dl_tensor logits;
} route_call;

static uint8_t bits_of(const route_call *c) { return c->core.dtype == ML_F64 ? 64 : 32; }

static bool has_tokens_of_logits(const route_call *c, const dl_tensor *view, int ndim) {
  bool same = view->ndim == ndim;
  for (int i = 0; same && i < c->logits.ndim - 1; i++) {
    same = view->shape[i] == c->logits.shape[i];
  }
  return same;
}

/* A tensor of the core's dtype in the shape of logits, as rows. */
static bool read_matrix_like_logits(const route_call *c, PyObject *obj, ml_matrix *matrix) {
  dl_tensor view;
  int64_t n_tokens;
  if (!view_of(c->torch, obj, &view) || !is_of(&view, DL_FLOAT, bits_of(c)) ||
      !has_tokens_of_logits(c, &view, c->logits.ndim) || view.shape[view.ndim - 1] != c->core.n_experts ||
      !is_one_axis(&view, view.ndim - 1, &n_tokens, &matrix->row)) {
    return false;
  }
  matrix->data = view.data;
  matrix->col = view.strides[view.ndim - 1];
  return true;
}

/* What both directions share; false: not the plain case. */
static bool read_route(route_call *c, PyObject *logits, PyObject *mask, PyObject *temperature, PyObject *renormalize) {
  if (!view_of(c->torch, logits, &c->logits) || c->logits.ndim < 1 || c->logits.ndim > MAX_AXES) {
    return false;
  }
  const dl_tensor *view = &c->logits;
  c->core.dtype = view->dtype.bits == 64 ? ML_F64 : ML_F32;
  c->core.n_experts = view->shape[view->ndim - 1];
  if (c->core.n_experts < 1 || !is_one_axis(view, view->ndim - 1, &c->core.n_tokens, &c->core.logits.row) ||
      !read_matrix_like_logits(c, logits, &c->core.logits)) {
    return false;
  }
  if (mask != Py_None) {
    dl_tensor padding;
    int64_t n_tokens;
    if (!view_of(c->torch, mask, &padding) || !is_of(&padding, DL_BOOL, 8) ||
        !has_tokens_of_logits(c, &padding, c->logits.ndim - 1) ||
        !is_one_axis(&padding, padding.ndim, &n_tokens, &c->core.mask_stride)) {
      return false;
    }
    c->core.mask = padding.data;
  }
  if (!PyFloat_CheckExact(temperature) || !PyBool_Check(renormalize)) {
    return false;
  }
  c->core.temperature = PyFloat_AS_DOUBLE(temperature);
  c->core.renormalize = renormalize == Py_True;
  return c->core.temperature > 0 && isfinite(c->core.temperature);
}

/* (logits, mask, top_k, temperature, renormalize, n_threads) -> (weights, indices, counts, prob_sums), or None where
 * this is not the plain case */
PyObject *route_tensors(PyObject *module, PyObject *const *args, Py_ssize_t n_args) {
  PyObject *weights = NULL, *indices = NULL, *counts = NULL, *prob_sums = NULL, *result = NULL;
  route_call c = {.torch = &state_of(module)->torch};
  if (!takes("route_tensors", 6, n_args) || !read_n_threads(args[5], &c.core.n_threads)) {
    return NULL;
  }
  /* First, for a mode may answer this in Python, and pointers are good only until anybody else runs. */
  PyObject *const read[] = {args[0], args[1]};
  if (c.torch->exchange == NULL || any_negated(c.torch, read, 2) ||
      !read_route(&c, args[0], args[1], args[3], args[4])) {
    Py_RETURN_NONE;
  }
  int64_t shape[MAX_AXES], *n_experts = &c.core.n_experts;
  int32_t ndim = c.logits.ndim;
  memcpy(shape, c.logits.shape, (size_t)ndim * sizeof *shape);
  if (args[2] != Py_None) {
    c.core.top_k = PyLong_CheckExact(args[2]) ? PyLong_AsLongLong(args[2]) : 0;
    if (c.core.top_k < 1 || c.core.top_k > *n_experts) {
      PyErr_Clear();
      Py_RETURN_NONE;
    }
  }
  void *weights_data = NULL, *indices_data = NULL, *counts_data = NULL, *sums_data = NULL;
  if ((weights = new_tensor(c.torch, DL_FLOAT, bits_of(&c), ndim, shape, &weights_data)) == NULL ||
      (counts = new_tensor(c.torch, DL_INT, 64, 1, n_experts, &counts_data)) == NULL ||
      (prob_sums = new_tensor(c.torch, DL_FLOAT, bits_of(&c), 1, n_experts, &sums_data)) == NULL) {
    goto done;
  }
  shape[ndim - 1] = c.core.top_k;
  indices = c.core.top_k > 0 ? new_tensor(c.torch, DL_INT, 64, ndim, shape, &indices_data) : Py_NewRef(Py_None);
  if (indices == NULL) {
    goto done;
  }
  ml_status status;
  Py_BEGIN_ALLOW_THREADS;
  status = ml_route(&c.core, weights_data, indices_data, counts_data, sums_data);
  Py_END_ALLOW_THREADS;
  if (!raise_status(status)) {
    result = PyTuple_Pack(4, weights, indices, counts, prob_sums);
  }
done:
  Py_XDECREF(prob_sums);
  Py_XDECREF(counts);
  Py_XDECREF(indices);
  Py_XDECREF(weights);
  return result;
}

/* [..., k], contiguous; None: dense. */
static bool read_indices(route_call *c, PyObject *obj, const int64_t **indices) {
  dl_tensor view;
  int64_t n, stride;
  if (obj == Py_None) {
    return true;
  }
  if (!view_of(c->torch, obj, &view) || !is_of(&view, DL_INT, 64) || !has_tokens_of_logits(c, &view, c->logits.ndim) ||
      !is_one_axis(&view, view.ndim, &n, &stride) || (n > 1 && stride != 1)) {
    return false;
  }
  c->core.top_k = view.shape[view.ndim - 1];
  *indices = view.data;
  return c->core.top_k >= 1;
}

/* (grad_weights, grad_prob_sums, kept, mask, indices, temperature, renormalize, n_threads) -> grad_logits, or None where
 * this is not the plain case. kept are the logits, or without indices the weights. */
PyObject *route_backward_tensors(PyObject *module, PyObject *const *args, Py_ssize_t n_args) {
  route_call c = {.torch = &state_of(module)->torch};
  if (!takes("route_backward_tensors", 8, n_args) || !read_n_threads(args[7], &c.core.n_threads)) {
    return NULL;
  }
  const int64_t *indices = NULL;
  ml_matrix grad_weights = {0};
  dl_tensor grad_sums = {0};
  if (c.torch->exchange == NULL || any_negated(c.torch, args, 5) ||
      !read_route(&c, args[2], args[3], args[5], args[6]) || !read_indices(&c, args[4], &indices) ||
      !read_matrix_like_logits(&c, args[0], &grad_weights)) {
    Py_RETURN_NONE;
  }
  if (indices == NULL) {
    c.core.probs = c.core.logits;
  }
  int64_t n, stride;
  if (args[1] != Py_None &&
      (!view_of(c.torch, args[1], &grad_sums) || !is_of(&grad_sums, DL_FLOAT, bits_of(&c)) || grad_sums.ndim != 1 ||
       !is_one_axis(&grad_sums, 1, &n, &stride) || n != c.core.n_experts || (n > 1 && stride != 1))) {
    Py_RETURN_NONE;
  }
  void *data = NULL;
  PyObject *grad = new_tensor(c.torch, DL_FLOAT, bits_of(&c), c.logits.ndim, c.logits.shape, &data);
  if (grad == NULL) {
    return NULL;
  }
  ml_status status;
  Py_BEGIN_ALLOW_THREADS;
  status = ml_route_backward(&c.core, data, grad_weights, indices, grad_sums.data);
  Py_END_ALLOW_THREADS;
  if (raise_status(status)) {
    Py_CLEAR(grad);
  }
  return grad;
}
