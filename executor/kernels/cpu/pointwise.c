/* The operations without products: norms, rotation, the write of keys and values into their blocks, SiLU.
 *
 * Owns their loops over tokens; must not know attention or weights. All of it is computed in float32 and rounded once.
 */
#include <math.h>

#include "element.h"
#include "runtime.h"
#include "step.h"

/* Elements below which waking the other threads costs more than they save. */
enum { WORTH_THREADS = 32 * 1024 };

typedef struct {
    element *keys, *values; /* [blocks][kv_heads][block_size][head_size] */
    long kv_heads, block_size, head_size;
} kv_layer;

/* Heads have odd sizes at times: every loop below is full vectors, then one part of a vector. */
#define FOR_VECTORS(i, count, size)                                                    \
    for (long i = 0, count = 0; i < (size) && ((count = (size) - i < LANES ? (size) - i : LANES), 1); i += LANES)

INLINE v16f load(const element *from, long count) {
    return count == LANES ? load_16(from) : load_part_of_16(from, (int)count);
}

INLINE void store(element *to, v16f v, long count) {
    if (count == LANES)
        store_16(to, v);
    else
        store_part_of_16(to, v, (int)count);
}

INLINE v16f load_float_part(const float *from, long count) {
    v16f v = {0};
    if (count == LANES) return load_floats(from);
    memcpy(&v, from, (size_t)count * sizeof(float));
    return v;
}

INLINE float inverse_rms(const element *x, long size, float eps) {
    v16f squares = {0};
    FOR_VECTORS(i, count, size) {
        v16f v = load(x + i, count);
        squares += v * v;
    }
    return 1.0f / sqrtf(sum_of_lanes(squares) / (float)size + eps);
}

void NAME(rms_norm)(const element *x, const element *weight, element *out, long rows, long size, float eps) {
#pragma omp parallel for num_threads(kernel_threads) if (rows * size > WORTH_THREADS)
    for (long row = 0; row < rows; row++) {
        const element *from = x + row * size;
        float scale = inverse_rms(from, size, eps);
        FOR_VECTORS(i, count, size)
        store(out + row * size + i, load(from + i, count) * scale * load(weight + i, count), count);
    }
}

void NAME(silu_mul)(const element *gate_up, element *out, long rows, long size) {
#pragma omp parallel for num_threads(kernel_threads) if (rows * size > WORTH_THREADS)
    for (long row = 0; row < rows; row++) {
        const element *gates = gate_up + row * 2 * size;
        FOR_VECTORS(i, count, size) {
            v16f gate = load(gates + i, count), up = load(gates + size + i, count);
            store(out + row * size + i, gate / (1.0f + exp2_lanes(gate * -LOG2_E)) * up, count);
        }
    }
}

/* Rotate one head: the halves (a, b) become (a cos - b sin, b cos + a sin). `norm` (null: none) weighs both first. */
INLINE void rotate_head(const element *from, element *to, const float *cosines, const element *norm, float eps,
                        long head_size) {
    long half = head_size / 2;
    float scale = norm ? inverse_rms(from, head_size, eps) : 1.0f;
    FOR_VECTORS(i, count, half) {
        v16f a = load(from + i, count), b = load(from + half + i, count);
        v16f cosine = load_float_part(cosines + i, count), sine = load_float_part(cosines + half + i, count);
        if (norm) {
            a = a * scale * load(norm + i, count);
            b = b * scale * load(norm + half + i, count);
        }
        store(to + i, a * cosine - b * sine, count);
        store(to + half + i, b * cosine + a * sine, count);
    }
}

/* Where the key (or value) of `head` of the token at `slot` begins. */
INLINE long place_in_cache(const kv_layer *kv, int64_t slot, long head) {
    long block = slot / kv->block_size, offset = slot % kv->block_size;
    return ((block * kv->kv_heads + head) * kv->block_size + offset) * kv->head_size;
}

void NAME(rope_and_cache)(const step_batch *batch, const element *qkv, element *q, const float *cos_sin, element *keys,
                          element *values, const element *q_norm, const element *k_norm, long q_heads, long kv_heads,
                          long block_size, long head_size, float eps) {
    kv_layer kv = {keys, values, kv_heads, block_size, head_size};
    long width = (q_heads + 2 * kv_heads) * head_size;
#pragma omp parallel for num_threads(kernel_threads) if (batch->tokens * width > WORTH_THREADS)
    for (long token = 0; token < batch->tokens; token++) {
        const element *from = qkv + token * width;
        const float *cosines = cos_sin + batch->positions[token] * head_size;
        for (long head = 0; head < q_heads; head++, from += head_size)
            rotate_head(from, q + (token * q_heads + head) * head_size, cosines, q_norm, eps, head_size);
        for (long head = 0; head < kv_heads; head++, from += head_size) {
            long place = place_in_cache(&kv, batch->slot_mapping[token], head);
            rotate_head(from, kv.keys + place, cosines, k_norm, eps, head_size);
            memcpy(kv.values + place, from + kv_heads * head_size, (size_t)head_size * sizeof(element));
        }
    }
}

void NAME(write_kv)(const step_batch *batch, const element *k, const element *v, element *keys, element *values,
                    long kv_heads, long block_size, long head_size) {
    kv_layer kv = {keys, values, kv_heads, block_size, head_size};
    size_t bytes = (size_t)head_size * sizeof(element);
#pragma omp parallel for num_threads(kernel_threads) if (batch->tokens * kv_heads * head_size > WORTH_THREADS)
    for (long token = 0; token < batch->tokens; token++)
        for (long head = 0; head < kv_heads; head++) {
            long place = place_in_cache(&kv, batch->slot_mapping[token], head);
            long from = (token * kv_heads + head) * head_size;
            memcpy(kv.keys + place, k + from, bytes);
            memcpy(kv.values + place, v + from, bytes);
        }
}
