// The memory server's way from a request to a page [6-10], and of evicted pages to the stores, without Python: what
// every get of a stored page takes, and every eviction of new versions. All else, and whatever is out of the ordinary,
// is Python's (edm/dms/server.py), under the same lock.
#include <errno.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "crc32c.h"
#include "edm_abi.h"
#include "edm_ops.h"
#include "point.h"

#define PAGE 4096ul
#define BATCH 1024u
#define KEEP_WAITING (1u << 16)  // room for as many slots is kept from flush to flush
#define PATIENCE_S 1.0           // for the lock; then Python waits for it, with the run's deadlines and words

struct edm_server {
    struct edm_server_ops ops;
    pthread_mutex_t mu;
    struct edm_spt *spt;
    const struct edm_page_store_ops *pages;
    bool knows;  // the page store checks against the table's checksums
    struct edm_server_counts count;
    // Evictions.
    bool evicts, lazy, blocked, closed;
    atomic_bool open;
    struct edm_journal *journal;
    uint64_t *waiting, waiting_count, waiting_room, most_waiting;
    uint32_t unsaved_count;
    struct edm_page_name unsaved[BATCH];
    // Of one batch.
    uint64_t slots[BATCH], versions[BATCH];
    uint32_t sums[BATCH];
    uint8_t found[BATCH], verdicts[BATCH];
    struct edm_page_ref stored[BATCH];
};

// ---- get [6-10]

static bool read_pages(struct edm_server *s, const struct edm_page_ref *refs, uint32_t first, uint32_t n,
                       uint8_t *into) {
    const uint64_t *slots = s->slots + first;

    if (!s->knows)
        return !s->pages->get(s->pages->self, slots, n, into) && edm_spt_check(refs + first, into, n) == n;
    for (uint32_t i = 0; i < n; i++)
        s->sums[i] = refs[first + i].checksum;
    return !s->pages->get_known(s->pages->self, slots, s->sums, n, into);
}

int edm_server_get(struct edm_server *s, uint32_t instance, struct edm_page_ref *refs, size_t n, void *into) {
    if (s->closed || n > BATCH || edm_refs_foreign(refs, n, instance) || point_fails(POINT_pages_asked, NULL))
        return -EAGAIN;
    size_t found = edm_spt_lookup(s->spt, refs, n, s->slots);
    bool ok = true;
    if (found == n)
        ok = read_pages(s, refs, 0, (uint32_t)n, into);
    else if (found)  // stored pages that stand alone in a batch with new ones
        for (uint32_t i = 0; i < n && ok; i++)
            ok = refs[i].status != 1 || read_pages(s, refs, i, 1, (uint8_t *)into + i * PAGE);
    if (!ok)
        return -EAGAIN;
    s->count.gets += n;
    s->count.found += found;
    if (found && point_fails(POINT_pages_found, into))
        for (uint32_t i = 0; i < n; i++)  // answered as if nothing had ever been stored
            refs[i].status = refs[i].checksum = 0, refs[i].version = 0;
    return 0;
}

// ---- evict

// Whether all of a batch is to be stored, and slots that are let go of for it have room.
static bool ordinary(struct edm_server *s, uint32_t instance, const struct edm_page_ref *refs, uint32_t n,
                     const void *pages) {
    memcpy(s->stored, refs, n * sizeof *refs);
    edm_spt_lookup(s->spt, s->stored, n, s->slots);
    for (uint32_t i = 0; i < n; i++) {
        s->found[i] = (uint8_t)s->stored[i].status;
        s->versions[i] = s->stored[i].version;
        s->sums[i] = s->stored[i].checksum;
    }
    return !edm_spt_screen(refs, pages, n, instance, s->found, s->versions, s->sums, s->verdicts);
}

static int make_room(struct edm_server *s, size_t more) {
    if (s->waiting_count + more <= s->waiting_room)
        return 0;
    uint64_t room = 2 * (s->waiting_count + more);
    uint64_t *bigger = realloc(s->waiting, room * sizeof *bigger);
    if (!bigger)
        return -ENOMEM;
    s->waiting = bigger;
    s->waiting_room = room;
    return 0;
}

// What is recorded stays in the table; a repeat must not be answered from that, and is stored anew.
static int not_saved(struct edm_server *s, const struct edm_page_ref *refs, uint32_t n) {
    for (uint32_t i = 0; i < n; i++)
        s->unsaved[i] = (struct edm_page_name){refs[i].region, refs[i].index};
    s->unsaved_count = n;
    return -EAGAIN;
}

// The order is that of edm/dms/lasting.py, and so are the fault points.
int edm_server_evict(struct edm_server *s, uint32_t instance, struct edm_page_ref *refs, size_t count,
                     const void *pages) {
    uint32_t n = (uint32_t)count;

    if (!s->evicts || s->blocked || s->unsaved_count || count > BATCH || !count ||
        s->waiting_count >= s->most_waiting || (s->journal && edm_journal_ready(s->journal, n)) ||
        !ordinary(s, instance, refs, n, pages) || make_room(s, n + edm_spt_gone(s->spt, NULL)))
        return -EAGAIN;
    for (uint32_t i = 0; i < n; i++)
        s->sums[i] = refs[i].checksum;
    if (point_fails(POINT_pages_screened, (uint8_t *)(uintptr_t)pages))
        return -EAGAIN;
    if (s->pages->put(s->pages->self, pages, s->sums, n, s->slots))
        return -EAGAIN;
    if (point_fails(POINT_pages_put, NULL) || edm_spt_record(s->spt, refs, s->slots, n)) {
        s->pages->release(s->pages->self, s->slots, n);
        return -EAGAIN;
    }
    uint64_t *gone = s->waiting + s->waiting_count;
    size_t gone_count = edm_spt_gone(s->spt, gone);
    s->waiting_count += gone_count;
    if (point_fails(POINT_pages_recorded, NULL) || point_fails(POINT_pages_synced, NULL) ||
        (s->journal && edm_journal_record(s->journal, refs, s->slots, n)))
        return not_saved(s, refs, n);
    if (!s->lazy) {
        s->waiting_count -= gone_count;
        s->pages->release(s->pages->self, gone, (uint32_t)gone_count);
    }
    if (point_fails(POINT_pages_committed, NULL))
        return -EAGAIN;
    for (uint32_t i = 0; i < n; i++)
        refs[i].status = 0;
    s->count.stored += n;
    return 0;
}

void edm_server_evicts(struct edm_server *s, struct edm_journal *journal, int lazy, uint64_t most_waiting) {
    s->evicts = s->pages->bytes >= sizeof *s->pages && s->pages->put && s->pages->release;
    s->journal = journal;
    s->lazy = lazy;
    s->most_waiting = most_waiting;
}

void edm_server_close(struct edm_server *s) { s->closed = true, s->evicts = false; }
void edm_server_open_table(struct edm_server *s, int open) { atomic_store(&s->open, open); }
void edm_server_blocked(struct edm_server *s, int blocked) { s->blocked = blocked; }

int edm_server_put_by(struct edm_server *s, const uint64_t *slots, size_t n) {
    if (make_room(s, n))
        return -ENOMEM;
    memcpy(s->waiting + s->waiting_count, slots, n * sizeof *slots);
    s->waiting_count += n;
    return 0;
}

size_t edm_server_waiting(const struct edm_server *s) { return s->waiting_count; }

void edm_server_take_waiting(struct edm_server *s, uint64_t *out) {
    memcpy(out, s->waiting, s->waiting_count * sizeof *out);
    s->waiting_count = 0;
    if (s->waiting_room > KEEP_WAITING) {
        free(s->waiting);
        s->waiting = NULL;
        s->waiting_room = 0;
    }
}

size_t edm_server_unsaved(struct edm_server *s, struct edm_page_name *out) {
    size_t n = s->unsaved_count;

    if (out) {
        memcpy(out, s->unsaved, n * sizeof *out);
        s->unsaved_count = 0;
    }
    return n;
}

// ---- the table, for any thread

static bool enter(struct edm_server *s) { return !pthread_mutex_trylock(&s->mu) || !edm_server_enter(s, PATIENCE_S); }

static int get(void *self, uint32_t instance, struct edm_page_ref *refs, uint32_t n, void *into) {
    struct edm_server *s = self;
    if (!enter(s))
        return -EAGAIN;
    int result = edm_server_get(s, instance, refs, n, into);
    pthread_mutex_unlock(&s->mu);
    return result;
}

static int evict(void *self, uint32_t instance, struct edm_page_ref *refs, uint32_t n, const void *pages) {
    struct edm_server *s = self;
    if (!atomic_load(&s->open) || !enter(s))
        return -EAGAIN;
    int result = edm_server_evict(s, instance, refs, n, pages);
    pthread_mutex_unlock(&s->mu);
    return result;
}

struct edm_server *edm_server_new(struct edm_spt *spt, const void *page_store) {
    struct edm_server *s = calloc(1, sizeof *s);
    if (!s)
        return NULL;
    s->ops = (struct edm_server_ops){EDM_OPS_VERSION, sizeof s->ops, s, get, evict};
    s->spt = spt;
    s->pages = page_store;
    s->knows = s->pages->bytes >= offsetof(struct edm_page_store_ops, put) && s->pages->get_known;
    atomic_init(&s->open, true);
    pthread_mutex_init(&s->mu, NULL);
    return s;
}

void edm_server_free(struct edm_server *s) {
    if (!s)
        return;
    pthread_mutex_destroy(&s->mu);
    free(s->waiting);
    free(s);
}

const void *edm_server_table(const struct edm_server *s) { return &s->ops; }

#ifdef __SANITIZE_THREAD__  // it knows no pthread_mutex_clocklock, and has what is done with the lock for races
static int lock_until(pthread_mutex_t *mu, const struct timespec *end) {
    struct timespec now;
    while (pthread_mutex_trylock(mu)) {
        clock_gettime(CLOCK_MONOTONIC, &now);
        if (now.tv_sec > end->tv_sec || (now.tv_sec == end->tv_sec && now.tv_nsec >= end->tv_nsec))
            return ETIMEDOUT;
        usleep(100);
    }
    return 0;
}
#else
static int lock_until(pthread_mutex_t *mu, const struct timespec *end) {
    return pthread_mutex_clocklock(mu, CLOCK_MONOTONIC, end);
}
#endif

int edm_server_enter(struct edm_server *s, double timeout_s) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    double end = (double)t.tv_sec + (double)t.tv_nsec * 1e-9 + timeout_s;
    t.tv_sec = (time_t)end;
    t.tv_nsec = (long)((end - (double)t.tv_sec) * 1e9);
    return -lock_until(&s->mu, &t);
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
