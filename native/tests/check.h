// What the C tests of the engine share: checks that say where, random numbers, a watchdog that says what hangs.
#pragma once
#include <errno.h>
#include <inttypes.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "../crc32c.h"
#include "../engine.h"

#define FAIL(...)                                       \
    do {                                                \
        fprintf(stderr, "%s:%d: ", __FILE__, __LINE__); \
        fprintf(stderr, __VA_ARGS__);                   \
        fputc('\n', stderr);                            \
        _exit(1);                                       \
    } while (0)
#define CHECK(condition)                    \
    do {                                    \
        if (!(condition))                   \
            FAIL("not so: %s", #condition); \
    } while (0)

static inline uint64_t next_random(uint64_t *state) {  // splitmix64
    uint64_t x = *state += 0x9e3779b97f4a7c15u;
    x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9u;
    x = (x ^ x >> 27) * 0x94d049bb133111ebu;
    return x ^ x >> 31;
}

// What the engine was doing when a test did not end.
static struct edm_engine *watched;

static void dump(int signal_number) {
    (void)signal_number;
    struct edm_engine *g = watched;
    if (g) {
        const struct edm_counters *c = &g->count;
        fprintf(stderr,
                "no end: resident %" PRIu64 " inbound %" PRIu64 " limit %" PRIu64 " high %" PRIu64 " low %" PRIu64
                "; waiting %u retry %u ready %u; buffer %u of %u; outbox %u; spaces %u\n",
                g->resident, g->inbound, g->limit, g->high, g->low, g->waiting.n, g->retry.n, g->ready.n, g->slots_used,
                g->nslots, g->queued, g->nspaces);
        fprintf(stderr,
                "faults %" PRIu64 " zero %" PRIu64 " fetches %" PRIu64 " rescues %" PRIu64 " evictions %" PRIu64
                " again %" PRIu64 " stale %" PRIu64 " lost %" PRIu64 " error '%s'\n",
                c->faults, c->zero_fills, c->fetches, c->rescues, c->evictions, c->again, c->stale, c->lost, g->error);
    }
    abort();
}

static inline void watch(struct edm_engine *g, unsigned seconds) {
    watched = g;
    signal(SIGALRM, dump);
    alarm(seconds);
}
