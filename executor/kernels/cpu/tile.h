/* The inner product kernel under the linear layers and under attention: up to TILE_ROWS rows times one panel.
 *
 * Owns the packed forms and the register blocking; must not know caches, threads or epilogues.
 *   packed rows   [units][16] : unit u of row r at u * 16 + r, so that a row's unit is broadcast from one address
 *   panel         [units][32] : unit u of 32 columns, first vector then second (see element.h)
 *   results       [rows][pitch] float32, 32 per row: first vector then second
 */
#ifndef TILE_H
#define TILE_H

#include "element.h"

/* 14 rows x 2 vectors are 28 of AVX-512's 32 registers; 2 panel vectors and 2 broadcasts fill the rest. */
#ifdef __AVX512F__
enum { TILE_ROWS = 14 };
#else
enum { TILE_ROWS = 2 };
#endif

/* Put `count` (1 to 16) rows of `units` units each side by side: to[u * pitch + r]. */
static inline void pack_rows(const element *const *rows, int count, long units, uint32_t *to, long pitch) {
    long u = 0;
    for (; u + LANES <= units; u += LANES) {
        v16u v[LANES];
        for (int r = 0; r < LANES; r++) v[r] = load_bits(rows[r < count ? r : 0] + u * UNIT);
        transpose(v);
        for (int i = 0; i < LANES; i++) store_bits(to + (u + i) * pitch, v[i]);
    }
    for (; u < units; u++)
        for (int r = 0; r < count; r++) memcpy(to + u * pitch + r, rows[r] + u * UNIT, sizeof(uint32_t));
}

/* What to fetch from memory meanwhile: `step` more bytes of it at every unit. */
typedef struct {
    const char *from;
    long step;
} ahead;

/* Few rows wait for memory and want the line in the L2 cache soon; many rows compute and want it in L1 when needed. */
INLINE void fetch(const char *from, const int rows) {
    if (rows <= 8)
        __builtin_prefetch(from, 0, 2);
    else
        __builtin_prefetch(from, 0, 3);
}

INLINE void multiply_tile(const int rows, const uint32_t *packed, const uint32_t *panel, long units, float *results,
                          long pitch, int accumulate, ahead next) {
    v16f first[TILE_ROWS], second[TILE_ROWS];
#pragma GCC unroll 16
    for (int r = 0; r < rows; r++) {
        first[r] = accumulate ? load_floats(results + r * pitch) : (v16f){0};
        second[r] = accumulate ? load_floats(results + r * pitch + LANES) : (v16f){0};
    }
    for (long u = 0; u < units; u++) {
        v16u b0 = load_bits(panel), b1 = load_bits(panel + LANES);
        fetch(next.from, rows);
        fetch(next.from + 64, rows);
#pragma GCC unroll 16
        for (int r = 0; r < rows; r++) {
            v16u a = packed[r] - (v16u){0};
            first[r] = multiply_add(first[r], a, b0);
            second[r] = multiply_add(second[r], a, b1);
        }
        packed += LANES;
        panel += PANEL;
        next.from += next.step;
    }
#pragma GCC unroll 16
    for (int r = 0; r < rows; r++) {
        store_floats(results + r * pitch, first[r]);
        store_floats(results + r * pitch + LANES, second[r]);
    }
}

typedef void tile_kernel(const uint32_t *packed, const uint32_t *panel, long units, float *results, long pitch,
                         int accumulate, ahead next);

#define TILE_KERNEL(ROWS)                                                                                            \
    static void tile_##ROWS(const uint32_t *packed, const uint32_t *panel, long units, float *results, long pitch,  \
                            int accumulate, ahead next) {                                                            \
        multiply_tile(ROWS, packed, panel, units, results, pitch, accumulate, next);                                 \
    }

TILE_KERNEL(1)
TILE_KERNEL(2)
#ifdef __AVX512F__
TILE_KERNEL(3)
TILE_KERNEL(4)
TILE_KERNEL(5)
TILE_KERNEL(6)
TILE_KERNEL(7)
TILE_KERNEL(8)
TILE_KERNEL(9)
TILE_KERNEL(10)
TILE_KERNEL(11)
TILE_KERNEL(12)
TILE_KERNEL(13)
TILE_KERNEL(14)
static tile_kernel *const TILE[TILE_ROWS + 1] = {0,      tile_1, tile_2, tile_3,  tile_4,  tile_5,  tile_6, tile_7,
                                                 tile_8, tile_9, tile_10, tile_11, tile_12, tile_13, tile_14};
#else
static tile_kernel *const TILE[TILE_ROWS + 1] = {0, tile_1, tile_2};
#endif

#endif
