/* What the core asks of the compiler beyond C11; gcc, clang and mingw-w64 have all of it. */
#ifndef MOELORA_COMPILER_H
#define MOELORA_COMPILER_H

#define ML_INLINE static inline __attribute__((always_inline))

/* Keeps rare code away from a hot loop's registers. */
#define ML_NOINLINE static __attribute__((noinline))

/* Unrolls the loop that follows completely: what keeps a tile's accumulators in registers. */
#if defined(__clang__)
#define ML_UNROLL _Pragma("clang loop unroll(full)")
#else
#define ML_UNROLL _Pragma("GCC unroll 64")
#endif

/* Brings what is at p, if it is memory at all, into the second level of the cache. */
#define ML_PREFETCH(p) __builtin_prefetch((p), 0, 2)

/* The same for the first level, of what is read or written next. */
#define ML_PREFETCH_NEAR(p) __builtin_prefetch((p), 0, 3)

/* Hides where the pointer p comes from. */
#define ML_OPAQUE(p) __asm__("" : "+r"(p))

/* *result = a op b; true when that overflows. */
#define ML_MUL_OVERFLOWS(a, b, result) __builtin_mul_overflow(a, b, result)
#define ML_ADD_OVERFLOWS(a, b, result) __builtin_add_overflow(a, b, result)

/* mingw-w64's isnan and isfinite are macros that convert to float first. */
#define ML_ISNAN(x) __builtin_isnan(x)
#define ML_ISFINITE(x) __builtin_isfinite(x)

#if defined(__x86_64__) || defined(__i386__)
#define ML_X86 1
#define ML_CPU_HAS(feature) (__builtin_cpu_supports(feature) != 0)
#define ML_PAUSE() __builtin_ia32_pause()
#else
#define ML_X86 0
#define ML_PAUSE() ((void)0)
#endif

#if defined(__aarch64__)
#define ML_ARM64 1
#else
#define ML_ARM64 0
#endif

#endif
