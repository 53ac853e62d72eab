/*
 * Whether to keep the CPU in a spin. The other side's answer mostly comes from another CPU, and within a few µs; but it
 * may be waiting for this very one, and then all spinning is in vain. Which it is shows when the CPU is offered:
 * someone ran, and the answer was there afterwards.
 */
#pragma once
#include <sched.h>
#include <stdbool.h>
#include <time.h>

#define EDM_RAN_S 3e-6 /* a yield that takes longer let someone run; one for nothing takes a tenth of it */

struct edm_spin {
    double keep_s;   /* of a spin, how long not to offer the CPU */
    double most_s;   /* … where nothing says that the other side is waiting for it; 0 with a single CPU */
    unsigned shared; /* finds in a row of which someone had to run before */
    bool ran;        /* someone did, at the last offer */
};

static inline double edm_now_s(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

static inline void edm_spin_yield(struct edm_spin *spin) {
    double before = edm_now_s();
    sched_yield();
    spin->ran = edm_now_s() - before > EDM_RAN_S;
}

/* After a burst of tests: whether it found what is waited for. */
static inline void edm_spin_found(struct edm_spin *spin, bool found) {
    if (found)
        spin->shared = spin->ran ? spin->shared + 1 : 0;
    if (spin->ran)
        spin->keep_s = found ? 0 : spin->most_s;
    spin->ran = false;
}
