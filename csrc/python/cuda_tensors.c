/* The door for torch tensors on a GPU in their plain case: bfloat16 or float16 rows, adapters of that dtype or float32 without
 * gaps, all on the current device. As in tensors.c, what is not plain gets the answer None. */
#include <float.h>

#include "compiler.h"
#include "cuda.h"
#include "exchange.h"
#include "module.h"
#include "routed_lora.h"

typedef struct {
  const torch_api *torch;
  ml_layer layer;
  int axes; /* of x: 2 or 3 */
  int64_t shape[3];
  int32_t device;
} cuda_call_;

static bool is_narrow(const cuda_call_ *c, const dl_tensor *view) {
  return is_of(view, c->layer.f16 ? DL_FLOAT : DL_BFLOAT, 16);
}

static bool view_here(const cuda_call_ *c, PyObject *obj, dl_tensor *view) {
  return view_on(c->torch, DL_CUDA, obj, view) && view->data != NULL && view->device.id == c->device;
}

/* What decides dtype, tokens and device of the call: x, or the gradient of its output. Its rows, `width` in all. */
static answer read_shape(cuda_call_ *c, PyObject *module, PyObject *obj, ml_rows *rows, int64_t *width) {
  dl_tensor view;
  int64_t tokens;
  memset(c, 0, sizeof *c);
  c->torch = &state_of(module)->torch;
  if (!view_on(c->torch, DL_CUDA, obj, &view) || (view.ndim != 2 && view.ndim != 3)) {
    return NO;
  }
  c->device = view.device.id;
  c->axes = view.ndim;
  memcpy(c->shape, view.shape, (size_t)view.ndim * sizeof *view.shape);
  c->layer.f16 = is_of(&view, DL_FLOAT, 16);
  if ((!c->layer.f16 && !is_of(&view, DL_BFLOAT, 16)) || view.strides[view.ndim - 1] != 1 ||
      !is_one_axis(&view, view.ndim - 1, &tokens, &rows->row) || tokens < 1) {
    return NO;
  }
  *width = view.shape[view.ndim - 1];
  rows->data = view.data;
  rows->row = tokens == 1 ? *width : rows->row;
  c->layer.tokens = tokens;
  if (ml_gpu_at(c->device, &c->layer.gpu) != ML_CUDA_OK) {
    return NO;
  }
  if (c->torch->exchange->stream(DL_CUDA, c->device, &c->layer.stream) != 0) {
    return ERROR;
  }
  return YES;
}

/* More rows such as those, of `width`. */
static bool read_rows(const cuda_call_ *c, PyObject *obj, int64_t width, ml_rows *rows) {
  dl_tensor view;
  int64_t tokens;
  if (!view_here(c, obj, &view) || !is_narrow(c, &view) || view.ndim != c->axes || view.strides[view.ndim - 1] != 1 ||
      view.shape[view.ndim - 1] != width || !is_one_axis(&view, view.ndim - 1, &tokens, &rows->row)) {
    return false;
  }
  for (int i = 0; i < c->axes - 1; i++) {
    if (view.shape[i] != c->shape[i]) {
      return false;
    }
  }
  rows->data = view.data;
  rows->row = tokens == 1 ? width : rows->row;
  return true;
}

static bool read_adapter(const cuda_call_ *c, PyObject *obj, dl_tensor *view) {
  return view_here(c, obj, view) && (c->layer.f32_adapters ? is_of(view, DL_FLOAT, 32) : is_narrow(c, view)) &&
         view->ndim == 2 && view->strides[1] == 1 && (view->strides[0] == view->shape[1] || view->shape[0] == 1) &&
         view->shape[0] > 0 && view->shape[1] > 0;
}

/* adapters: the N A's, then the N B's. */
static bool read_experts(cuda_call_ *c, PyObject *adapters) {
  Py_ssize_t n = PyTuple_CheckExact(adapters) ? PyTuple_GET_SIZE(adapters) : 0;
  dl_tensor a, b;
  if (n < 2 || n % 2 != 0 || n / 2 > ML_MAX_EXPERTS || !view_here(c, PyTuple_GET_ITEM(adapters, 0), &a)) {
    return false;
  }
  c->layer.n_experts = (int)(n / 2);
  c->layer.f32_adapters = is_of(&a, DL_FLOAT, 32);
  for (Py_ssize_t e = 0; e < n / 2; e++) {
    if (!read_adapter(c, PyTuple_GET_ITEM(adapters, e), &a) ||
        !read_adapter(c, PyTuple_GET_ITEM(adapters, n / 2 + e), &b) || a.shape[0] != b.shape[1] ||
        a.shape[0] > ML_MAX_COLUMNS || (e > 0 && (a.shape[1] != c->layer.d_in || b.shape[0] != c->layer.d_out))) {
      return false;
    }
    c->layer.experts[e].a = a.data;
    c->layer.experts[e].b = b.data;
    c->layer.experts[e].rank = (int)a.shape[0];
    c->layer.d_in = a.shape[1];
    c->layer.d_out = b.shape[0];
  }
  return true;
}

/* [N], [B, N] where x has three axes, or one row for each token: the number of axes decides. */
static bool read_weights(cuda_call_ *c, PyObject *obj, int64_t top_k) {
  dl_tensor view;
  ml_weights *w = &c->layer.weights;
  int n = c->layer.n_experts;
  if (!view_here(c, obj, &view) || view.ndim < 1 || view.ndim > c->axes || view.shape[view.ndim - 1] != n ||
      top_k < 0 || top_k > n) {
    return false;
  }
  w->dtype = is_of(&view, DL_FLOAT, 32) ? ML_CUDA_F32 : is_of(&view, DL_BFLOAT, 16) ? ML_CUDA_BF16 : ML_CUDA_F16;
  if (w->dtype == ML_CUDA_F16 && !is_of(&view, DL_FLOAT, 16)) {
    return false;
  }
  int64_t seq = c->shape[c->axes - 2];
  for (int i = 0; i < view.ndim - 1; i++) {
    if (view.shape[i] != c->shape[i]) {
      return false;
    }
  }
  bool own = view.ndim == c->axes;
  w->data = view.data;
  w->top_k = top_k == n ? 0 : (int)top_k;
  w->seq = (int)seq;
  w->n_experts = n;
  w->stride = view.strides[view.ndim - 1];
  w->seq_stride = own ? view.strides[view.ndim - 2] : 0;
  w->batch_stride = c->axes == 3 && view.ndim > 1 ? view.strides[0] : 0;
  c->layer.share = own ? 1 : view.ndim == 2 ? seq : c->layer.tokens;
  return true;
}

static bool read_scaling(cuda_call_ *c, PyObject *scaling) {
  double scalings[ML_MAX_EXPERTS];
  if (!read_scalings(scaling, c->layer.n_experts, FLT_MAX, scalings, 1)) {
    return false;
  }
  for (int e = 0; e < c->layer.n_experts; e++) {
    c->layer.experts[e].scaling = (float)scalings[e];
  }
  return true;
}

/* Once the layer has begun. */
static bool read_drops(cuda_call_ *c, PyObject *dropout) {
  uint64_t seed;
  double probabilities[ML_MAX_EXPERTS];
  if (!read_dropout(dropout, c->layer.n_experts, &seed, probabilities, 1)) {
    return false;
  }
  if (dropout != Py_None) {
    if (!c->layer.dense) {
      return false;
    }
    ml_layer_drop(&c->layer, seed, probabilities);
  }
  return true;
}

/* The frozen base, None or [d_out, d_in] with rows of unit stride; without such rows torch computes it (data == NULL). */
static bool read_frozen(cuda_call_ *c, PyObject *weight, PyObject *bias) {
  dl_tensor view;
  if (weight != Py_None) {
    if (!view_here(c, weight, &view) || !is_narrow(c, &view) || view.ndim != 2 || view.shape[0] != c->layer.d_out ||
        view.shape[1] != c->layer.d_in) {
      return false;
    }
    c->layer.weight = view.strides[1] == 1 ? view.data : NULL;
    c->layer.weight_row = view.strides[0];
  }
  if (bias != Py_None) {
    if (weight == Py_None || !view_here(c, bias, &view) || !is_narrow(c, &view) || view.ndim != 1 ||
        view.shape[0] != c->layer.d_out) {
      return false;
    }
    c->layer.bias = view.data;
    if (view.strides[0] != 1 && view.shape[0] > 1) {
      c->layer.weight = NULL;
    }
  }
  return true;
}

/* n elements of the call's dtype without gaps, for the widest loads. */
static bool is_whole(const cuda_call_ *c, PyObject *obj, int64_t n, void **data) {
  dl_tensor view;
  int64_t there, stride;
  if (!view_here(c, obj, &view) || !is_narrow(c, &view) || !is_one_axis(&view, view.ndim, &there, &stride) ||
      there != n || (stride != 1 && n > 1) || (uintptr_t)view.data % 16 != 0) {
    return false;
  }
  *data = view.data;
  return true;
}

static PyObject *narrow_dtype(const cuda_call_ *c) { return c->layer.f16 ? c->torch->float16 : c->torch->bfloat16; }

/* A new tensor, which torch makes on the current GPU: an error where the call's is another one. */
static PyObject *new_here(const cuda_call_ *c, PyObject *dtype, int axes, const int64_t *sizes) {
  PyObject *tensor = new_dense(c->torch->empty_cuda, dtype, axes, sizes);
  dl_tensor view;
  if (tensor != NULL && !view_here(c, tensor, &view)) {
    Py_CLEAR(tensor);
    PyErr_Format(PyExc_RuntimeError, "moelora's CUDA kernels: GPU %d must be the current one", (int)c->device);
  }
  return tensor;
}

/* [..., width] for x's tokens. */
static PyObject *new_rows(const cuda_call_ *c, int64_t width) {
  int64_t sizes[3];
  memcpy(sizes, c->shape, sizeof sizes);
  sizes[c->axes - 1] = width;
  return new_here(c, narrow_dtype(c), c->axes, sizes);
}

/* Memory for a call, as 16-bit elements. */
static int64_t workspace_elements(const cuda_call_ *c, bool backward) {
  return (int64_t)((backward ? ml_layer_backward_bytes(&c->layer) : ml_layer_forward_bytes(&c->layer)) / 2);
}
static PyObject *new_workspace(const cuda_call_ *c, bool backward) {
  int64_t sizes[1] = {workspace_elements(c, backward)};
  return new_here(c, narrow_dtype(c), 1, sizes);
}

/* Where a new tensor's elements are; it is one of ours, so that can't fail. NULL for None. */
static void *data_of(const cuda_call_ *c, PyObject *tensor) {
  dl_tensor view;
  return tensor != NULL && tensor != Py_None && view_here(c, tensor, &view) ? view.data : NULL;
}

/* A part [rows, cols] of the workspace, as a tensor. */
static PyObject *part_of(PyObject *workspace, const void *memory, const void *part, int64_t rows, int64_t cols) {
  long long at = ((const char *)part - (const char *)memory) / 2;
  PyObject *result = NULL, *method = PyUnicode_InternFromString("as_strided"); /* else CPython caches a name per call */
  PyObject *args = method == NULL ? NULL
                                  : Py_BuildValue("O(LL)(LL)L", workspace, (long long)rows, (long long)cols,
                                                  (long long)cols, 1LL, at);
  if (args != NULL) {
    result = PyObject_VectorcallMethod(method, &PyTuple_GET_ITEM(args, 0), 4, NULL);
  }
  Py_XDECREF(args);
  Py_XDECREF(method);
  return result;
}

/* What torch multiplies: mixed [T, C], and backward the stack of A [C, d_in], forward that of B [d_out, C]. */
static PyObject *factors_in(const cuda_call_ *c, PyObject *workspace, bool backward) {
  void *memory = data_of(c, workspace);
  ml_places places = ml_layer_places(&c->layer, memory);
  int64_t C = c->layer.columns;
  PyObject *result = NULL, *mixed = part_of(workspace, memory, places.mixed, c->layer.tokens, C);
  PyObject *stacked = mixed == NULL ? NULL
                      : backward    ? part_of(workspace, memory, places.stacked_a, C, c->layer.d_in)
                                    : part_of(workspace, memory, places.stacked_b, c->layer.d_out, C);
  if (stacked != NULL) {
    result = PyTuple_Pack(2, mixed, stacked);
  }
  Py_XDECREF(stacked);
  Py_XDECREF(mixed);
  return result;
}

/* ---- forward ---- */

/* (y, hidden or None, None) of a layer that has been read, or (None, hidden or None, (mixed, stacked B)) where
 * y = base + mixed B^T is left to torch; None: all of it is. */
static PyObject *forward(const cuda_call_ *c, ml_rows x, bool keep_hidden) {
  ml_way way = ml_layer_way(&c->layer, false);
  if (way == ML_BY_TORCH) {
    return Py_NewRef(Py_None);
  }
  PyObject *result = NULL, *y = NULL, *hidden = NULL, *left = NULL, *workspace = new_workspace(c, false);
  if (workspace == NULL || (y = way == ML_BY_ADDMM ? Py_NewRef(Py_None) : new_rows(c, c->layer.d_out)) == NULL ||
      (hidden = keep_hidden ? new_rows(c, c->layer.columns) : Py_NewRef(Py_None)) == NULL) {
    goto done;
  }
  ml_cuda_status status;
  void *to = data_of(c, y), *kept = data_of(c, hidden), *memory = data_of(c, workspace);
  Py_BEGIN_ALLOW_THREADS;
  status = ml_layer_forward(&c->layer, x, to, kept, memory);
  Py_END_ALLOW_THREADS;
  if (status == ML_CUDA_OK) {
    left = way == ML_BY_ADDMM ? factors_in(c, workspace, false) : Py_NewRef(Py_None);
    result = left == NULL ? NULL : PyTuple_Pack(3, y, hidden, left);
  } else if (status == ML_CUDA_UNSUPPORTED) {
    result = Py_NewRef(Py_None);
  } else {
    raise_cuda(status);
  }
done:
  Py_XDECREF(left);
  Py_XDECREF(hidden);
  Py_XDECREF(y);
  Py_XDECREF(workspace);
  return result;
}

/* Whether one of the tensors requires grad where gradients are recorded at all; -1 with an exception. */
static int any_recorded(const cuda_call_ *c, PyObject *record, PyObject *const *tensors, Py_ssize_t n) {
  return record == Py_True ? any_requires_grad(c->torch, tensors, n) : 0;
}

/* (x, lora_A, lora_B, routing_weights, scaling, base_output, weight, bias, top_k, record, keep_hidden)
 * -> None, or (adapters, scaling, whether a gradient is to be recorded, what cuda_forward returns); keep_hidden: whether even if no
 * recorded gradient needs it; None: nothing is computed yet, and the last of the results is None. */
PyObject *cuda_call(PyObject *module, PyObject *const *args, Py_ssize_t n_args) {
  int64_t top_k, d_in;
  if (!takes("cuda_call", 11, n_args) || !read_int64(args[8], "top_k", &top_k)) {
    return NULL;
  }
  cuda_call_ c;
  ml_rows x, unused;
  PyObject *weights = args[3], *base = args[5], *weight = args[6], *bias = args[7];
  PyObject *record = args[9], *keep_hidden = args[10];
  answer plain = read_shape(&c, module, args[0], &x, &d_in);
  if (plain != YES) {
    return plain == ERROR ? NULL : Py_NewRef(Py_None);
  }
  PyObject *scaling = NULL, *done = NULL, *result = NULL, *adapters = joined(args[1], args[2]);
  if (adapters == NULL) {
    return NULL;
  }
  plain = read_experts(&c, adapters) && d_in == c.layer.d_in;
  if (plain == YES && (scaling = spread_scaling(args[4], c.layer.n_experts)) == NULL) {
    plain = ERROR;
  }
  plain = plain == YES
              ? read_scaling(&c, scaling) && read_weights(&c, weights, top_k) && read_frozen(&c, weight, bias) &&
                    (base == Py_None || (weight == Py_None && read_rows(&c, base, c.layer.d_out, &unused))) &&
                    ml_layer_begin(&c.layer) == ML_CUDA_OK &&
                    (c.layer.dense || (keep_hidden != Py_None && ml_layer_way(&c.layer, false) == ML_BY_GROUPED))
              : plain;
  if (plain != YES) {
    goto done;
  }
  PyObject *const others[] = {args[0], base, weights, weight, bias};
  PyObject *const *factors = &PyTuple_GET_ITEM(adapters, 0);
  Py_ssize_t n = c.layer.n_experts;
  if (any_negated(c.torch, others, 5) || any_negated(c.torch, factors, 2 * n)) {
    plain = NO;
    goto done;
  }
  int frozen = any_requires_grad(c.torch, others + 3, 2);
  /* Of the weights and B needs H; else of A, x or the base. */
  int needs_hidden = any_recorded(&c, record, factors + n, n);
  needs_hidden = needs_hidden == 0 ? any_recorded(&c, record, others + 2, 1) : needs_hidden;
  int required = needs_hidden == 0 ? any_recorded(&c, record, factors, n) : needs_hidden;
  required = required == 0 ? any_recorded(&c, record, others, 2) : required;
  plain = frozen < 0 || required < 0 ? ERROR : frozen > 0 ? NO : YES;
  if (plain == YES) {
    done = keep_hidden == Py_None ? Py_NewRef(Py_None) : forward(&c, x, needs_hidden > 0 || keep_hidden == Py_True);
    plain = done == NULL ? ERROR : done == Py_None && !c.layer.dense ? NO : YES;
  }
  if (plain == YES) {
    result = PyTuple_Pack(4, adapters, scaling, required ? Py_True : Py_False, done);
  }
done:
  if (plain == NO) {
    result = Py_NewRef(Py_None);
  }
  Py_XDECREF(done);
  Py_XDECREF(scaling);
  Py_DECREF(adapters);
  return result;
}

/* (x, adapters, routing_weights, scaling, weight, bias, dropout, top_k, keep_hidden) -> as `forward` */
PyObject *cuda_forward(PyObject *module, PyObject *const *args, Py_ssize_t n_args) {
  int64_t top_k, d_in;
  if (!takes("cuda_forward", 9, n_args) || !read_int64(args[7], "top_k", &top_k)) {
    return NULL;
  }
  cuda_call_ c;
  ml_rows x;
  answer plain = read_shape(&c, module, args[0], &x, &d_in);
  plain = plain == YES ? read_experts(&c, args[1]) && d_in == c.layer.d_in && read_weights(&c, args[2], top_k) &&
                             read_scaling(&c, args[3]) && read_frozen(&c, args[4], args[5]) &&
                             ml_layer_begin(&c.layer) == ML_CUDA_OK && read_drops(&c, args[6])
                       : plain;
  if (plain != YES) {
    return plain == ERROR ? NULL : Py_NewRef(Py_None);
  }
  return forward(&c, x, args[8] == Py_True);
}

/* ---- backward ---- */

/* A tensor in the shape of another one, without gaps, in its dtype. */
static PyObject *new_like(const cuda_call_ *c, PyObject *like) {
  dl_tensor view;
  if (!view_here(c, like, &view)) {
    PyErr_SetString(PyExc_ValueError, "expected a tensor of the call's device");
    return NULL;
  }
  bool wide = view.dtype.bits == 32;
  PyObject *narrow = view.dtype.code == DL_BFLOAT ? c->torch->bfloat16 : c->torch->float16;
  return new_here(c, wide ? c->torch->float32 : narrow, view.ndim, view.shape);
}

/* With room for what is needed. `grad_x`: what the gradient of x is made in, where not None; `but_x`: by others. */
static PyObject *new_grads(const cuda_call_ *c, PyObject *const *saved, PyObject *needed, PyObject *grad_y,
                           PyObject *grad_x, bool but_x) {
  Py_ssize_t n = PyTuple_GET_SIZE(needed);
  PyObject *grads = PyTuple_New(n);
  for (Py_ssize_t i = 0; grads != NULL && i < n; i++) {
    PyObject *grad;
    if (PyTuple_GET_ITEM(needed, i) != Py_True || i == NODE_FROZEN || i == NODE_SETTINGS || (i == NODE_X && but_x)) {
      grad = Py_NewRef(Py_None);
    } else if (i == NODE_BASE_OUTPUT) {
      grad = Py_NewRef(grad_y);
    } else if (i == NODE_X) {
      grad = grad_x != Py_None ? Py_NewRef(grad_x) : new_rows(c, c->layer.d_in);
    } else {
      grad = new_like(c, saved[i == NODE_ROUTING_WEIGHTS ? SAVED_ROUTING_WEIGHTS : i - N_NODE + N_SAVED]);
    }
    if (grad == NULL) {
      Py_CLEAR(grads);
    } else {
      PyTuple_SET_ITEM(grads, i, grad);
    }
  }
  return grads;
}

/* (saved, needs_input_grad, scaling, grad_y, grad_x, dropout, top_k) -> (the gradients of the node's arguments, None), or, where
 * grad_x = g W + mixed A is left to torch, (the others, (mixed, stacked A)); None: all of it is. grad_x: with dropout and a weight
 * grad_y times the weight, else None. */
PyObject *cuda_backward(PyObject *module, PyObject *const *args, Py_ssize_t n_args) {
  int64_t top_k, d_out;
  if (!takes("cuda_backward", 7, n_args) || !read_int64(args[6], "top_k", &top_k)) {
    return NULL;
  }
  PyObject *needed = args[1], *grad_y = args[3], *base = args[4], *grads = NULL, *workspace = NULL, *result = NULL;
  Py_ssize_t n_saved = PyTuple_CheckExact(args[0]) ? PyTuple_GET_SIZE(args[0]) : 0;
  if (n_saved <= N_SAVED || !PyTuple_CheckExact(needed) || PyTuple_GET_SIZE(needed) != n_saved - N_SAVED + N_NODE) {
    return Py_NewRef(Py_None);
  }
  PyObject *const *saved = &PyTuple_GET_ITEM(args[0], 0);
  cuda_call_ c;
  ml_rows g, x = {0}, unused;
  void *hidden = NULL;
  answer plain = read_shape(&c, module, grad_y, &g, &d_out);
  PyObject *adapters = plain == YES ? PyTuple_GetSlice(args[0], N_SAVED, n_saved) : NULL;
  if (adapters == NULL) {
    return plain == NO ? Py_NewRef(Py_None) : NULL;
  }
  bool need_x = PyTuple_GET_ITEM(needed, NODE_X) == Py_True;
  plain = !any_negated(c.torch, &grad_y, 1) && !any_negated(c.torch, saved, n_saved) && read_experts(&c, adapters) &&
          d_out == c.layer.d_out && read_weights(&c, saved[SAVED_ROUTING_WEIGHTS], top_k) &&
          read_scaling(&c, args[2]) && read_frozen(&c, saved[SAVED_WEIGHT], Py_None) &&
          (saved[SAVED_X] == Py_None || read_rows(&c, saved[SAVED_X], c.layer.d_in, &x)) &&
          ml_layer_begin(&c.layer) == ML_CUDA_OK &&
          (saved[SAVED_HIDDEN] == Py_None ||
           is_whole(&c, saved[SAVED_HIDDEN], c.layer.tokens * c.layer.columns, &hidden)) &&
          read_drops(&c, args[5]) && ml_layer_has_kernels(&c.layer) &&
          (base == Py_None ? !need_x || !c.layer.drops || saved[SAVED_WEIGHT] == Py_None
                           : read_rows(&c, base, c.layer.d_in, &unused) && unused.row == c.layer.d_in);
  bool to_add = plain == YES && need_x && !c.layer.drops && ml_layer_way(&c.layer, true) == ML_BY_ADDMM;
  if (plain != YES || (grads = new_grads(&c, saved, needed, grad_y, base, to_add)) == NULL ||
      (workspace = new_workspace(&c, true)) == NULL) {
    goto done;
  }
  ml_adapter into[ML_MAX_EXPERTS];
  memset(into, 0, sizeof into);
  for (int e = 0; e < c.layer.n_experts; e++) {
    into[e].a = data_of(&c, PyTuple_GET_ITEM(grads, N_NODE + e));
    into[e].b = data_of(&c, PyTuple_GET_ITEM(grads, N_NODE + c.layer.n_experts + e));
  }
  void *grad_x = data_of(&c, PyTuple_GET_ITEM(grads, NODE_X)), *memory = data_of(&c, workspace);
  void *grad_w = data_of(&c, PyTuple_GET_ITEM(grads, NODE_ROUTING_WEIGHTS));
  ml_cuda_status status;
  Py_BEGIN_ALLOW_THREADS;
  status = ml_layer_backward(&c.layer, x, g, hidden, grad_x, base != Py_None, grad_w, into, memory);
  Py_END_ALLOW_THREADS;
  if (status == ML_CUDA_OK) {
    PyObject *left = to_add ? factors_in(&c, workspace, true) : Py_NewRef(Py_None);
    result = left == NULL ? NULL : PyTuple_Pack(2, grads, left);
    Py_XDECREF(left);
  } else if (status == ML_CUDA_UNSUPPORTED) {
    plain = NO;
  } else {
    raise_cuda(status);
  }
done:
  if (plain == NO) {
    result = Py_NewRef(Py_None);
  }
  Py_XDECREF(workspace);
  Py_XDECREF(grads);
  Py_DECREF(adapters);
  return result;
}

/* ---- between torch's products ---- */

/* The layer of (x or grad_y, adapters, routing_weights, scaling, top_k), without its base; the rows of the first. */
static answer read_mixture(cuda_call_ *c, PyObject *module, PyObject *const *args, bool backward, ml_rows *rows) {
  int64_t top_k, width;
  if (!read_int64(args[4], "top_k", &top_k)) {
    return ERROR;
  }
  answer plain = read_shape(c, module, args[0], rows, &width);
  return plain == YES ? read_experts(c, args[1]) && width == (backward ? c->layer.d_out : c->layer.d_in) &&
                            read_weights(c, args[2], top_k) && read_scaling(c, args[3]) &&
                            ml_layer_begin(&c->layer) == ML_CUDA_OK && c->layer.dense
                      : plain;
}

/* (x or grad_y, adapters, routing_weights, scaling, top_k, backward, dropout)
 * -> (workspace, stacked A [C, d_in], stacked B [d_out, C], mixed [T, C], backward: weighted [T, C], else None), or None */
PyObject *cuda_prepare(PyObject *module, PyObject *const *args, Py_ssize_t n_args) {
  if (!takes("cuda_prepare", 7, n_args)) {
    return NULL;
  }
  cuda_call_ c;
  ml_rows unused;
  bool backward = args[5] == Py_True;
  answer plain = read_mixture(&c, module, args, backward, &unused);
  plain = plain == YES ? read_drops(&c, args[6]) : plain;
  if (plain != YES) {
    return plain == ERROR ? NULL : Py_NewRef(Py_None);
  }
  PyObject *parts[5] = {0}, *result = NULL;
  parts[0] = new_workspace(&c, backward);
  if (parts[0] == NULL) {
    return NULL;
  }
  void *memory = data_of(&c, parts[0]);
  ml_places places = ml_layer_places(&c.layer, memory);
  ml_cuda_status status;
  Py_BEGIN_ALLOW_THREADS;
  status = ml_layer_prepare(&c.layer, memory);
  Py_END_ALLOW_THREADS;
  if (status != ML_CUDA_OK) {
    raise_cuda(status);
  } else if ((parts[1] = part_of(parts[0], memory, places.stacked_a, c.layer.columns, c.layer.d_in)) != NULL &&
             (parts[2] = part_of(parts[0], memory, places.stacked_b, c.layer.d_out, c.layer.columns)) != NULL &&
             (parts[3] = part_of(parts[0], memory, places.mixed, c.layer.tokens, c.layer.columns)) != NULL &&
             (parts[4] = backward ? part_of(parts[0], memory, places.weighted, c.layer.tokens, c.layer.columns)
                                  : Py_NewRef(Py_None)) != NULL) {
    result = PyTuple_Pack(5, parts[0], parts[1], parts[2], parts[3], parts[4]);
  }
  for (int i = 0; i < 5; i++) {
    Py_XDECREF(parts[i]);
  }
  return result;
}

/* The gradient of the routing weights, in their dtype without gaps, or None. */
static bool read_grad_w(const cuda_call_ *c, PyObject *obj, void **data) {
  const ml_weights *w = &c->layer.weights;
  dl_tensor view;
  int64_t n, stride;
  if (obj == Py_None) {
    return true;
  }
  if (!view_here(c, obj, &view) || !is_one_axis(&view, view.ndim, &n, &stride) || (stride != 1 && n > 1) ||
      n != c->layer.tokens / c->layer.share * w->n_experts ||
      !is_of(&view, w->dtype == ML_CUDA_BF16 ? DL_BFLOAT : DL_FLOAT, w->dtype == ML_CUDA_F32 ? 32 : 16)) {
    return false;
  }
  *data = view.data;
  return true;
}

/* (x, adapters, routing_weights, scaling, top_k, hidden, dropout, workspace): with dropout hidden is made here; or, backward,
 * (grad_y, adapters, routing_weights, scaling, top_k, hidden or None, grad_w or None, dropout, workspace) */
static PyObject *mix(PyObject *module, PyObject *const *args, bool backward, PyObject *grad_w, PyObject *dropout,
                     PyObject *workspace) {
  cuda_call_ c;
  ml_rows rows;
  void *memory = NULL, *hidden = NULL, *grad = NULL;
  answer plain = read_mixture(&c, module, args, backward, &rows);
  plain = plain == YES ? read_drops(&c, dropout) : plain;
  if (plain == ERROR) {
    return NULL;
  }
  if (plain == NO ||
      !((backward && args[5] == Py_None) || is_whole(&c, args[5], c.layer.tokens * c.layer.columns, &hidden)) ||
      !read_grad_w(&c, grad_w, &grad) || !is_whole(&c, workspace, workspace_elements(&c, backward), &memory)) {
    PyErr_SetString(PyExc_ValueError, "expected the tensors that cuda_prepare took and made");
    return NULL;
  }
  ml_cuda_status status;
  Py_BEGIN_ALLOW_THREADS;
  status = backward        ? ml_layer_mix_backward(&c.layer, hidden, grad, memory)
           : c.layer.drops ? ml_layer_shrink(&c.layer, rows, hidden, memory)
                           : ml_layer_mix(&c.layer, hidden, memory);
  Py_END_ALLOW_THREADS;
  return raise_cuda(status) ? NULL : Py_NewRef(Py_None);
}

PyObject *cuda_mix(PyObject *module, PyObject *const *args, Py_ssize_t n_args) {
  return takes("cuda_mix", 8, n_args) ? mix(module, args, false, Py_None, args[6], args[7]) : NULL;
}

PyObject *cuda_mix_backward(PyObject *module, PyObject *const *args, Py_ssize_t n_args) {
  return takes("cuda_mix_backward", 9, n_args) ? mix(module, args, true, args[6], args[7], args[8]) : NULL;
}

/* A tuple of a gradient of A for each expert, as the adapters are, or None. */
static bool read_grads(const cuda_call_ *c, PyObject *grads, ml_adapter *to) {
  dl_tensor view;
  if (!PyTuple_CheckExact(grads) || PyTuple_GET_SIZE(grads) != c->layer.n_experts) {
    return false;
  }
  for (int e = 0; e < c->layer.n_experts; e++) {
    PyObject *grad = PyTuple_GET_ITEM(grads, e);
    if (grad != Py_None) {
      if (!read_adapter(c, grad, &view) || view.shape[0] != c->layer.experts[e].rank ||
          view.shape[1] != c->layer.d_in) {
        return false;
      }
      to[e].a = view.data;
    }
  }
  return true;
}

/* (grad_y, adapters, routing_weights, scaling, top_k, x, gradients of A, grad_x, adds, dropout, workspace): x and the gradients
 * may be None, and so may grad_x [..., d_in], which is made here, or, where it adds, holds grad_y times the weight already. */
PyObject *cuda_drop_backward(PyObject *module, PyObject *const *args, Py_ssize_t n_args) {
  if (!takes("cuda_drop_backward", 11, n_args)) {
    return NULL;
  }
  cuda_call_ c;
  ml_rows unused, x = {0};
  ml_adapter grads[ML_MAX_EXPERTS];
  memset(grads, 0, sizeof grads);
  void *memory = NULL, *grad_x = NULL;
  answer plain = read_mixture(&c, module, args, true, &unused);
  if (plain == ERROR) {
    return NULL;
  }
  if (plain == NO || args[9] == Py_None || !read_drops(&c, args[9]) ||
      !(args[5] == Py_None ? args[6] == Py_None
                           : read_rows(&c, args[5], c.layer.d_in, &x) && read_grads(&c, args[6], grads)) ||
      !(args[7] == Py_None || is_whole(&c, args[7], c.layer.tokens * c.layer.d_in, &grad_x)) ||
      !is_whole(&c, args[10], workspace_elements(&c, true), &memory)) {
    PyErr_SetString(PyExc_ValueError, "expected the tensors that cuda_prepare took and made");
    return NULL;
  }
  bool adds = args[8] == Py_True;
  ml_cuda_status status;
  Py_BEGIN_ALLOW_THREADS;
  status = ml_layer_drop_backward(&c.layer, x, grad_x, adds, grads, memory);
  Py_END_ALLOW_THREADS;
  return raise_cuda(status) ? NULL : Py_NewRef(Py_None);
}

/* ---- which way ---- */

/* (name or None) */
PyObject *set_cuda_way(PyObject *module, PyObject *name) {
  (void)module;
  if (name != Py_None && !PyUnicode_Check(name)) {
    PyErr_Format(PyExc_TypeError, "name must be a str or None, got %s", Py_TYPE(name)->tp_name);
    return NULL;
  }
  const char *text = name == Py_None ? NULL : PyUnicode_AsUTF8(name);
  if (text == NULL && name != Py_None) {
    return NULL;
  }
  if (ml_force_way(text) != ML_CUDA_OK) {
    PyErr_Format(PyExc_ValueError,
                 "name must be 'torch', 'decode', 'dual', 'fused', 'shared', 'grouped', 'addmm' or None, got %R", name);
    return NULL;
  }
  Py_RETURN_NONE;
}

/* (major, multiprocessors, tokens, d_in, d_out, ranks, n_experts, top_k, backward) -> the name of the way of a layer whose memory
 * is aligned; ranks: of all experts together, top_k: 0, all of them */
PyObject *cuda_way(PyObject *module, PyObject *const *args, Py_ssize_t n_args) {
  (void)module;
  enum { MAJOR, MULTIPROCESSORS, TOKENS, D_IN, D_OUT, RANKS, EXPERTS, TOP_K, N_NUMBERS };
  int64_t numbers[N_NUMBERS];
  if (!takes("cuda_way", N_NUMBERS + 1, n_args)) {
    return NULL;
  }
  for (int i = 0; i < N_NUMBERS; i++) {
    static const char *const names[] = {"major", "multiprocessors", "tokens",    "d_in",
                                        "d_out", "ranks",           "n_experts", "top_k"};
    if (!read_int64(args[i], names[i], &numbers[i])) {
      return NULL;
    }
    int64_t least = i == TOP_K ? 0 : 1, most = i == EXPERTS ? numbers[RANKS]
                                               : i == TOP_K ? numbers[EXPERTS]
                                                            : INT32_MAX;
    if (numbers[i] < least || numbers[i] > most) {
      PyErr_Format(PyExc_ValueError, "%s must lie in [%lld, %lld], got %lld", names[i], (long long)least,
                   (long long)most, (long long)numbers[i]);
      return NULL;
    }
  }
  int64_t n = numbers[EXPERTS], ranks = numbers[RANKS];
  ml_gpu gpu = {.major = (int)numbers[MAJOR], .multiprocessors = (int)numbers[MULTIPROCESSORS]};
  ml_layer layer = {.gpu = &gpu,
                    .tokens = numbers[TOKENS],
                    .d_in = numbers[D_IN],
                    .d_out = numbers[D_OUT],
                    .n_experts = (int)n,
                    .weights.top_k = numbers[TOP_K] == n ? 0 : (int)numbers[TOP_K],
                    .share = 1};
  static _Alignas(16) const char weight[16];
  layer.weight = weight;
  layer.weight_row = layer.d_in;
  for (int e = 0; e < n && e < ML_MAX_EXPERTS; e++) {
    layer.experts[e].rank = (int)(ranks / n + (e < ranks % n));
  }
  bool plain = ml_layer_begin(&layer) == ML_CUDA_OK;
  return PyUnicode_FromString(ml_way_name(plain ? ml_layer_way(&layer, args[N_NUMBERS] == Py_True) : ML_BY_TORCH));
}
