/* Sixteen lanes of 32 bits, written with the compiler's vector extensions so that one source serves every CPU.
 *
 * Owns the vector types, shuffles and the few functions (exp2, reductions, transpose) that the kernels share; must not
 * know an element type or an operation of a model. On AVX-512 a vector is one register; elsewhere the compiler splits
 * it, which is slower but right.
 */
#ifndef VECTOR_H
#define VECTOR_H

#include <stdint.h>
#include <string.h>

#ifdef __AVX512F__
#include <immintrin.h>
#endif

enum { LANES = 16 };

typedef float v16f __attribute__((vector_size(64)));
typedef uint32_t v16u __attribute__((vector_size(64)));
typedef int32_t v16i __attribute__((vector_size(64)));

#define FIRST_LANES ((v16i){0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15})

#define INLINE static inline __attribute__((always_inline))

#ifdef __clang__
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (v16i){__VA_ARGS__})
#endif

INLINE v16u load_bits(const void *from) {
    v16u v;
    memcpy(&v, from, sizeof v);
    return v;
}

INLINE void store_bits(void *to, v16u v) { memcpy(to, &v, sizeof v); }

INLINE v16f load_floats(const float *from) { return (v16f)load_bits(from); }

INLINE void store_floats(float *to, v16f v) { store_bits(to, (v16u)v); }

INLINE v16f splat(float value) { return value - (v16f){0}; }

/* `mask` lanes are all ones or all zeros, as comparisons of vectors give them. */
INLINE v16f select_lanes(v16i mask, v16f yes, v16f no) {
    return (v16f)(((v16u)mask & (v16u)yes) | (~(v16u)mask & (v16u)no));
}

/* Spelt out for AVX-512, where the compiler does not see that comparison and selection are one instruction. */
#ifdef __AVX512F__
INLINE v16f max_lanes(v16f a, v16f b) { return (v16f)_mm512_max_ps((__m512)a, (__m512)b); }
INLINE v16f min_lanes(v16f a, v16f b) { return (v16f)_mm512_min_ps((__m512)a, (__m512)b); }
#else
INLINE v16f max_lanes(v16f a, v16f b) { return select_lanes(a > b, a, b); }
INLINE v16f min_lanes(v16f a, v16f b) { return select_lanes(a < b, a, b); }
#endif

INLINE v16f swap_distance_8(v16f v) { return SHUFFLE(v, v, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7); }
INLINE v16f swap_distance_4(v16f v) { return SHUFFLE(v, v, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11); }
INLINE v16f swap_distance_2(v16f v) { return SHUFFLE(v, v, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13); }
INLINE v16f swap_distance_1(v16f v) { return SHUFFLE(v, v, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14); }

INLINE float sum_of_lanes(v16f v) {
    v += swap_distance_8(v);
    v += swap_distance_4(v);
    v += swap_distance_2(v);
    v += swap_distance_1(v);
    return v[0];
}

INLINE float max_of_lanes(v16f v) {
    v = max_lanes(v, swap_distance_8(v));
    v = max_lanes(v, swap_distance_4(v));
    v = max_lanes(v, swap_distance_2(v));
    v = max_lanes(v, swap_distance_1(v));
    return v[0];
}

/* 2^x, relative error below 3e-7. Below -126.5 (minus infinity too) it is exactly 0, above 127.5 it is infinity.
 *
 * Adding ROUND_AND_BIAS leaves round(x) + 127 in the low bits of the sum: shifted to the exponent's place they are
 * 2^round(x). What is left, |x - round(x)| <= 1/2, goes through the Taylor polynomial of 2^f.
 */
INLINE v16f exp2_lanes(v16f x) {
    const float ROUND_AND_BIAS = 12582912.0f + 127.0f; /* 1.5 * 2^23 + the exponent's bias */
    x = min_lanes(max_lanes(x, splat(-127.0f)), splat(128.0f));
    v16f shifted = x + ROUND_AND_BIAS;
    v16f f = x - (shifted - ROUND_AND_BIAS);
    v16f power = (v16f)((v16u)shifted << 23);
    v16f p = f * 1.5403530e-4f + 1.3333558e-3f;
    p = p * f + 9.6181291e-3f;
    p = p * f + 5.5504109e-2f;
    p = p * f + 2.4022651e-1f;
    p = p * f + 6.9314718e-1f;
    p = p * f + 1.0f;
    return p * power;
}

#define LOG2_E 1.4426950408889634f

/* tanh(x) = 1 - 2 / (1 + e^2x) */
INLINE v16f tanh_lanes(v16f x) { return 1.0f - 2.0f / (1.0f + exp2_lanes(x * (2.0f * LOG2_E))); }

/* Exchange the off-diagonal halves of two rows of squares: one step of a transpose by recursive halving. */
#define EXCHANGE(DISTANCE, LOW, HIGH)                                   \
    for (int i = 0; i < LANES; i++)                                     \
        if (!(i & DISTANCE)) {                                          \
            v16u a = v[i], b = v[i + DISTANCE];                         \
            v[i] = SHUFFLE(a, b, LOW);                                  \
            v[i + DISTANCE] = SHUFFLE(a, b, HIGH);                      \
        }

#define LOW_8 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23
#define HIGH_8 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31
#define LOW_4 0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27
#define HIGH_4 4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31
#define LOW_2 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29
#define HIGH_2 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31
#define LOW_1 0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30
#define HIGH_1 1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31

INLINE void transpose(v16u v[LANES]) {
    EXCHANGE(8, LOW_8, HIGH_8)
    EXCHANGE(4, LOW_4, HIGH_4)
    EXCHANGE(2, LOW_2, HIGH_2)
    EXCHANGE(1, LOW_1, HIGH_1)
}

#endif
