/* Attention over paged keys and values, for a step that mixes decode rows and prompt chunks.
 *
 * Owns how the work is cut into tasks and how partial results of one row meet again; the arithmetic of a task is in
 * attention_task.h. Prompts are cut by query tokens, long decode rows by keys (as in Flash-Decoding, Dao et al., 2023).
 * The longest tasks come first and threads take them as they become free.
 */
#include "attention_decode.h"

#include <stdlib.h>

#include "runtime.h"

/* A decode row with more keys than this is cut into pieces of it: a row alone shall busy every thread. */
enum { SPLIT_KEYS = 512 };

/* Decode tasks are taken in runs, so that a thread knows its next one and can fetch its keys; this many per thread. */
enum { RUNS_PER_THREAD = 6 };

typedef struct {
    attention_task *tasks;
    long count, prompt_tasks; /* prompts come first */
    long partials;
    long rows_per_task; /* the most rows of any task */
} attention_plan;

static long query_length(const step_batch *batch, long row) {
    return batch->query_start[row + 1] - batch->query_start[row];
}

static long queries_per_task(const attention_problem *p) { return p->group < QUERY_ROWS ? QUERY_ROWS / p->group : 1; }

static long first_visible(const attention_problem *p, long position) { return most(0, position - p->window + 1); }

static long pieces_of(const attention_problem *p, long row) {
    long length = p->batch->seq_lens[row];
    return (length - first_visible(p, length - 1) + SPLIT_KEYS - 1) / SPLIT_KEYS;
}

static long count_tasks(const attention_problem *p) {
    long count = 0;
    for (long row = 0; row < p->batch->decodes; row++) count += pieces_of(p, row) * p->kv_heads;
    for (long row = p->batch->decodes; row < p->batch->rows; row++)
        count += (query_length(p->batch, row) / queries_per_task(p) + 1) * p->kv_heads;
    return count;
}

static void plan_prompt(const attention_problem *p, long row, attention_plan *plan) {
    long length = query_length(p->batch, row), step = queries_per_task(p);
    long before = p->batch->seq_lens[row] - length;
    plan->rows_per_task = most(plan->rows_per_task, least(step, length) * p->group);
    for (long first = (length - 1) / step * step; first >= 0; first -= step)
        for (long head = 0; head < p->kv_heads; head++) {
            long queries = least(step, length - first);
            plan->tasks[plan->count++] = (attention_task){.row = (int32_t)row,
                                                          .head = (int32_t)head,
                                                          .first_query = (int32_t)first,
                                                          .queries = (int32_t)queries,
                                                          .key_begin = (int32_t)first_visible(p, before + first),
                                                          .key_end = (int32_t)(before + first + queries),
                                                          .partial = -1};
        }
}

static void plan_decode(const attention_problem *p, long row, attention_plan *plan) {
    long length = p->batch->seq_lens[row], pieces = pieces_of(p, row);
    for (long head = 0; head < p->kv_heads; head++)
        for (long begin = first_visible(p, length - 1); begin < length; begin += SPLIT_KEYS)
            plan->tasks[plan->count++] = (attention_task){.row = (int32_t)row,
                                                          .head = (int32_t)head,
                                                          .queries = 1,
                                                          .key_begin = (int32_t)begin,
                                                          .key_end = (int32_t)least(begin + SPLIT_KEYS, length),
                                                          .partial = pieces > 1 ? (int32_t)plan->partials++ : -1};
}

/* Floats of one partial result: per query head the output, the maximum and the sum. */
static long partial_size(const attention_problem *p) { return p->group * (p->value_panels * PANEL + 2); }

static void keep_partial(const attention_problem *p, const workspace *w, float *to) {
    long outputs = p->group * p->value_panels * PANEL;
    memcpy(to, w->output, (size_t)outputs * sizeof(float));
    memcpy(to + outputs, w->maximum, (size_t)p->group * sizeof(float));
    memcpy(to + outputs + p->group, w->sum, (size_t)p->group * sizeof(float));
}

/* Join `pieces` consecutive partial results in the first of them, and write the output. */
static void join_partials(const attention_problem *p, const attention_task *task, long pieces, float *partials) {
    long width = p->value_panels * PANEL, size = partial_size(p);
    for (long g = 0; g < p->group; g++) {
        long maximum_at = p->group * width + g, sum_at = maximum_at + p->group;
        float *output = partials + g * width, highest = LOWEST, sum = 0;
        for (long i = 0; i < pieces; i++) highest = fmaxf(highest, partials[i * size + maximum_at]);
        for (long i = 0; i < pieces; i++) {
            float weight = exp2f(partials[i * size + maximum_at] - highest);
            const float *piece = partials + i * size + g * width;
            sum += partials[i * size + sum_at] * weight;
            for (long c = 0; c < width; c++) output[c] = (i ? output[c] : 0) + piece[c] * weight;
        }
        write_row(p, query_of_row(p, task, g), output, sum);
    }
}

static void run_task(const attention_problem *p, const attention_task *task, const attention_task *upcoming,
                     const workspace *w, float *partials) {
    if (suits_decode_path(p, task))
        attend_decode(p, task, upcoming, w);
    else
        attend(p, task, w);
    if (task->partial >= 0) {
        keep_partial(p, w, partials + task->partial * partial_size(p));
        return;
    }
    for (long r = 0; r < task->queries * p->group; r++)
        write_row(p, query_of_row(p, task, r), w->output + r * p->value_panels * PANEL, w->sum[r]);
}

static void run(const attention_problem *p, const attention_plan *plan, float *partials) {
    long run_length = most(1, (plan->count - plan->prompt_tasks) / (kernel_threads * RUNS_PER_THREAD));
#pragma omp parallel num_threads(kernel_threads)
    {
        workspace w;
        lay_out(&w, scratch(lay_out(&w, 0, p, plan->rows_per_task)), p, plan->rows_per_task);
#pragma omp for schedule(dynamic) nowait
        for (long i = 0; i < plan->prompt_tasks; i++) run_task(p, plan->tasks + i, 0, &w, partials);
#pragma omp for schedule(dynamic, run_length)
        for (long i = plan->prompt_tasks; i < plan->count; i++)
            run_task(p, plan->tasks + i, i + 1 < plan->count ? plan->tasks + i + 1 : 0, &w, partials);
#pragma omp for schedule(dynamic) nowait
        for (long i = 0; i < plan->count; i++) {
            const attention_task *task = plan->tasks + i;
            if (task->partial < 0 || task->key_begin != first_visible(p, p->batch->seq_lens[task->row] - 1)) continue;
            join_partials(p, task, pieces_of(p, task->row), partials + task->partial * partial_size(p));
        }
    }
}

/* Returns 0, or 1 where there is no memory for the plan. `window` 0: none. */
int NAME(attention)(const step_batch *batch, const element *q, const element *keys, const element *values, element *out,
                    long q_heads, long kv_heads, long block_size, long head_size, long window, float scale,
                    float soft_cap) {
    attention_problem p = {.batch = batch,
                           .q = q,
                           .keys = keys,
                           .values = values,
                           .out = out,
                           .q_heads = q_heads,
                           .kv_heads = kv_heads,
                           .group = q_heads / kv_heads,
                           .block_size = block_size,
                           .head_size = head_size,
                           .value_panels = (head_size + PANEL - 1) / PANEL,
                           .window = window > 0 ? window : INT32_MAX,
                           .scale = scale,
                           .soft_cap = soft_cap};
    attention_plan plan = {.tasks = malloc((size_t)count_tasks(&p) * sizeof(attention_task)), .rows_per_task = p.group};
    if (!plan.tasks) return 1;
    for (long row = batch->decodes; row < batch->rows; row++) plan_prompt(&p, row, &plan);
    plan.prompt_tasks = plan.count;
    for (long row = 0; row < batch->decodes; row++) plan_decode(&p, row, &plan);
    float *partials = plan.partials ? malloc((size_t)(plan.partials * partial_size(&p)) * sizeof(float)) : 0;
    int out_of_memory = plan.partials && !partials;
    if (!out_of_memory) run(&p, &plan, partials);
    free(partials);
    free(plan.tasks);
    return out_of_memory;
}
