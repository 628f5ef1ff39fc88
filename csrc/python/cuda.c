#include "cuda.h"

#include "module.h"
#include "program.h"

bool raise_cuda(ml_cuda_status status) {
  if (status == ML_CUDA_NO_MEMORY) {
    PyErr_SetString(PyExc_MemoryError, ml_cuda_message());
  } else if (status == ML_CUDA_VALUE) {
    PyErr_SetString(PyExc_ValueError, ml_cuda_message());
  } else if (status != ML_CUDA_OK) {
    PyErr_SetString(PyExc_RuntimeError, ml_cuda_message());
  }
  return status != ML_CUDA_OK;
}

/* ---- compiling ---- */

/* args: the name of a source's file, a tuple of its options' values, an architecture */
static bool read_variant(PyObject *const *args, ml_variant *variant, const char **arch) {
  if (!PyUnicode_Check(args[0]) || !PyUnicode_Check(args[2])) {
    PyErr_SetString(PyExc_TypeError, "source and arch must be str");
    return false;
  }
  int source = 0;
  while (source < ML_N_SOURCES && PyUnicode_CompareWithASCIIString(args[0], ml_source_name((ml_source)source)) != 0) {
    source++;
  }
  if (source == ML_N_SOURCES) {
    PyErr_Format(PyExc_ValueError, "there is no source %R", args[0]);
    return false;
  }
  *variant = (ml_variant){.source = (ml_source)source};
  if (!is_items(args[1], "options", -1)) {
    return false;
  }
  Py_ssize_t n = PySequence_Fast_GET_SIZE(args[1]);
  if (n > ML_MAX_OPTIONS) {
    PyErr_Format(PyExc_ValueError, "options must hold at most %d numbers, got %zd", ML_MAX_OPTIONS, n);
    return false;
  }
  for (Py_ssize_t i = 0; i < n; i++) {
    int64_t value = 0;
    if (!read_int64(PySequence_Fast_GET_ITEM(args[1], i), "options", &value)) {
      return false;
    }
    if (value < INT16_MIN || value > INT16_MAX) {
      PyErr_Format(PyExc_ValueError, "options must fit into 16 bits, got %lld", (long long)value);
      return false;
    }
    variant->options[i] = (int16_t)value;
  }
  *arch = PyUnicode_AsUTF8(args[2]);
  return *arch != NULL;
}

/* (source, options, arch) -> (binary, the compiler's text or None) */
PyObject *cuda_compile(PyObject *module, PyObject *const *args, Py_ssize_t n_args) {
  (void)module;
  ml_variant variant;
  const char *arch;
  if (!takes("cuda_compile", 3, n_args) || !read_variant(args, &variant, &arch)) {
    return NULL;
  }
  void *cubin;
  size_t bytes;
  char *log;
  ml_cuda_status status;
  Py_BEGIN_ALLOW_THREADS;
  status = ml_variant_compile(&variant, arch, &cubin, &bytes, &log);
  Py_END_ALLOW_THREADS;
  PyObject *result = NULL;
  if (!raise_cuda(status)) {
    result = Py_BuildValue("y#s", (const char *)cubin, (Py_ssize_t)bytes, log);
  }
  free(cubin);
  free(log);
  return result;
}

/* (source, options, arch) -> the binary, from the cache on disk where it is there */
PyObject *cuda_cubin(PyObject *module, PyObject *const *args, Py_ssize_t n_args) {
  (void)module;
  ml_variant variant;
  const char *arch;
  if (!takes("cuda_cubin", 3, n_args) || !read_variant(args, &variant, &arch)) {
    return NULL;
  }
  void *cubin;
  size_t bytes;
  ml_cuda_status status;
  Py_BEGIN_ALLOW_THREADS;
  status = ml_cubin_of(&variant, arch, 0, &cubin, &bytes);
  Py_END_ALLOW_THREADS;
  PyObject *result = raise_cuda(status) ? NULL : PyBytes_FromStringAndSize(cubin, (Py_ssize_t)bytes);
  free(cubin);
  return result;
}

/* A tuple of (file, options, whether it is for Hopper alone), one for each source of this build. */
PyObject *cuda_sources(PyObject *module, PyObject *unused) {
  (void)module, (void)unused;
  PyObject *list = PyList_New(0);
  for (int source = 0; list != NULL && source < ML_N_SOURCES; source++) {
    char options[ML_MAX_OPTIONS][ML_OPTION_BYTES];
    int n = ml_source_options((ml_source)source, options);
    if (n < 0) {
      continue;
    }
    PyObject *names = PyTuple_New(n), *entry = NULL;
    for (int i = 0; names != NULL && i < n; i++) {
      PyObject *name = PyUnicode_FromString(options[i]);
      if (name == NULL) {
        Py_CLEAR(names);
      } else {
        PyTuple_SET_ITEM(names, i, name);
      }
    }
    if (names != NULL) {
      entry = Py_BuildValue("sNN", ml_source_name((ml_source)source), names,
                            PyBool_FromLong(ml_source_for_hopper((ml_source)source)));
    }
    if (entry == NULL || PyList_Append(list, entry) < 0) {
      Py_CLEAR(list);
    }
    Py_XDECREF(entry);
  }
  PyObject *result = list == NULL ? NULL : PyList_AsTuple(list);
  Py_XDECREF(list);
  return result;
}

/* ---- what there is ---- */

/* None or a path, as bytes. */
static bool read_path(PyObject *obj, PyObject **path) {
  if (obj == Py_None) {
    *path = NULL;
    return true;
  }
  if (!PyUnicode_FSConverter(obj, path)) {
    return false;
  }
  if (PyBytes_GET_SIZE(*path) >= ML_PATH_BYTES) {
    Py_CLEAR(*path);
    PyErr_Format(PyExc_ValueError, "a path must have less than %d bytes", ML_PATH_BYTES);
    return false;
  }
  return true;
}

/* (a libnvrtc, the folder of the cache): paths or None */
PyObject *set_cuda_places(PyObject *module, PyObject *const *args, Py_ssize_t n_args) {
  (void)module;
  PyObject *nvrtc = NULL, *cache = NULL, *result = NULL;
  if (takes("set_cuda_places", 2, n_args) && read_path(args[0], &nvrtc) && read_path(args[1], &cache)) {
    ml_cuda_set_places(nvrtc == NULL ? NULL : PyBytes_AS_STRING(nvrtc),
                       cache == NULL ? NULL : PyBytes_AS_STRING(cache));
    result = Py_NewRef(Py_None);
  }
  Py_XDECREF(nvrtc);
  Py_XDECREF(cache);
  return result;
}

/* -> (1000 major + 10 minor of the CUDA that the driver supports, number of GPUs) */
PyObject *cuda_driver(PyObject *module, PyObject *unused) {
  (void)module, (void)unused;
  int version, n_gpus;
  ml_cuda_status status;
  Py_BEGIN_ALLOW_THREADS;
  status = ml_cuda_driver(&version, &n_gpus);
  Py_END_ALLOW_THREADS;
  return raise_cuda(status) ? NULL : Py_BuildValue("ii", version, n_gpus);
}

/* -> (major, minor) of NVRTC */
PyObject *cuda_compiler(PyObject *module, PyObject *unused) {
  (void)module, (void)unused;
  int major, minor;
  ml_cuda_status status;
  Py_BEGIN_ALLOW_THREADS;
  status = ml_cuda_compiler(&major, &minor);
  Py_END_ALLOW_THREADS;
  return raise_cuda(status) ? NULL : Py_BuildValue("ii", major, minor);
}

/* -> the folder of the cache, or None */
PyObject *cuda_cache(PyObject *module, PyObject *unused) {
  (void)module, (void)unused;
  char folder[ML_PATH_BYTES];
  return ml_cuda_cache(folder) ? PyUnicode_DecodeFSDefault(folder) : Py_NewRef(Py_None);
}

/* ordinal -> (major, minor, multiprocessors) */
PyObject *cuda_device(PyObject *module, PyObject *obj) {
  (void)module;
  int64_t ordinal = 0;
  if (!read_int64(obj, "ordinal", &ordinal)) {
    return NULL;
  }
  const ml_gpu *gpu = NULL;
  ml_cuda_status status;
  Py_BEGIN_ALLOW_THREADS;
  status = ml_gpu_at(ordinal < 0 || ordinal > INT_MAX ? -1 : (int)ordinal, &gpu);
  Py_END_ALLOW_THREADS;
  return raise_cuda(status) ? NULL : Py_BuildValue("iii", gpu->major, gpu->minor, gpu->multiprocessors);
}
