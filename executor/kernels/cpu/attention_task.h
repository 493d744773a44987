/* One task of attention: some query tokens of one request, the query heads of one key/value head, a range of keys.
 *
 * Owns the tiled online softmax (Milakov & Gimelshein, 2018; Dao et al., FlashAttention, 2022) over paged keys and
 * values; must not know threads or how tasks are cut (attention.c). The rows of a task are (token, query head) pairs,
 * token-major, so that the query heads of a group share every key and value read.
 *
 * Per tile of keys, keys and values are packed once from their blocks into panels (see tile.h); then for each group of
 * TILE_ROWS rows: scores = Q K^T, softmax against the running maximum, output = output * correction + P V.
 */
#ifndef ATTENTION_TASK_H
#define ATTENTION_TASK_H

#include <math.h>

#include "step.h"
#include "tile.h"

enum {
    KEY_TILE = 256,               /* packed keys and values of a head of 64: 64 KB, in the L2 cache */
    QUERY_ROWS = 12 * TILE_ROWS,  /* rows of a task, at most, where one token has no more query heads than that */
    FEW_ROWS = 8,                 /* the most query heads of a group on the path of attention_decode.h */
    SCORE_ROWS = TILE_ROWS > FEW_ROWS ? TILE_ROWS : FEW_ROWS
};

/* A maximum for rows that have seen no key: finite, so that 2^(-inf - LOWEST) is 0 and not a NaN. */
#define LOWEST (-1e30f)

typedef struct {
    const step_batch *batch;
    const element *q;             /* [tokens][q_heads][head_size] */
    const element *keys, *values; /* [blocks][kv_heads][block_size][head_size] */
    element *out;                 /* [tokens][q_heads][head_size] */
    long q_heads, kv_heads, group, block_size, head_size;
    long value_panels; /* panels that hold one value: head_size / 32, rounded up */
    long window;       /* keys that a token sees, itself included; very large: all */
    float scale;       /* of the scores, before the cap */
    float soft_cap;    /* 0: none */
} attention_problem;

typedef struct {
    int32_t row;         /* of the batch */
    int32_t head;        /* of keys and values */
    int32_t first_query; /* token of the row's query */
    int32_t queries;
    int32_t key_begin, key_end;
    int32_t partial; /* where the unfinished result goes, or -1: this task sees all keys and writes the output */
} attention_task;

typedef struct {
    float *output;                /* [rows][value_panels * 32], not yet divided by `sum` */
    float *maximum, *sum;         /* [rows], of scores in base 2 */
    uint32_t *queries;            /* packed rows, one group of TILE_ROWS after the other */
    uint32_t *keys, *values;      /* panels of this tile of keys */
    float *scores;                /* [SCORE_ROWS][KEY_TILE] */
    element *weights;             /* [SCORE_ROWS][KEY_TILE]: the softmax's numerators */
    uint32_t *packed_weights;     /* [KEY_TILE / UNIT][16] */
    element *zeros;               /* stands for a key or value that is not there */
} workspace;

/* Where the keys and values of up to KEY_TILE tokens lie; zeros fill `count` up to a whole panel. */
typedef struct {
    long present, count;
    const element *keys[KEY_TILE], *values[KEY_TILE];
} key_rows;

static size_t take(size_t *used, size_t bytes) {
    size_t at = *used;
    *used += (bytes + 63) & ~(size_t)63;
    return at;
}

/* Lay the workspace out from `memory` (null: only count). Returns its size in bytes. */
static size_t lay_out(workspace *w, char *memory, const attention_problem *p, long rows) {
    size_t used = 0, words = sizeof(uint32_t);
    size_t units = (size_t)(p->head_size / UNIT), columns_of_value = (size_t)p->value_panels * PANEL;
    size_t groups = (size_t)(rows + TILE_ROWS - 1) / TILE_ROWS;
    w->output = (float *)(memory + take(&used, (size_t)rows * columns_of_value * words));
    w->maximum = (float *)(memory + take(&used, (size_t)rows * words));
    w->sum = (float *)(memory + take(&used, (size_t)rows * words));
    w->queries = (uint32_t *)(memory + take(&used, groups * units * LANES * words));
    w->keys = (uint32_t *)(memory + take(&used, units * KEY_TILE * words));
    w->values = (uint32_t *)(memory + take(&used, columns_of_value * (KEY_TILE / UNIT) * words));
    w->scores = (float *)(memory + take(&used, (size_t)SCORE_ROWS * KEY_TILE * words));
    w->weights = (element *)(memory + take(&used, (size_t)SCORE_ROWS * KEY_TILE * words));
    w->packed_weights = (uint32_t *)(memory + take(&used, (size_t)(KEY_TILE / UNIT) * LANES * words));
    w->zeros = (element *)(memory + take(&used, columns_of_value * words));
    return used;
}

INLINE long least(long a, long b) { return a < b ? a : b; }
INLINE long most(long a, long b) { return a > b ? a : b; }

/* The tile of a task's keys and values that begins at token `begin`. */
static void find_keys(const attention_problem *p, const attention_task *task, long begin, const element *zeros,
                      key_rows *rows) {
    const int32_t *table = p->batch->block_tables + task->row * p->batch->table_width;
    long end = least(begin + KEY_TILE, task->key_end), count = 0, head_stride = p->block_size * p->head_size;
    for (long block = begin / p->block_size, token = begin; token < end; block++) {
        long place = (table[block] * p->kv_heads + task->head) * head_stride +
                     (token - block * p->block_size) * p->head_size;
        for (long stop = least((block + 1) * p->block_size, end); token < stop; token++, place += p->head_size) {
            rows->keys[count] = p->keys + place;
            rows->values[count++] = p->values + place;
        }
    }
    rows->present = count;
    for (; count % PANEL; count++) rows->keys[count] = rows->values[count] = zeros;
    rows->count = count;
}

static void pack_keys(const attention_problem *p, const element *const *keys, long count, uint32_t *to) {
    long units = p->head_size / UNIT;
    for (long panel = 0; panel < count; panel += PANEL, to += units * PANEL) {
        const element *first[LANES], *second[LANES];
        for (int i = 0; i < LANES; i++) {
            first[i] = keys[panel + FIRST_COLUMNS[i]];
            second[i] = keys[panel + SECOND_COLUMNS[i]];
        }
        pack_rows(first, LANES, units, to, PANEL);
        pack_rows(second, LANES, units, to + LANES, PANEL);
    }
}

static void pack_values(const attention_problem *p, const element *const *values, long count, uint32_t *to) {
    for (long panel = 0; panel < p->value_panels; panel++) {
        long column = panel * PANEL, width = least(p->head_size - column, PANEL);
        for (long key = 0; key < count; key += UNIT, to += PANEL) {
            v16u first, second;
            if (width == PANEL) {
                interleave_rows(values + key, column, &first, &second);
            } else {
                element part[UNIT][PANEL] = {{0}};
                const element *rows[UNIT];
                for (int i = 0; i < UNIT; i++) {
                    memcpy(part[i], values[key + i] + column, (size_t)width * sizeof(element));
                    rows[i] = part[i];
                }
                interleave_rows(rows, 0, &first, &second);
            }
            store_bits(to, first);
            store_bits(to + LANES, second);
        }
    }
}

static const element *query_of_row(const attention_problem *p, const attention_task *task, long row) {
    long token = p->batch->query_start[task->row] + task->first_query + row / p->group;
    return p->q + (token * p->q_heads + task->head * p->group + row % p->group) * p->head_size;
}

static void pack_queries(const attention_problem *p, const attention_task *task, long rows, uint32_t *to) {
    long units = p->head_size / UNIT;
    for (long begin = 0; begin < rows; begin += TILE_ROWS, to += units * LANES) {
        const element *group[TILE_ROWS];
        int count = (int)least(rows - begin, TILE_ROWS);
        for (int r = 0; r < count; r++) group[r] = query_of_row(p, task, begin + r);
        pack_rows(group, count, units, to, LANES);
    }
}

INLINE v16f to_base_2(const attention_problem *p, v16f scores) {
    scores *= p->scale;
    if (p->soft_cap > 0) scores = p->soft_cap * tanh_lanes(scores / p->soft_cap);
    return scores * LOG2_E;
}

/* Keys outside (position - window, position] get minus infinity. `key`: of the panel's first column. */
INLINE v16f hide(v16f scores, v16i keys, int32_t key, int32_t low, int32_t high) {
    keys += key;
    return select_lanes((keys >= low) & (keys <= high), scores, splat(-INFINITY));
}

/* Bring a row to a maximum that is at least `candidate`: what was summed so far shrinks to the new base. */
INLINE void raise_maximum(const attention_problem *p, const workspace *w, long row, float candidate) {
    if (candidate <= w->maximum[row]) return;
    float correction = exp2f(w->maximum[row] - candidate);
    float *output = w->output + row * p->value_panels * PANEL;
    w->maximum[row] = candidate;
    w->sum[row] *= correction;
    for (long i = 0; i < p->value_panels * PANEL; i += LANES)
        store_floats(output + i, load_floats(output + i) * correction);
}

/* Scores of one row in `panels` panels from `key` on become softmax numerators. The row's token sees low .. position. */
static void soften_row(const attention_problem *p, const workspace *w, long row, float *scores, element *weights,
                       long panels, long key, long low, long position) {
    v16f highest = splat(LOWEST), total = {0};
    for (long panel = 0; panel < panels; panel++, key += PANEL) {
        float *at = scores + panel * PANEL;
        v16f a = to_base_2(p, load_floats(at)), b = to_base_2(p, load_floats(at + LANES));
        if (key < low || key + PANEL - 1 > position) {
            a = hide(a, FIRST_COLUMNS, (int32_t)key, (int32_t)low, (int32_t)position);
            b = hide(b, SECOND_COLUMNS, (int32_t)key, (int32_t)low, (int32_t)position);
        }
        highest = max_lanes(highest, max_lanes(a, b));
        store_floats(at, a);
        store_floats(at + LANES, b);
    }
    raise_maximum(p, w, row, max_of_lanes(highest));
    float maximum = w->maximum[row];
    for (long panel = 0; panel < panels; panel++) {
        float *at = scores + panel * PANEL;
        columns c = {exp2_lanes(load_floats(at) - maximum), exp2_lanes(load_floats(at + LANES) - maximum)};
        total += c.first + c.second;
        store_columns(weights + panel * PANEL, c);
    }
    w->sum[row] += sum_of_lanes(total);
}

/* Rows first .. first+count-1 of the task against the packed keys begin .. end-1. */
static void attend_group(const attention_problem *p, const attention_task *task, const workspace *w, long first,
                         int count, long begin, long end) {
    long units = p->head_size / UNIT, columns_of_value = p->value_panels * PANEL;
    long query_len = p->batch->query_start[task->row + 1] - p->batch->query_start[task->row];
    long first_position = p->batch->seq_lens[task->row] - query_len + task->first_query;
    long earliest = first_position + first / p->group, latest = first_position + (first + count - 1) / p->group;
    long from = most(0, earliest - p->window + 1 - begin) / PANEL;
    long to = (least(end, latest + 1) - begin + PANEL - 1) / PANEL;
    if (from >= to) return;

    const uint32_t *queries = w->queries + first / TILE_ROWS * units * LANES;
    ahead nothing = {(const char *)queries, 0};
    for (long panel = from; panel < to; panel++)
        TILE[count](queries, w->keys + panel * units * PANEL, units, w->scores + (panel - from) * PANEL, KEY_TILE, 0,
                    nothing);

    const element *weights[TILE_ROWS];
    float *output = w->output + first * columns_of_value;
    for (int r = 0; r < count; r++) {
        long position = first_position + (first + r) / p->group;
        element *row_weights = w->weights + r * KEY_TILE;
        weights[r] = row_weights;
        soften_row(p, w, first + r, w->scores + r * KEY_TILE, row_weights, to - from, begin + from * PANEL,
                   most(task->key_begin, position - p->window + 1), least(position, task->key_end - 1));
    }
    pack_rows(weights, count, (to - from) * (PANEL / UNIT), w->packed_weights, LANES);

    long key_units = (end - begin + PANEL - 1) / PANEL * (PANEL / UNIT);
    for (long panel = 0; panel < p->value_panels; panel++)
        TILE[count](w->packed_weights, w->values + (panel * key_units + from * (PANEL / UNIT)) * PANEL,
                    (to - from) * (PANEL / UNIT), output + panel * PANEL, columns_of_value, 1, nothing);
}

static void start_rows(const attention_problem *p, const workspace *w, long rows) {
    long columns_of_value = p->value_panels * PANEL;
    memset(w->output, 0, (size_t)(rows * columns_of_value) * sizeof(float));
    memset(w->sum, 0, (size_t)rows * sizeof(float));
    memset(w->zeros, 0, (size_t)columns_of_value * sizeof(element));
    for (long r = 0; r < rows; r++) w->maximum[r] = LOWEST;
}

/* Run a task up to its undivided output. */
static void attend(const attention_problem *p, const attention_task *task, const workspace *w) {
    key_rows tile;
    long rows = task->queries * p->group;
    start_rows(p, w, rows);
    pack_queries(p, task, rows, w->queries);
    for (long begin = task->key_begin; begin < task->key_end; begin += KEY_TILE) {
        find_keys(p, task, begin, w->zeros, &tile);
        pack_keys(p, tile.keys, tile.count, w->keys);
        pack_values(p, tile.values, tile.count, w->values);
        for (long first = 0; first < rows; first += TILE_ROWS)
            attend_group(p, task, w, first, (int)least(rows - first, TILE_ROWS), begin, begin + tile.present);
    }
}

/* Divide one row's output by its sum and write it where the output of (token, query head) belongs. */
static void write_row(const attention_problem *p, const element *query, const float *output, float sum) {
    element *to = p->out + (query - p->q);
    float scale = sum > 0 ? 1.0f / sum : 0.0f;
    for (long column = 0; column < p->head_size; column += PANEL) {
        columns c = {load_floats(output + column) * scale, load_floats(output + column + LANES) * scale};
        store_some_columns(to + column, c, (int)least(p->head_size - column, PANEL));
    }
}

#endif
