/* A task of one query token with few query heads to a key/value head: the decode step, bound by memory.
 *
 * Owns the path that reads keys and values where they lie, without packing them, while the lines of what comes next are
 * on their way; must not know threads. It gives the same result as attention_task.h, whose workspace it uses.
 */
#ifndef ATTENTION_DECODE_H
#define ATTENTION_DECODE_H

#include "attention_task.h"

/* Whether whole vectors cover a head, and the sums of all query heads fit in registers. */
static int suits_decode_path(const attention_problem *p, const attention_task *task) {
    return task->queries == 1 && p->group <= FEW_ROWS && p->head_size % PANEL == 0;
}

#define ADD_HALVES(DISTANCE, LOW, HIGH) \
    for (int i = 0; i < DISTANCE; i++) v[i] = SHUFFLE(v[i], v[i + DISTANCE], LOW) + SHUFFLE(v[i], v[i + DISTANCE], HIGH);

/* Lane i of the result is the sum of the lanes of v[i]. */
INLINE v16f sums_of_each(v16f v[LANES]) {
    ADD_HALVES(8, LOW_8, HIGH_8)
    ADD_HALVES(4, LOW_4, HIGH_4)
    ADD_HALVES(2, LOW_2, HIGH_2)
    ADD_HALVES(1, LOW_1, HIGH_1)
    return v[0];
}

INLINE void fetch_vector_of_rows(const element *const *rows, long bytes) {
    for (int i = 0; i < LANES; i++)
        for (long at = 0; at < bytes; at += 64) __builtin_prefetch((const char *)rows[i] + at, 0, 2);
}

/* Scores of every query head against the keys, 16 keys at a time; those past the end of the task are minus infinity. */
static void score_keys(const attention_problem *p, const element *query, const key_rows *now, const key_rows *next,
                       float *scores) {
    v16i lane = FIRST_LANES;
    for (long key = 0; key < now->count; key += LANES) {
        const element *const *rows = now->keys + key;
        if (key < next->count) fetch_vector_of_rows(next->keys + key, p->head_size * (long)sizeof(element));
        for (long g = 0; g < p->group; g++) {
            v16f sums[LANES] = {{0}};
            for (long at = 0; at < p->head_size; at += LANES * UNIT) {
                v16u q = load_bits(query + g * p->head_size + at);
#pragma GCC unroll 16
                for (int i = 0; i < LANES; i++) sums[i] = multiply_add(sums[i], q, load_bits(rows[i] + at));
            }
            v16f score = to_base_2(p, sums_of_each(sums));
            if (key + LANES > now->present)
                score = select_lanes(lane + (int32_t)key < (int32_t)now->present, score, splat(-INFINITY));
            store_floats(scores + g * KEY_TILE + key, score);
        }
    }
}

static void soften_scores(const attention_problem *p, const workspace *w, long row, long count) {
    float *scores = w->scores + row * KEY_TILE;
    v16f highest = splat(LOWEST), total = {0};
    for (long key = 0; key < count; key += LANES) highest = max_lanes(highest, load_floats(scores + key));
    raise_maximum(p, w, row, max_of_lanes(highest));
    for (long key = 0; key < count; key += LANES) {
        v16f weight = exp2_lanes(load_floats(scores + key) - w->maximum[row]);
        total += weight;
        store_16(w->weights + row * KEY_TILE + key, weight);
    }
    w->sum[row] += sum_of_lanes(total);
}

/* output [rows][columns] += weights [rows][keys] times values [keys][columns], 32 columns at a time in registers. */
INLINE void mix_values(const int rows, const attention_problem *p, const workspace *w, const key_rows *now,
                       const key_rows *next) {
    long width = p->value_panels * PANEL;
    for (long column = 0; column < width; column += PANEL) {
        v16f first[FEW_ROWS], second[FEW_ROWS];
#pragma GCC unroll 8
        for (int r = 0; r < rows; r++) {
            first[r] = load_floats(w->output + r * width + column);
            second[r] = load_floats(w->output + r * width + column + LANES);
        }
        for (long key = 0; key < now->count; key += UNIT) {
            v16u a, b;
            interleave_rows(now->values + key, column, &a, &b);
            if (key < next->count)
                for (int i = 0; i < UNIT; i++) __builtin_prefetch(next->values[key + i] + column, 0, 2);
#pragma GCC unroll 8
            for (int r = 0; r < rows; r++) {
                uint32_t unit;
                memcpy(&unit, w->weights + r * KEY_TILE + key, sizeof unit);
                v16u weight = unit - (v16u){0};
                first[r] = multiply_add(first[r], weight, a);
                second[r] = multiply_add(second[r], weight, b);
            }
        }
#pragma GCC unroll 8
        for (int r = 0; r < rows; r++) {
            store_floats(w->output + r * width + column, first[r]);
            store_floats(w->output + r * width + column + LANES, second[r]);
        }
    }
}

#define MIX_CASE(ROWS) \
    case ROWS:         \
        return mix_values(ROWS, p, w, now, next);

static void mix_values_of_group(const attention_problem *p, const workspace *w, const key_rows *now,
                                const key_rows *next) {
    switch (p->group) {
        MIX_CASE(1)
        MIX_CASE(2)
        MIX_CASE(3)
        MIX_CASE(4)
        MIX_CASE(5)
        MIX_CASE(6)
        MIX_CASE(7)
        MIX_CASE(8)
    }
}

/* As `attend`. `upcoming` (or null) is what this thread is likely to do next. */
static void attend_decode(const attention_problem *p, const attention_task *task, const attention_task *upcoming,
                          const workspace *w) {
    key_rows rows[2];
    start_rows(p, w, p->group);
    find_keys(p, task, task->key_begin, w->zeros, &rows[0]);
    for (long begin = task->key_begin, turn = 0; begin < task->key_end; begin += KEY_TILE, turn ^= 1) {
        key_rows *now = &rows[turn], *next = &rows[turn ^ 1];
        next->count = 0;
        if (begin + KEY_TILE < task->key_end)
            find_keys(p, task, begin + KEY_TILE, w->zeros, next);
        else if (upcoming)
            find_keys(p, upcoming, upcoming->key_begin, w->zeros, next);
        score_keys(p, query_of_row(p, task, 0), now, next, w->scores);
        for (long r = 0; r < p->group; r++) soften_scores(p, w, r, now->count);
        mix_values_of_group(p, w, now, next);
    }
}

#endif
