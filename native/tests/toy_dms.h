// A memory server for the C tests, in this process: arrays of pages by region, behind one mutex, and the threads that
// carry between it and the engine. It can be slow, refuse evictions and give wrong answers, by chance.
#pragma once
#include "check.h"

#define TOY_WORKERS 4

struct toy_page {
    uint64_t version;  // 0: none
    uint32_t checksum;
    uint8_t *data;
};

struct toy_region {
    uint64_t region;
    struct toy_page *page;
};

struct toy_dms {
    pthread_mutex_t mu;
    struct edm_engine *engine;
    uint64_t pages;  // of every region
    struct toy_region *region;
    uint32_t n;
    uint64_t sequence;
    // By chance, in 1000: an eviction is refused; a page is answered with an error; with other bytes than it has.
    _Atomic uint32_t refuse, error, corrupt;
    uint32_t fetch_us, evict_us;  // how long it takes, at most
    _Atomic bool keep_refused;    // a refused page is kept always, not by chance
    _Atomic bool hold;            // answers no eviction
    _Atomic bool hold_fetch;      // answers no fetch
    _Atomic bool hold_moved;      // does not say that it has renamed pages
    _Atomic uint32_t held_fetches, held_evictions, held_moved;
    bool refuses;  // … or has, before
    bool in_c;     // the engine calls it through a table
    struct edm_channel_ops channel;
    uint64_t drops, clones, moves;
    pthread_t worker[TOY_WORKERS], write_back;
    int workers;
};

struct toy_worker {
    struct toy_dms *dms;
    int number;
};

static struct toy_region *toy_find(struct toy_dms *d, uint64_t region) {
    for (uint32_t i = 0; i < d->n; i++)
        if (d->region[i].region == region)
            return &d->region[i];
    return NULL;
}

static struct toy_region *toy_get_region(struct toy_dms *d, uint64_t region) {
    struct toy_region *r = toy_find(d, region);
    if (!r)
        FAIL("region %#" PRIx64 " is not there", region);
    return r;
}

static void toy_create(struct toy_dms *d, uint64_t region) {
    if (toy_find(d, region))
        FAIL("region %#" PRIx64 " is made twice", region);
    d->region = xrealloc(d->region, (d->n + 1) * sizeof *d->region);
    d->region[d->n++] = (struct toy_region){region, xcalloc(d->pages, sizeof(struct toy_page))};
}

static void toy_forget(struct toy_page *p) {
    free(p->data);
    *p = (struct toy_page){0};
}

static void toy_put(struct toy_page *p, uint64_t version, uint32_t checksum, const uint8_t *data) {
    if (!p->data)
        p->data = xcalloc(1, PAGE_SIZE_);
    memcpy(p->data, data, PAGE_SIZE_);
    p->version = version;
    p->checksum = checksum;
}

static void toy_evict(struct toy_dms *d, struct edm_page_ref *ref, const uint8_t *data, uint64_t *random) {
    struct toy_page *p = &toy_get_region(d, ref->region)->page[ref->index];
    if (edm_crc32c(data, PAGE_SIZE_) != ref->checksum)
        FAIL("evicted page %#" PRIx64 " does not match its checksum", ref->index);
    if (ref->version < p->version)
        FAIL("page %#" PRIx64 ": version %" PRIu64 " after %" PRIu64, ref->index, ref->version, p->version);
    ref->status = next_random(random) % 1000 < d->refuse;
    d->refuses |= ref->status != 0;
    // A refused page may or may not have been kept.
    if (!ref->status || d->keep_refused || next_random(random) % 2)
        toy_put(p, ref->version, ref->checksum, data);
}

static void toy_fetch(struct toy_dms *d, struct edm_page_ref *ref, uint8_t *into, uint64_t *random) {
    // A fetch may be under way when the program ends: other channels may overtake the ordered one.
    static struct toy_page none;
    struct toy_region *r = toy_find(d, ref->region);
    struct toy_page *p = r ? &r->page[ref->index] : &none;
    ref->status = p->version != 0;
    ref->version = p->version;
    ref->checksum = p->checksum;
    if (p->version)
        memcpy(into, p->data, PAGE_SIZE_);
    uint32_t chance = (uint32_t)(next_random(random) % 1000);
    if (chance < d->error)
        ref->status = 2;
    else if (chance < d->error + d->corrupt)
        into[next_random(random) % PAGE_SIZE_] ^= 1;
}

static void toy_structural(struct toy_dms *d, const struct edm_outbox *o) {
    CHECK(o->sequence > d->sequence);
    d->sequence = o->sequence;
    if (o->kind == EDM_OUT_CREATE) {
        toy_create(d, o->region);
    } else if (o->kind == EDM_OUT_CLONE) {
        toy_create(d, o->region);
        struct toy_page *to = toy_get_region(d, o->region)->page, *from = toy_get_region(d, o->a)->page;
        for (uint64_t i = 0; i < d->pages; i++)
            if (from[i].version)
                toy_put(&to[i], from[i].version, from[i].checksum, from[i].data);
        d->clones++;
    } else if (o->kind == EDM_OUT_MOVE) {
        struct toy_page *p = toy_get_region(d, o->region)->page;
        for (uint64_t i = 0; i < o->c; i++) {
            toy_forget(&p[o->b + i]);
            p[o->b + i] = p[o->a + i];
            p[o->a + i] = (struct toy_page){0};
        }
        d->moves++;
    } else if (o->kind == EDM_OUT_DROP) {
        struct toy_region *r = toy_get_region(d, o->region);
        for (uint64_t i = o->a; i < o->a + o->b && i < d->pages; i++)
            toy_forget(&r->page[i]);
        d->drops++;
    } else if (o->kind == EDM_OUT_DROP_REGION) {
        struct toy_region *r = toy_get_region(d, o->region);
        for (uint64_t i = 0; i < d->pages; i++)
            toy_forget(&r->page[i]);
        free(r->page);
        *r = d->region[--d->n];
    } else {
        FAIL("outbox message of kind %d", o->kind);
    }
}

static void toy_pause(uint32_t most_us, uint64_t *random) {
    if (most_us)
        usleep((useconds_t)(next_random(random) % most_us));
}

static void toy_hold(_Atomic bool *hold, _Atomic uint32_t *held) {
    atomic_fetch_add(held, 1);
    while (atomic_load(hold))
        usleep(200);
    atomic_fetch_sub(held, 1);
}

// The same server as a C table. One call in eight says that it cannot, and then the thread does it.
static bool toy_declines(void) {
    static _Atomic uint32_t calls;
    return atomic_fetch_add(&calls, 1) % 8 == 7;
}

static int toy_channel_fetch(void *dms, struct edm_page_ref *refs, uint32_t n, void *into) {
    struct toy_dms *d = dms;
    uint64_t random = 55;
    if (toy_declines())
        return -EAGAIN;
    pthread_mutex_lock(&d->mu);
    for (uint32_t i = 0; i < n; i++)
        toy_fetch(d, &refs[i], (uint8_t *)into + (size_t)i * PAGE_SIZE_, &random);
    pthread_mutex_unlock(&d->mu);
    return 0;
}

static int toy_channel_evict(void *dms, struct edm_page_ref *refs, uint32_t n, const void *pages) {
    struct toy_dms *d = dms;
    uint64_t random = 66;
    if (toy_declines())
        return -EAGAIN;
    pthread_mutex_lock(&d->mu);
    for (uint32_t i = 0; i < n; i++)
        toy_evict(d, &refs[i], (const uint8_t *)pages + (size_t)i * PAGE_SIZE_, &random);
    pthread_mutex_unlock(&d->mu);
    return 0;
}

static void *toy_worker_thread(void *argument) {
    struct toy_worker w = *(struct toy_worker *)argument;
    struct toy_dms *d = w.dms;
    uint64_t random = 77 + (uint64_t)w.number;
    free(argument);
    struct edm_page_ref *refs = edm_worker_refs(d->engine, w.number);
    uint8_t *pages = edm_worker_pages(d->engine, w.number);
    for (int n; (n = edm_poll(d->engine, w.number, 20000)) >= 0;) {
        if (!n)
            continue;
        toy_hold(&d->hold_fetch, &d->held_fetches);
        toy_pause(d->fetch_us, &random);
        pthread_mutex_lock(&d->mu);
        for (int i = 0; i < n; i++)
            toy_fetch(d, &refs[i], pages + (size_t)i * PAGE_SIZE_, &random);
        pthread_mutex_unlock(&d->mu);
        toy_pause(d->fetch_us, &random);
        CHECK(edm_resolve(d->engine, w.number, n) == 0);
    }
    return NULL;
}

// What the engine has noted of a region is what is there; of a page that was refused and kept it knows nothing.
static void toy_agrees(struct toy_dms *d, uint64_t region) {
    struct toy_region *r = toy_find(d, region);
    pthread_mutex_lock(&d->engine->mu);
    for (uint64_t i = 0; i < d->pages; i++) {
        bool stored = r && r->page[i].version, known = acknowledged_has(d->engine, region, i);
        if (known != stored && (known || !d->refuses))
            FAIL("page %" PRIu64 " of region %#" PRIx64 " is%s stored", i, region, stored ? "" : " not");
    }
    pthread_mutex_unlock(&d->engine->mu);
}

static void *toy_write_back_thread(void *dms) {
    struct toy_dms *d = dms;
    uint64_t random = 99;
    struct edm_outbox out;
    for (int n; (n = edm_outbox_poll(d->engine, &out, 20000)) >= 0;) {
        if (!n)
            continue;
        if (out.kind == EDM_OUT_EVICT)
            toy_hold(&d->hold, &d->held_evictions);
        toy_pause(d->evict_us, &random);
        pthread_mutex_lock(&d->mu);
        if (out.kind == EDM_OUT_EVICT)
            for (int i = 0; i < out.n; i++)
                toy_evict(d, &out.refs[i], out.pages + (size_t)i * PAGE_SIZE_, &random);
        else
            toy_structural(d, &out);
        pthread_mutex_unlock(&d->mu);
        if (out.kind == EDM_OUT_MOVE)
            toy_hold(&d->hold_moved, &d->held_moved);
        edm_outbox_done(d->engine, &out);
        pthread_mutex_lock(&d->mu);
        if (out.kind != EDM_OUT_EVICT)
            toy_agrees(d, out.region);
        pthread_mutex_unlock(&d->mu);
    }
    return NULL;
}

static void toy_start(struct toy_dms *d, struct edm_engine *g, int workers) {
    pthread_mutex_init(&d->mu, NULL);
    d->engine = g;
    d->workers = workers;
    d->channel = (struct edm_channel_ops){
        EDM_OPS_VERSION, sizeof d->channel, d, toy_channel_fetch, toy_channel_evict,
    };
    if (d->in_c)
        edm_outbox_channel(g, &d->channel);
    for (int i = 0; i < workers; i++) {
        if (d->in_c)
            edm_worker_channel(g, i, &d->channel);
        struct toy_worker *w = xcalloc(1, sizeof *w);
        *w = (struct toy_worker){d, i};
        CHECK(pthread_create(&d->worker[i], NULL, toy_worker_thread, w) == 0);
    }
    CHECK(pthread_create(&d->write_back, NULL, toy_write_back_thread, d) == 0);
}

// After edm_engine_stop.
static void toy_join(struct toy_dms *d) {
    for (int i = 0; i < d->workers; i++)
        pthread_join(d->worker[i], NULL);
    pthread_join(d->write_back, NULL);
}

static inline uint32_t toy_regions(struct toy_dms *d) {
    pthread_mutex_lock(&d->mu);
    uint32_t n = d->n;
    pthread_mutex_unlock(&d->mu);
    return n;
}

static void toy_free(struct toy_dms *d) {
    for (uint32_t k = 0; k < d->n; k++) {
        for (uint64_t i = 0; i < d->pages; i++)
            free(d->region[k].page[i].data);
        free(d->region[k].page);
    }
    free(d->region);
    pthread_mutex_destroy(&d->mu);
}
