/* 16-bit elements, bfloat16 or float16 (ML_F16), and what every kernel uses. */
#ifndef MOELORA_ELEMENTS
#define MOELORA_ELEMENTS

#include "arguments.h"

typedef unsigned int u32;
typedef unsigned long long u64;
typedef unsigned short u16;
#define DEVICE __device__ __forceinline__

#if ML_F16
#define TYPE "f16"
#else
#define TYPE "bf16"
#endif

DEVICE u32 shared_address(const void *p) { return (u32)__cvta_generic_to_shared(p); }

/* Two floats as 16-bit elements, the first in the low half. */
DEVICE u32 narrow(float low, float high) {
  u32 both;
  asm("cvt.rn." TYPE "x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
  return both;
}

DEVICE float widen_f16(u16 element) {
  float wide;
  asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(element));
  return wide;
}
DEVICE float widen_bf16(u16 element) { return __uint_as_float((u32)element << 16); }
#if ML_F16
DEVICE float widen(u16 element) { return widen_f16(element); }
#else
DEVICE float widen(u16 element) { return widen_bf16(element); }
#endif
DEVICE float low_of(u32 both) { return widen((u16)both); }
DEVICE float high_of(u32 both) { return widen((u16)(both >> 16)); }

/* ---- launches that overlap (from sm_90 on) ---- */

DEVICE void wait_for_predecessor() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
DEVICE void let_successor_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

/* ---- routing weights ---- */

DEVICE float weight_at(const ml_weights &w, int token, int e) {
  long long at = token / w.seq * w.batch_stride + token % w.seq * w.seq_stride + e * w.stride;
  if (w.dtype == ML_CUDA_F32) return ((const float *)w.data)[at];
  u16 element = ((const u16 *)w.data)[at];
  return w.dtype == ML_CUDA_F16 ? widen_f16(element) : widen_bf16(element);
}

/* The i-th number of a gradient of weights of that dtype. */
DEVICE void put_grad(int dtype, void *grad, u64 i, float value) {
  if (dtype == ML_CUDA_F32) {
    ((float *)grad)[i] = value;
    return;
  }
  u32 rounded;
  if (dtype == ML_CUDA_F16) {
    asm("cvt.rn.f16x2.f32 %0, %1, %1;" : "=r"(rounded) : "f"(value));
  } else {
    asm("cvt.rn.bf16x2.f32 %0, %1, %1;" : "=r"(rounded) : "f"(value));
  }
  ((u16 *)grad)[i] = (u16)rounded;
}

/* The factor s w of an expert for a token, or, where top_k drops the expert, DROPPED, which no s w is: times it everything is 0,
 * infinities and NaN, too. */
#define DROPPED (-0.f)
DEVICE float factor_of(float scaling, float weight) { return scaling * weight + 0.f; /* -0 becomes 0 */ }
DEVICE float times(float factor, float value) { return __float_as_uint(factor) == 0x80000000u ? 0.f : factor * value; }

/* Whether expert e is among the token's top k: the largest weights, ties to the lower index, NaN above all. */
DEVICE bool is_kept(const ml_weights &w, int token, int e) {
  if (w.top_k == 0) return true;
  float own = weight_at(w, token, e);
  int before = 0;
  for (int i = 0; i < w.n_experts; i++) {
    float other = weight_at(w, token, i);
    bool larger = other != other ? own == own : other > own;
    bool equal = other == own || (other != other && own != own);
    before += larger || (equal && i < e);
  }
  return before < w.top_k;
}

#endif
