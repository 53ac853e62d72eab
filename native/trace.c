// The fault trace: when each step of a fault was reached [5, 11-14], for `edm run --trace`. Off, it costs one test of a
// pointer a step. On, a fault under way has a place in a small table, found by its page, and goes into a ring when it
// is settled; the DM-Handler takes the ring's records away. Everything here is under the engine's lock.
#include <errno.h>
#include <sched.h>
#include <stdlib.h>
#include <string.h>

#include "engine.h"

#define UNDER_WAY 1024u  // faults; one that finds its place taken is not recorded

struct edm_trace {
    struct edm_trace_record *ring;
    uint32_t size, head, n;
    uint64_t dropped;
    struct {
        struct space *space;
        struct edm_trace_record r;
    } open[UNDER_WAY];
};

int edm_trace_start(struct edm_engine *g, uint32_t records) {
    struct edm_trace *t = calloc(1, sizeof *t);
    if (!t || !records || !(t->ring = calloc(records, sizeof *t->ring))) {
        free(t);
        return records ? -ENOMEM : -EINVAL;
    }
    t->size = records;
    pthread_mutex_lock(&g->mu);
    trace_free(g);
    g->trace = t;
    pthread_mutex_unlock(&g->mu);
    return 0;
}

void trace_free(struct edm_engine *g) {
    if (!g->trace)
        return;
    free(g->trace->ring);
    free(g->trace);
    g->trace = NULL;
}

int edm_trace_take(struct edm_engine *g, struct edm_trace_record *out, int max, uint64_t *dropped) {
    int n = 0;
    pthread_mutex_lock(&g->mu);
    struct edm_trace *t = g->trace;
    for (; t && n < max && t->n; t->n--) {
        out[n++] = t->ring[t->head];
        t->head = (t->head + 1) % t->size;
    }
    *dropped = t ? t->dropped : 0;
    pthread_mutex_unlock(&g->mu);
    return n;
}

static uint32_t place(const struct space *s, uint64_t page) {
    return (uint32_t)((page ^ s->region << 7) * 0x9e3779b97f4a7c15u >> 54) % UNDER_WAY;
}

void trace_begin(struct edm_engine *g, const struct fault *f, uint32_t thread) {
    uint32_t i = place(f->space, f->page);
    if (g->trace->open[i].space) {
        if (g->trace->open[i].space != f->space || g->trace->open[i].r.page != f->page)
            g->trace->dropped++;
        return;  // of several threads that wait for one page, the first is recorded
    }
    g->trace->open[i].space = f->space;
    g->trace->open[i].r = (struct edm_trace_record){
        .read_ns = now_ns(),
        .page = f->page,
        .region = f->space->region,
        .thread = thread,
        .cpu = (uint16_t)sched_getcpu(),
        .kind = f->flags & UFFD_PAGEFAULT_FLAG_WP      ? EDM_TRACE_PROTECTED
                : f->flags & UFFD_PAGEFAULT_FLAG_WRITE ? EDM_TRACE_WRITE
                                                       : EDM_TRACE_READ,
    };
}

static void settled(struct edm_trace *t, uint32_t i) {
    if (t->n < t->size)
        t->ring[(t->head + t->n++) % t->size] = t->open[i].r;
    else
        t->dropped++;
    t->open[i].space = NULL;
}

void trace_step(struct edm_engine *g, const struct space *s, uint64_t page, int step, int outcome) {
    uint32_t i = place(s, page);
    if (g->trace->open[i].space != s || g->trace->open[i].r.page != page)
        return;  // nobody waits for it: it was brought ahead
    struct edm_trace_record *r = &g->trace->open[i].r;
    r->step_ns[step] = (uint32_t)(now_ns() - r->read_ns);
    if (outcome)
        r->outcome = (uint8_t)outcome;
    if (step == EDM_TRACE_LISTED)
        settled(g->trace, i);
}

// A space is going: what is under way in it will not be settled.
void trace_forget(struct edm_engine *g, const struct space *s) {
    for (uint32_t i = 0; i < UNDER_WAY; i++)
        if (g->trace->open[i].space == s)
            g->trace->open[i].space = NULL;
}
