/* Linear layers: x [rows, in] times a packed weight, plus bias, plus residual.
 *
 * Owns the blocking over rows, output columns and threads; must not know Python or torch. The weight is read from
 * memory once per block of rows, in the order in which it lies there. A task is (a block of rows) x (a chunk of panels);
 * threads take tasks as they become free, so that a core lost to another process delays the step little.
 */
#include "runtime.h"
#include "tile.h"

/* Packed rows of one block, at most: with one panel they have to stay in the L2 cache (1 MB on Zen 4). */
enum { BLOCK_BYTES = 400 * 1024 };
/* Panels of a task when rows are many, so that packing the rows again for each task costs a few percent. */
enum { MANY_ROWS_CHUNK = 8 };
/* Tasks per thread when rows are few. */
enum { TASKS_PER_THREAD = 3 };
/* How far ahead of its use the weight is fetched when one tile holds all rows. */
enum { FETCH_AHEAD = 4096 };

typedef struct {
    const uint32_t *weight; /* [panels][units][32] */
    const float *bias;      /* [panels * 32] in the order of `columns`, or null */
    long in_units;
    long out_features;
} packed_linear;

typedef struct {
    const packed_linear *layer;
    const element *x, *residual;
    void *out;
    int out_is_float; /* else `element` */
    long rows, tiles, tiles_per_block, blocks, panels, panels_per_chunk;
} product;

INLINE long first_row(const product *p, long tile) { return tile * p->rows / p->tiles; }

INLINE long smaller(long a, long b) { return a < b ? a : b; }

static void plan(product *p) {
    long tile_bytes = p->layer->in_units * LANES * (long)sizeof(uint32_t);
    long most_tiles = BLOCK_BYTES / tile_bytes > 0 ? BLOCK_BYTES / tile_bytes : 1;
    p->tiles = (p->rows + TILE_ROWS - 1) / TILE_ROWS;
    p->blocks = (p->tiles + most_tiles - 1) / most_tiles;
    p->tiles_per_block = (p->tiles + p->blocks - 1) / p->blocks;
    p->panels = (p->layer->out_features + PANEL - 1) / PANEL;
    long tasks = kernel_threads * TASKS_PER_THREAD;
    p->panels_per_chunk = p->blocks > 1 ? MANY_ROWS_CHUNK : (p->panels + tasks - 1) / tasks;
}

static void pack_block(const product *p, long block, uint32_t *packed) {
    long tile_units = p->layer->in_units * LANES;
    long end = smaller((block + 1) * p->tiles_per_block, p->tiles);
    for (long tile = block * p->tiles_per_block; tile < end; tile++, packed += tile_units) {
        const element *rows[TILE_ROWS];
        int count = (int)(first_row(p, tile + 1) - first_row(p, tile));
        for (int r = 0; r < count; r++) rows[r] = p->x + (first_row(p, tile) + r) * p->layer->in_units * UNIT;
        pack_rows(rows, count, p->layer->in_units, packed, LANES);
    }
}

static void finish_row(const product *p, long row, long column, const float *results) {
    columns c = {load_floats(results), load_floats(results + LANES)};
    long place = row * p->layer->out_features + column;
    int count = (int)smaller(p->layer->out_features - column, PANEL);
    if (p->layer->bias) {
        c.first += load_floats(p->layer->bias + column);
        c.second += load_floats(p->layer->bias + column + LANES);
    }
    if (p->residual) {
        columns more = load_some_columns(p->residual + place, count);
        c.first += more.first;
        c.second += more.second;
    }
    if (p->out_is_float)
        store_some_columns_as_floats((float *)p->out + place, c, count);
    else
        store_some_columns((element *)p->out + place, c, count);
}

/* One panel for every tile of a block. With one tile the weight is fetched a little ahead of its use; with more, each
 * tile fetches its share of the next panel. */
static void multiply_panel(const product *p, long block, long panel, const uint32_t *packed) {
    long units = p->layer->in_units, begin = block * p->tiles_per_block;
    long end = smaller(begin + p->tiles_per_block, p->tiles);
    const uint32_t *weight = p->layer->weight + panel * units * PANEL;
    ahead next = {(const char *)weight + FETCH_AHEAD, PANEL * sizeof(uint32_t)};
    if (end - begin > 1) next = (ahead){(const char *)(weight + units * PANEL), next.step / (end - begin)};
    for (long tile = begin; tile < end; tile++) {
        float results[TILE_ROWS * PANEL] __attribute__((aligned(64)));
        long row = first_row(p, tile), count = first_row(p, tile + 1) - row;
        TILE[count](packed + (tile - begin) * units * LANES, weight, units, results, PANEL, 0, next);
        next.from += next.step * units;
        for (long r = 0; r < count; r++) finish_row(p, row + r, panel * PANEL, results + r * PANEL);
    }
}

void NAME(linear)(const packed_linear *layer, const element *x, const element *residual, void *out, int out_is_float,
                  long rows) {
    product p = {.layer = layer, .x = x, .residual = residual, .out = out, .out_is_float = out_is_float, .rows = rows};
    plan(&p);
    long chunks = (p.panels + p.panels_per_chunk - 1) / p.panels_per_chunk;
#pragma omp parallel num_threads(kernel_threads)
    {
        uint32_t *packed = scratch((size_t)(p.tiles_per_block * layer->in_units * LANES) * sizeof(uint32_t));
        long packed_block = -1;
#pragma omp for schedule(dynamic) nowait
        for (long task = 0; task < chunks * p.blocks; task++) {
            long block = task % p.blocks, begin = task / p.blocks * p.panels_per_chunk;
            if (block != packed_block) pack_block(&p, block, packed);
            packed_block = block;
            for (long panel = begin; panel < smaller(begin + p.panels_per_chunk, p.panels); panel++)
                multiply_panel(&p, block, panel, packed);
        }
    }
}
