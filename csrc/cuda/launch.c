/* What launches of a layer's kernels have in common. */
#include "layer.h"

ml_cuda_status ml_layer_launch(const ml_layer *layer, ml_variant variant, const char *entry, ml_launch how,
                               void **arguments) {
  ml_kernel *kernel;
  ml_cuda_status status = ml_kernel_of(layer->gpu, &variant, entry, (int)how.shared_bytes, &kernel);
  return status == ML_CUDA_OK ? ml_launch_kernel(layer->gpu, kernel, &how, layer->stream, arguments) : status;
}

ml_cuda_status ml_map_of(const ml_layer *layer, ml_tensor_map *map, const void *data, int64_t rows, int64_t cols,
                         int64_t row, int box_rows) {
  return ml_tensor_map_of(layer->gpu, map, layer->f16, data, rows, cols, row * 2, box_rows);
}

/* Clusters that are not all resident at once take twice as long; of a GPU with 132 multiprocessors 66 of two,
 * 39 of three and 30 of four are. More brought nothing. */
unsigned ml_cluster_for(const ml_layer *layer, int64_t blocks, int64_t parts) {
  static const int resident[] = {66, 39, 30};
  unsigned cluster = 4;
  while (cluster > 1 &&
         (blocks * 132 > (int64_t)resident[cluster - 2] * layer->gpu->multiprocessors || (int64_t)cluster > parts)) {
    cluster--;
  }
  return cluster;
}
