/* The door for routing of torch tensors on a GPU. As in tensors.c, what is not the plain case gets the answer None. */
#include "cuda_route.h"

#include <math.h>

#include "cuda.h"
#include "exchange.h"
#include "module.h"

enum { MAX_AXES = 16 };

typedef struct {
  const torch_api *torch;
  ml_route_place place;
  dl_tensor logits; /* backward without top-k: the weights */
} route_call;

static PyObject *read_failed(void) {
  if (PyErr_Occurred()) {
    return NULL;
  }
  Py_RETURN_NONE;
}

/* ML_CUDA_F32, ..., or -1: none of them. */
static int dtype_of(const dl_tensor *view) {
  return is_of(view, DL_FLOAT, 32)    ? ML_CUDA_F32
         : is_of(view, DL_BFLOAT, 16) ? ML_CUDA_BF16
         : is_of(view, DL_FLOAT, 16)  ? ML_CUDA_F16
         : is_of(view, DL_FLOAT, 64)  ? ML_CUDA_F64
                                      : -1;
}

/* Of what is computed. */
static uint8_t real_bits(const route_call *c) { return c->place.dtype == ML_CUDA_F64 ? 64 : 32; }

static bool view_here(const route_call *c, PyObject *obj, dl_tensor *view) {
  return view_on(c->torch, DL_CUDA, obj, view) && view->device.id == c->logits.device.id;
}

/* A tensor whose first axes, or all, are those of the tokens. */
static bool has_tokens_of_logits(const route_call *c, const dl_tensor *view, int ndim) {
  bool same = view->ndim == ndim;
  for (int i = 0; same && i < c->logits.ndim - 1; i++) {
    same = view->shape[i] == c->logits.shape[i];
  }
  return same;
}

static bool has_dense_rows(const dl_tensor *view) {
  return view->strides[view->ndim - 1] == 1 || view->shape[view->ndim - 1] == 1;
}

/* What both directions share, save for the dtype; false: not the plain case, or an exception. */
static bool read_rows(route_call *c, ml_routed_rows *in, PyObject *logits, PyObject *mask, PyObject *temperature,
                      PyObject *renormalize) {
  dl_tensor *view = &c->logits, padding;
  int64_t n_tokens, row, n, stride;
  if (c->torch->exchange == NULL || !view_on(c->torch, DL_CUDA, logits, view) || view->ndim < 1 ||
      view->ndim > MAX_AXES || !has_dense_rows(view) || !is_one_axis(view, view->ndim - 1, &n_tokens, &row) ||
      !ml_cuda_routes(n_tokens, view->shape[view->ndim - 1])) {
    return false;
  }
  in->rows = view->data;
  in->row = row;
  in->tokens = (int)n_tokens;
  in->experts = (int)view->shape[view->ndim - 1];
  if (mask != Py_None) {
    if (!view_here(c, mask, &padding) || !is_of(&padding, DL_BOOL, 8) ||
        !has_tokens_of_logits(c, &padding, view->ndim - 1) || !is_one_axis(&padding, padding.ndim, &n, &stride)) {
      return false;
    }
    in->mask = padding.data;
    in->mask_stride = stride;
  }
  if (!PyFloat_CheckExact(temperature) || !PyBool_Check(renormalize)) {
    return false;
  }
  c->place.temperature = PyFloat_AS_DOUBLE(temperature);
  in->renormalize = renormalize == Py_True;
  return c->place.temperature > 0 && isfinite(c->place.temperature) &&
         ml_gpu_at(view->device.id, &c->place.gpu) == ML_CUDA_OK &&
         c->torch->exchange->stream(DL_CUDA, view->device.id, &c->place.stream) == 0;
}

/* A new tensor, not initialised, and where its memory is. torch makes it on the current GPU: an error where the logits' is another
 * one. */
static PyObject *new_tensor(const route_call *c, PyObject *dtype, int32_t ndim, const int64_t *shape, void **data) {
  PyObject *tensor = new_dense(c->torch->empty_cuda, dtype, ndim, shape);
  dl_tensor view;
  if (tensor != NULL && !view_here(c, tensor, &view)) {
    Py_CLEAR(tensor);
    PyErr_Format(PyExc_RuntimeError, "moelora's CUDA kernels: GPU %d must be the current one",
                 (int)c->logits.device.id);
  }
  *data = tensor == NULL ? NULL : view.data;
  return tensor;
}

/* Takes the result back where the call failed, for None or an exception. */
static PyObject *given(PyObject *result, ml_cuda_status status) {
  if (status == ML_CUDA_OK) {
    return result;
  }
  Py_XDECREF(result);
  if (status == ML_CUDA_UNSUPPORTED) {
    Py_RETURN_NONE;
  }
  raise_cuda(status);
  return NULL;
}

/* (logits, mask, top_k, temperature, renormalize) -> (weights, indices, counts, prob_sums), or None where this is not
 * the plain case */
PyObject *cuda_route(PyObject *module, PyObject *const *args, Py_ssize_t n_args) {
  PyObject *weights = NULL, *indices = NULL, *counts = NULL, *prob_sums = NULL, *room = NULL, *result = NULL;
  route_call c = {.torch = &state_of(module)->torch};
  ml_route_forward call = {0};
  if (!takes("cuda_route", 5, n_args)) {
    return NULL;
  }
  if (any_negated(c.torch, args, 2) || !read_rows(&c, &call.in, args[0], args[1], args[3], args[4])) {
    return read_failed();
  }
  c.place.dtype = dtype_of(&c.logits);
  if (args[2] != Py_None) {
    int64_t top_k = PyLong_CheckExact(args[2]) ? PyLong_AsLongLong(args[2]) : 0;
    if (top_k < 1 || top_k > call.in.experts) {
      PyErr_Clear();
      Py_RETURN_NONE;
    }
    call.in.top_k = (int)top_k;
  }
  if (c.place.dtype < 0) {
    Py_RETURN_NONE;
  }
  int64_t shape[MAX_AXES], n_experts = call.in.experts, words = (ml_cuda_route_workspace(&c.place, &call.in) + 7) / 8;
  int32_t ndim = c.logits.ndim;
  memcpy(shape, c.logits.shape, (size_t)ndim * sizeof *shape);
  void *weights_data = NULL, *indices_data = NULL, *counts_data = NULL, *sums_data = NULL, *workspace = NULL;
  PyObject *real = c.place.dtype == ML_CUDA_F64 ? c.torch->float64 : c.torch->float32;
  if ((weights = new_tensor(&c, real, ndim, shape, &weights_data)) == NULL ||
      (counts = new_tensor(&c, c.torch->int64, 1, &n_experts, &counts_data)) == NULL ||
      (prob_sums = new_tensor(&c, real, 1, &n_experts, &sums_data)) == NULL ||
      (words > 0 && (room = new_tensor(&c, c.torch->int64, 1, &words, &workspace)) == NULL)) {
    goto done;
  }
  shape[ndim - 1] = call.in.top_k;
  indices = call.in.top_k > 0 ? new_tensor(&c, c.torch->int64, ndim, shape, &indices_data) : Py_NewRef(Py_None);
  if (indices == NULL) {
    goto done;
  }
  call.weights = weights_data;
  call.indices = indices_data;
  call.counts = counts_data;
  call.prob_sums = sums_data;
  ml_cuda_status status;
  Py_BEGIN_ALLOW_THREADS;
  status = ml_cuda_route(&c.place, call, workspace);
  Py_END_ALLOW_THREADS;
  result = given(PyTuple_Pack(4, weights, indices, counts, prob_sums), status);
done:
  Py_XDECREF(room); /* its memory is given to others on this stream alone, after the kernels */
  Py_XDECREF(prob_sums);
  Py_XDECREF(counts);
  Py_XDECREF(indices);
  Py_XDECREF(weights);
  return result;
}

/* [..., k], contiguous; None: dense. */
static bool read_indices(const route_call *c, PyObject *obj, ml_route_gradient *call) {
  dl_tensor view;
  int64_t n, stride;
  if (obj == Py_None) {
    return true;
  }
  if (!view_here(c, obj, &view) || !is_of(&view, DL_INT, 64) || !has_tokens_of_logits(c, &view, c->logits.ndim) ||
      !is_one_axis(&view, view.ndim, &n, &stride) || (n > 1 && stride != 1)) {
    return false;
  }
  int64_t top_k = view.shape[view.ndim - 1];
  call->in.top_k = (int)top_k;
  call->indices = view.data;
  return top_k >= 1 && top_k <= call->in.experts;
}

/* None: zeros. */
static bool read_gradients(const route_call *c, PyObject *grad_weights, PyObject *grad_sums, ml_route_gradient *call) {
  dl_tensor view;
  int64_t n, stride;
  if (grad_weights != Py_None) {
    if (!view_here(c, grad_weights, &view) || !is_of(&view, DL_FLOAT, real_bits(c)) ||
        !has_tokens_of_logits(c, &view, c->logits.ndim) || view.shape[view.ndim - 1] != call->in.experts ||
        !has_dense_rows(&view) || !is_one_axis(&view, view.ndim - 1, &n, &stride)) {
      return false;
    }
    call->grad_weights = view.data;
    call->grad_row = stride;
  }
  if (grad_sums != Py_None) {
    if (!view_here(c, grad_sums, &view) || !is_of(&view, DL_FLOAT, real_bits(c)) || view.ndim != 1 ||
        view.shape[0] != call->in.experts || view.data == NULL) {
      return false;
    }
    call->grad_sums = view.data;
    call->grad_sums_stride = view.strides[0];
  }
  return true;
}

/* (grad_weights, grad_prob_sums, kept, mask, indices, temperature, renormalize, dtype) -> grad_logits, or None where this
 * is not the plain case. kept are the logits, or without indices the weights; dtype is that of the logits. */
PyObject *cuda_route_backward(PyObject *module, PyObject *const *args, Py_ssize_t n_args) {
  route_call c = {.torch = &state_of(module)->torch};
  ml_route_gradient call = {0};
  if (!takes("cuda_route_backward", 8, n_args)) {
    return NULL;
  }
  PyObject *const dtypes[] = {[ML_CUDA_F32] = c.torch->float32,
                              [ML_CUDA_BF16] = c.torch->bfloat16,
                              [ML_CUDA_F16] = c.torch->float16,
                              [ML_CUDA_F64] = c.torch->float64};
  c.place.dtype = -1;
  for (int i = 0; i < 4; i++) {
    if (args[7] == dtypes[i]) {
      c.place.dtype = i;
    }
  }
  if (c.place.dtype < 0 || any_negated(c.torch, args, 5) ||
      !read_rows(&c, &call.in, args[2], args[3], args[5], args[6])) {
    return read_failed();
  }
  int kept = call.indices == NULL && args[4] == Py_None && c.place.dtype != ML_CUDA_F64 ? ML_CUDA_F32 : c.place.dtype;
  if (dtype_of(&c.logits) != kept || !read_indices(&c, args[4], &call) ||
      !read_gradients(&c, args[0], args[1], &call)) {
    Py_RETURN_NONE;
  }
  PyObject *grad = new_tensor(&c, args[7], c.logits.ndim, c.logits.shape, &call.grad_logits);
  if (grad == NULL) {
    return NULL;
  }
  ml_cuda_status status;
  Py_BEGIN_ALLOW_THREADS;
  status = ml_cuda_route_backward(&c.place, call);
  Py_END_ALLOW_THREADS;
  return given(grad, status);
}
