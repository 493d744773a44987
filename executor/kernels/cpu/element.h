/* The element type of a translation unit: each kernel file is compiled once with -DELEMENT_BF16, once with -DELEMENT_F32.
 *
 * Owns what differs between the two; must not know any kernel. The kernels see
 *   unit     32 bits that one multiply-add instruction takes per lane: two consecutive bf16 elements, or one float;
 *   columns  32 neighbouring results in float32, in two vectors. For bf16 the first holds the even columns and the
 *            second the odd ones, so that two results meet in one unit without a shuffle; for float32 the first 16 and
 *            the last 16.
 */
#ifndef ELEMENT_H
#define ELEMENT_H

#include "vector.h"

enum { PANEL = 2 * LANES }; /* columns side by side in one packed panel */

typedef struct {
    v16f first, second;
} columns;

#ifdef ELEMENT_BF16

#define NAME(function) function##_bf16
typedef uint16_t element;
typedef uint16_t v16h __attribute__((vector_size(32)));
enum { UNIT = 2 }; /* elements in a unit */

#define HIGH_HALF 0xffff0000u
#define FIRST_COLUMNS (2 * FIRST_LANES)
#define SECOND_COLUMNS (FIRST_COLUMNS + 1)

INLINE v16f multiply_add(v16f sum, v16u a, v16u b) {
#ifdef __AVX512BF16__
    return (v16f)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
#else
    sum += (v16f)(a << 16) * (v16f)(b << 16);
    return sum + (v16f)(a & HIGH_HALF) * (v16f)(b & HIGH_HALF);
#endif
}

/* Round to nearest even, the result in the upper half of each lane; a NaN stays one. */
INLINE v16u round_to_upper_half(v16f v) {
    v16u bits = (v16u)v;
    v16u rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
    return (v16u)select_lanes(v == v, (v16f)rounded, (v16f)(bits | 0x400000u));
}

INLINE v16f load_16(const element *from) {
    v16h half;
    memcpy(&half, from, sizeof half);
    return (v16f)(__builtin_convertvector(half, v16u) << 16);
}

INLINE void store_16(element *to, v16f v) {
#ifdef __AVX512BF16__
    __m256bh half = _mm512_cvtneps_pbh((__m512)v);
#else
    v16h half = __builtin_convertvector(round_to_upper_half(v) >> 16, v16h);
#endif
    memcpy(to, &half, sizeof half);
}

INLINE columns load_columns(const element *from) {
    v16u pairs = load_bits(from);
    return (columns){(v16f)(pairs << 16), (v16f)(pairs & HIGH_HALF)};
}

INLINE void store_columns(element *to, columns c) {
#ifdef __AVX512BF16__
    __m512i halves = (__m512i)_mm512_cvtne2ps_pbh((__m512)c.second, (__m512)c.first);
    v16u first = (v16u)_mm512_cvtepu16_epi32(_mm512_castsi512_si256(halves));
    v16u second = (v16u)_mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(halves, 1));
    store_bits(to, first | (second << 16));
#else
    store_bits(to, (round_to_upper_half(c.first) >> 16) | (round_to_upper_half(c.second) & HIGH_HALF));
#endif
}

INLINE void store_columns_as_floats(float *to, columns c) {
    store_floats(to, SHUFFLE(c.first, c.second, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23));
    store_floats(to + LANES, SHUFFLE(c.first, c.second, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31));
}

/* One unit of each of 32 columns, from 32 neighbouring elements of UNIT consecutive rows. */
INLINE void interleave_rows(const element *const rows[UNIT], long column, v16u *first, v16u *second) {
    v16u a = load_bits(rows[0] + column), b = load_bits(rows[1] + column);
    *first = (a & 0xffffu) | (b << 16);
    *second = (a >> 16) | (b & HIGH_HALF);
}

#else

#define NAME(function) function##_f32
typedef float element;
enum { UNIT = 1 };

#define FIRST_COLUMNS FIRST_LANES
#define SECOND_COLUMNS (FIRST_COLUMNS + LANES)

INLINE v16f multiply_add(v16f sum, v16u a, v16u b) { return sum + (v16f)a * (v16f)b; }

INLINE v16f load_16(const element *from) { return load_floats(from); }

INLINE void store_16(element *to, v16f v) { store_floats(to, v); }

INLINE columns load_columns(const element *from) { return (columns){load_floats(from), load_floats(from + LANES)}; }

INLINE void store_columns(element *to, columns c) {
    store_floats(to, c.first);
    store_floats(to + LANES, c.second);
}

INLINE void store_columns_as_floats(float *to, columns c) { store_columns(to, c); }

INLINE void interleave_rows(const element *const rows[UNIT], long column, v16u *first, v16u *second) {
    *first = load_bits(rows[0] + column);
    *second = load_bits(rows[0] + column + LANES);
}

#endif

/* The same for a count below the full width: what is missing reads as zero and is not written. */

INLINE v16f load_part_of_16(const element *from, int count) {
    element part[LANES] = {0};
    memcpy(part, from, (size_t)count * sizeof(element));
    return load_16(part);
}

INLINE void store_part_of_16(element *to, v16f v, int count) {
    element part[LANES];
    store_16(part, v);
    memcpy(to, part, (size_t)count * sizeof(element));
}

INLINE columns load_some_columns(const element *from, int count) {
    element part[PANEL] = {0};
    if (count >= PANEL) return load_columns(from);
    memcpy(part, from, (size_t)count * sizeof(element));
    return load_columns(part);
}

INLINE void store_some_columns(element *to, columns c, int count) {
    element part[PANEL];
    if (count >= PANEL) {
        store_columns(to, c);
        return;
    }
    store_columns(part, c);
    memcpy(to, part, (size_t)count * sizeof(element));
}

INLINE void store_some_columns_as_floats(float *to, columns c, int count) {
    float part[PANEL];
    if (count >= PANEL) {
        store_columns_as_floats(to, c);
        return;
    }
    store_columns_as_floats(part, c);
    memcpy(to, part, (size_t)count * sizeof(float));
}

#endif
