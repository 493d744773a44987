/* See runtime.h. Compiled once, for both element types. */
#include "runtime.h"

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

int kernel_threads = 1;

void set_kernel_threads(int threads) { kernel_threads = threads; }

void *scratch(size_t bytes) {
    static __thread void *memory;
    static __thread size_t size;
    if (bytes > size) {
        free(memory);
        size = (bytes + 4095) & ~(size_t)4095;
        memory = aligned_alloc(64, size);
        if (!memory) {
            /* A kernel has no way to report it: better a clear end than a write through a null pointer. */
            fprintf(stderr, "fast_inference: no memory for %zu bytes of kernel scratch\n", size);
            abort();
        }
    }
    return memory;
}
