// Whichever C library the program has, glibc or musl: libedm_app.so is built with one and loaded by both.
#pragma once
#include <link.h>
#include <stdint.h>

// clone(2), as its wrapper in the C library; but by its other name where it has one. The thread sanitizer puts a
// function of its own in the place of the first, which takes the sidecar for a child, in which it begins anew: with the
// memory of the program.
int clone_task(int (*run)(void *), void *stack, int flags, void *argument);

// pthread_atfork; 0 when done.
int at_fork(void (*before)(void), void (*parent)(void), void (*child)(void));

// Where the list of loaded libraries begins, or NULL.
const struct r_debug *loaded_libraries(void);

// What the kernel clears when the thread that asks has ended, or 0. That of glibc is the thread's own; with musl it is
// one word for all threads, which the next to be made or joined would wait for.
uint64_t cleared_at_exit(void);
