/* What every kernel needs of the process: how many threads to use, and memory to work in. */
#ifndef RUNTIME_H
#define RUNTIME_H

#include <stddef.h>

/* Threads of a parallel region; one number for all kernels, since libgomp rebuilds its team when it changes. */
extern int kernel_threads;

void set_kernel_threads(int threads);

/* Memory of the calling thread, 64-byte aligned, valid until the thread's next call. Grows, and is kept. */
void *scratch(size_t bytes);

#endif
