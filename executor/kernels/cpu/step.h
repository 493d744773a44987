/* Where the tokens of one step stand: the C side of `StepBatch` (see executor/backends/base.py for the shapes). */
#ifndef STEP_H
#define STEP_H

#include <stdint.h>

typedef struct {
    const int64_t *positions, *slot_mapping;
    const int32_t *block_tables, *query_start, *seq_lens;
    long tokens, rows, decodes, table_width;
} step_batch;

#endif
