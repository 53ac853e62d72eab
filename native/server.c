// The memory server's way from a request to a page [6-10] without Python: what every get of a stored page takes. All
// else, and whatever is out of the ordinary, is Python's (edm/dms/server.py), under the same lock.
#include <errno.h>
#include <pthread.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "crc32c.h"
#include "edm_abi.h"
#include "edm_ops.h"

#define PAGE 4096ul
#define BATCH 1024u
#define PATIENCE_S 1.0  // for the lock; then Python waits for it, with the run's deadlines and words

struct edm_server {
    struct edm_server_ops ops;
    pthread_mutex_t mu;
    struct edm_spt *spt;
    const struct edm_page_store_ops *pages;
    struct edm_server_counts count;
    uint64_t slots[BATCH];
};

// Stored pages that stand alone in a batch with new ones.
static bool get_singly(struct edm_server *s, struct edm_page_ref *refs, uint32_t n, uint8_t *into) {
    for (uint32_t i = 0; i < n; i++)
        if (refs[i].status == 1 && (s->pages->get(s->pages->self, &s->slots[i], 1, into + i * PAGE) ||
                                    edm_crc32c(into + i * PAGE, PAGE) != refs[i].checksum))
            return false;
    return true;
}

static int get(void *self, uint32_t instance, struct edm_page_ref *refs, uint32_t n, void *into) {
    struct edm_server *s = self;
    if (n > BATCH || edm_refs_foreign(refs, n, instance))
        return -EAGAIN;
    if (pthread_mutex_trylock(&s->mu) && edm_server_enter(s, PATIENCE_S))
        return -EAGAIN;
    size_t found = edm_spt_lookup(s->spt, refs, n, s->slots);
    bool ok = true;
    if (found == n)
        ok = !s->pages->get(s->pages->self, s->slots, n, into) && edm_spt_check(refs, into, n) == n;
    else if (found)
        ok = get_singly(s, refs, n, into);
    if (ok) {
        s->count.gets += n;
        s->count.found += found;
    }
    pthread_mutex_unlock(&s->mu);
    return ok ? 0 : -EAGAIN;
}

static int evict(void *self, uint32_t instance, struct edm_page_ref *refs, uint32_t n, const void *pages) {
    (void)self, (void)instance, (void)refs, (void)n, (void)pages;
    return -EAGAIN;  // in batches, off the path of a fault: Python decides what is kept
}

struct edm_server *edm_server_new(struct edm_spt *spt, const void *page_store) {
    struct edm_server *s = calloc(1, sizeof *s);
    if (!s)
        return NULL;
    s->ops = (struct edm_server_ops){EDM_OPS_VERSION, sizeof s->ops, s, get, evict};
    s->spt = spt;
    s->pages = page_store;
    pthread_mutex_init(&s->mu, NULL);
    return s;
}

void edm_server_free(struct edm_server *s) {
    if (s)
        pthread_mutex_destroy(&s->mu);
    free(s);
}

const void *edm_server_table(const struct edm_server *s) { return &s->ops; }

int edm_server_enter(struct edm_server *s, double timeout_s) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    double end = (double)t.tv_sec + (double)t.tv_nsec * 1e-9 + timeout_s;
    t.tv_sec = (time_t)end;
    t.tv_nsec = (long)((end - (double)t.tv_sec) * 1e9);
    return -pthread_mutex_clocklock(&s->mu, CLOCK_MONOTONIC, &t);
}

void edm_server_leave(struct edm_server *s) { pthread_mutex_unlock(&s->mu); }

void edm_server_counts(struct edm_server *s, struct edm_server_counts *out) { *out = s->count; }

// ---- a channel that is a call

struct edm_call_channel {
    struct edm_channel_ops ops;
    const struct edm_server_ops *server;
    uint32_t instance;
};

static int call_fetch(void *self, struct edm_page_ref *refs, uint32_t n, void *into) {
    struct edm_call_channel *c = self;
    return c->server->get(c->server->self, c->instance, refs, n, into);
}

static int call_evict(void *self, struct edm_page_ref *refs, uint32_t n, const void *pages) {
    struct edm_call_channel *c = self;
    return c->server->evict(c->server->self, c->instance, refs, n, pages);
}

struct edm_call_channel *edm_call_channel_new(const void *server, uint32_t instance) {
    struct edm_call_channel *c = calloc(1, sizeof *c);
    if (c)
        *c = (struct edm_call_channel){
            {EDM_OPS_VERSION, sizeof c->ops, c, call_fetch, call_evict},
            server,
            instance,
        };
    return c;
}

void edm_call_channel_free(struct edm_call_channel *c) { free(c); }
const void *edm_call_channel_table(const struct edm_call_channel *c) { return &c->ops; }
