/* Routing on a GPU: route.cu's kernels behind the arguments of core/moelora.h's ml_route. */
#ifndef MOELORA_CUDA_ROUTE_H
#define MOELORA_CUDA_ROUTE_H

#include "arguments.h"
#include "driver.h"

/* Where a call runs, and what it reads: in.rate, which follows from the temperature, is left to the call. */
typedef struct {
  const ml_gpu *gpu;
  void *stream;
  int dtype; /* of the logits: ML_CUDA_F32, ... */
  double temperature;
} ml_route_place;

/* Whether there are kernels for so many tokens and experts. */
bool ml_cuda_routes(int64_t tokens, int64_t experts);

/* Bytes that a forward works in, 8-byte aligned and not initialised. */
int64_t ml_cuda_route_workspace(const ml_route_place *place, const ml_routed_rows *in);

/* Both return when the work is on the stream. Of ml_route_forward the blocks' fields are left to the call. */
ml_cuda_status ml_cuda_route(const ml_route_place *place, ml_route_forward call, void *workspace);
ml_cuda_status ml_cuda_route_backward(const ml_route_place *place, ml_route_gradient call);

#endif
