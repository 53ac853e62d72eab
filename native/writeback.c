// The write-back buffer and the outbox: evicted pages wait here until the DMS has acknowledged them, and everything
// the DMS must be told leaves in one order. A page in the buffer is found by a fault (a rescue) without the network.
#include "engine.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#define HELD_MOST 1024     // pages
#define HELD_NS 20000000u  // no page, and no other change, waits longer

#define ITEM(g, id) (&(g)->item[(id) - 1])

// A slot for one page; -1 when the buffer is full.
int write_slot_get(struct edm_engine *g) {
    if (!g->free_slot)
        return -1;
    uint32_t i = g->free_slot - 1;
    g->free_slot = g->slot[i].next_free;
    g->slot[i].refs = 1;
    g->slots_used++;
    return (int)i;
}

// One of those beyond the buffer: for pages that have left the program already. -1: thousands are in use.
int write_slot_spare(struct edm_engine *g) {
    for (uint32_t n = g->nslots_all - g->nslots; n > 0; n--) {
        uint32_t i = g->spare_slot;
        g->spare_slot = i + 1 < g->nslots_all ? i + 1 : g->nslots;
        if (g->slot[i].refs)
            continue;
        g->slot[i].refs = 1;
        g->slots_used++;
        return (int)i;
    }
    return -1;
}

void write_slot_put(struct edm_engine *g, uint32_t i) {
    if (--g->slot[i].refs)
        return;
    if (i < g->nslots) {
        g->slot[i].next_free = g->free_slot;
        g->free_slot = i + 1;
    }
    g->slots_used--;
    if (g->slot_wanted)
        pthread_cond_signal(&g->lpet_wake);
}

uint8_t *write_slot_data(struct edm_engine *g, uint32_t slot) { return g->slots + (uint64_t)slot * PAGE_SIZE_; }

struct outbox_item *outbox_item_at(struct edm_engine *g, uint64_t id) { return ITEM(g, id); }

static void items_grow(struct edm_engine *g) {
    uint32_t n = g->nitems ? g->nitems * 2 : 256;
    if (n > STATE_ITEMS)
        abort();  // a memory server that takes nothing, and millions of address-space changes: as out of memory
    g->state->items = n;
    for (uint32_t i = g->nitems; i < n; i++)
        g->item[i].next = i + 2 <= n ? i + 2 : 0;
    g->free_item = g->nitems + 1;
    g->nitems = n;
}

// So many pages may wait before they are sent: one that comes back meanwhile is never written, and many are sent in few
// messages. A small share of the local memory, and never so many that the LPET lacks places.
static uint32_t held_back(const struct edm_engine *g) {
    uint64_t most = g->nslots / 4;
    if (g->limit && g->limit / 16 < most)
        most = g->limit / 16;
    return most > HELD_MOST ? HELD_MOST : most ? (uint32_t)most : 1;
}

// Append an item; returns its id (never 0). It is valid from the next state_commit on.
uint32_t outbox_push(struct edm_engine *g, int kind, struct space *s) {
    if (!g->free_item)
        items_grow(g);
    uint32_t id = g->free_item;
    struct outbox_item *o = ITEM(g, id);
    g->free_item = o->next;
    o->seq = ++g->seq;  // first: whatever is found in it from here on has not been committed
    STATE_BARRIER();
    *o =
        (struct outbox_item){.space = s, .seq = g->seq, .region = s->region, .kind = (uint8_t)kind, .state = OB_QUEUED};
    s->refs++;
    if (g->tail)
        ITEM(g, g->tail)->next = id;
    else
        g->head = id;
    g->tail = id;
    if (!g->queued++)
        g->first_queued_ns = now_ns();
    if (kind == EDM_OUT_CLONE || kind == EDM_OUT_MOVE)
        g->outbox_urgent = true;
    if (g->queued == 1 || g->outbox_urgent || kind != EDM_OUT_EVICT || g->queued >= held_back(g))
        pthread_cond_signal(&g->outbox_wake);
    return id;
}

static void item_free(struct edm_engine *g, uint32_t id) {
    struct outbox_item *o = ITEM(g, id);
    struct space *s = o->space;
    o->state = OB_FREE;
    o->space = NULL;
    o->next = g->free_item;
    g->free_item = id;
    if (s)
        space_unref(s);
}

// The page is back in the app, or gone: an item that waits is skipped when its turn comes, one in flight completes.
void outbox_cancel(struct edm_engine *g, uint64_t id) {
    struct outbox_item *o = ITEM(g, id);
    if (o->state == OB_SENT) {
        o->state = OB_CANCELLED_IN_FLIGHT;
        return;
    }
    write_slot_put(g, o->slot);
    o->state = OB_CANCELLED_IN_FLIGHT;
}

static uint32_t outbox_take(struct edm_engine *g) {
    uint32_t id = g->head;
    struct outbox_item *o = ITEM(g, id);
    g->head = o->next;
    if (!g->head)
        g->tail = 0;
    o->next = 0;
    g->queued--;
    return id;
}

// Skip what was cancelled while it waited.
static void outbox_skip(struct edm_engine *g) {
    while (g->head && ITEM(g, g->head)->state == OB_CANCELLED_IN_FLIGHT)
        item_free(g, outbox_take(g));
}

// Everything before what still waits has been done: nothing is in flight.
static void outbox_note_done(struct edm_engine *g) { g->done_seq = g->head ? ITEM(g, g->head)->seq - 1 : g->seq; }

static void outbox_fill_evictions(struct edm_engine *g, struct edm_outbox *out) {
    uint32_t n = 0;
    while (g->head && n < EDM_OUTBOX_BATCH && ITEM(g, g->head)->kind == EDM_OUT_EVICT) {
        uint32_t id = outbox_take(g);
        struct outbox_item *o = ITEM(g, id);
        o->state = OB_SENT;
        g->out_item[n] = id;
        g->out_refs[n] = (struct edm_page_ref){
            .region = o->region, .index = o->a, .version = o->version, .checksum = o->checksum, .status = 1};
        memcpy(g->out_pages + (uint64_t)n * PAGE_SIZE_, write_slot_data(g, o->slot), PAGE_SIZE_);
        n++;
        outbox_skip(g);
    }
    g->out_n = n;
    *out = (struct edm_outbox){.kind = EDM_OUT_EVICT, .n = (int32_t)n, .refs = g->out_refs, .pages = g->out_pages};
}

void edm_outbox_channel(struct edm_engine *g, const void *ops) { g->out_channel = ops; }

// The eviction through the engine's own channel; false: Python is to carry it, and to say what was wrong.
static bool evict_here(struct edm_engine *g, const struct edm_outbox *out) {
    const struct edm_channel_ops *c = g->out_channel;
    if (!c || out->kind != EDM_OUT_EVICT)
        return false;
    pthread_mutex_unlock(&g->mu);
    bool carried = c->evict(c->self, out->refs, (uint32_t)out->n, out->pages) == 0;
    for (int i = 0; i < out->n && carried; i++)
        carried = out->refs[i].status == 0;
    if (carried)
        edm_outbox_done(g, out);
    else
        for (int i = 0; i < out->n; i++)
            out->refs[i].status = 1;
    pthread_mutex_lock(&g->mu);
    return carried;
}

// Taken for refused by the memory server, without asking it.
static void evictions_refuse(struct edm_engine *g, const struct edm_outbox *out) {
    for (int i = 0; i < out->n; i++)
        out->refs[i].status = 1;
    pthread_mutex_unlock(&g->mu);
    edm_outbox_done(g, out);
    pthread_mutex_lock(&g->mu);
}

static bool outbox_due(struct edm_engine *g) {
    if (!g->head)
        return false;
    return g->outbox_urgent || g->queued >= held_back(g) || (g->waiting.n && g->slots_used > g->nslots / 2) ||
           now_ns() - g->first_queued_ns > HELD_NS;
}

static void wait_until(pthread_cond_t *c, pthread_mutex_t *mu, uint64_t ns) {
    struct timespec t = {.tv_sec = (time_t)(ns / 1000000000u), .tv_nsec = (long)(ns % 1000000000u)};
    pthread_cond_timedwait(c, mu, &t);
}

int edm_outbox_poll(struct edm_engine *g, struct edm_outbox *out, int timeout_us) {
    uint64_t end = now_ns() + (uint64_t)timeout_us * 1000u;
    int result = 0;
    thread_home(g, &g->out_cpu);
    pthread_mutex_lock(&g->mu);
    for (;;) {
        outbox_skip(g);
        outbox_note_done(g);
        // Even at the end: what is queued goes out first (regions are dropped, the store is left tidy).
        if (atomic_load(&g->stop) && !g->head) {
            result = -ESHUTDOWN;
            break;
        }
        if (outbox_due(g) || (atomic_load(&g->stop) && g->head)) {
            struct outbox_item *o = ITEM(g, g->head);
            if (o->kind == EDM_OUT_EVICT) {
                outbox_fill_evictions(g, out);
                if (point_fails(POINT_evictions_taken, g->out_pages)) {
                    evictions_refuse(g, out);
                    continue;
                }
            } else {
                g->out_item[0] = outbox_take(g);
                g->out_n = 1;
                o->state = OB_SENT;
                *out = (struct edm_outbox){.kind = o->kind, .sequence = o->seq, .region = o->region};
                out->a = o->a;
                out->b = o->b;
                out->c = o->c;
            }
            point(POINT_outbox_taken);
            if (evict_here(g, out))
                continue;
            result = 1;
            break;
        }
        uint64_t now = now_ns();
        if (now >= end)
            break;
        uint64_t until = g->head && g->first_queued_ns + HELD_NS < end ? g->first_queued_ns + HELD_NS : end;
        wait_until(&g->outbox_wake, &g->mu, until);
    }
    pthread_mutex_unlock(&g->mu);
    return result;
}

// Back to the head of the queue, in their order.
static void outbox_return(struct edm_engine *g, const uint32_t *ids, uint32_t n) {
    for (uint32_t i = n; i-- > 0;) {
        struct outbox_item *o = ITEM(g, ids[i]);
        o->state = OB_QUEUED;
        o->next = g->head;
        g->head = ids[i];
        if (!g->tail)
            g->tail = ids[i];
        g->queued++;
    }
}

static void note_stored(const struct outbox_item *o) {
    struct lspt_entry *e = lspt_entry(&o->space->lspt, o->page);
    if (e && (e->state || e->flags))
        e->flags |= PF_STORED;
}

static void eviction_done(struct edm_engine *g, struct outbox_item *o) {
    struct space *s = o->space;
    struct leaf *l = lspt_leaf(&s->lspt, o->page);
    struct lspt_entry *e = l ? &l->e[o->page % LEAF_PAGES] : NULL;
    if (o->state == OB_SENT) {
        if (!e || e->state != PS_STAGED || ITEM(g, e->where) != o) {
            engine_error(g, "acknowledged page %#lx is not in the buffer", (unsigned long)o->page);
        } else {
            e->state = PS_REMOTE;
            e->where = 0;
            e->flags |= PF_STORED;
            entry_set_version(e, o->version);
            e->checksum = o->checksum;
            g->count.remote++;
        }
    } else if (e && (e->state || e->flags)) {
        // Cancelled in flight: rescued, or forgotten and its drop is queued behind. Either way the DMS has something.
        e->flags |= PF_STORED;
    }
    g->count.writes++;
    write_slot_put(g, o->slot);
}

// A page that was refused because it is not what left the program is given up here, or it would be refused for ever.
static bool damaged(struct edm_engine *g, const struct outbox_item *o) {
    struct lspt_entry *e = lspt_entry(&o->space->lspt, o->page);
    bool ours = e && e->state == PS_STAGED && ITEM(g, e->where) == o;
    return ours && !staged_intact(g, o) && staged_lost(g, o->space, o->page, e);
}

void edm_outbox_done(struct edm_engine *g, const struct edm_outbox *out) {
    uint32_t failed[EDM_OUTBOX_BATCH], nfailed = 0;
    pthread_mutex_lock(&g->mu);
    point(POINT_outbox_acknowledged);
    if (out->kind == EDM_OUT_EVICT && point_fails(POINT_evictions_acknowledged, NULL))
        for (uint32_t i = 0; i < g->out_n; i++)
            out->refs[i].status = 1;
    for (uint32_t i = 0; i < g->out_n; i++) {
        struct outbox_item *o = ITEM(g, g->out_item[i]);
        if (o->kind == EDM_OUT_EVICT && out->refs[i].status != 0) {
            g->count.write_failures++;
            note_stored(o);  // a refused page may have been kept all the same
            if (o->state == OB_SENT && !damaged(g, o)) {
                failed[nfailed++] = g->out_item[i];
                continue;
            }
            write_slot_put(g, o->slot);
        } else {
            acknowledged_note(g, o);
            if (o->kind == EDM_OUT_EVICT)
                eviction_done(g, o);
        }
        item_free(g, g->out_item[i]);
        point(POINT_outbox_half);
    }
    point(POINT_outbox_done);
    g->out_n = 0;
    outbox_return(g, failed, nfailed);
    outbox_note_done(g);
    if (g->head)
        g->first_queued_ns = now_ns();
    g->outbox_urgent = false;
    for (uint32_t id = g->head; id && !g->outbox_urgent; id = ITEM(g, id)->next)
        g->outbox_urgent = ITEM(g, id)->kind == EDM_OUT_CLONE || ITEM(g, id)->kind == EDM_OUT_MOVE;
    if (g->retry.n)
        engine_kick(g);
    pthread_mutex_unlock(&g->mu);
}

static int by_sequence(const void *a, const void *b, void *items) {
    const struct outbox_item *item = items;
    uint64_t x = item[*(const uint32_t *)a - 1].seq, y = item[*(const uint32_t *)b - 1].seq;
    return x < y ? -1 : x > y;
}

void outbox_again(struct edm_engine *g) {
    uint32_t n = 0, *ids = xcalloc(g->state->items + 1, sizeof *ids);
    g->nitems = g->state->items;
    g->seq = g->state->committed;
    state_settle(g);
    for (uint32_t id = g->nitems; id > 0; id--) {
        struct outbox_item *o = ITEM(g, id);
        if (o->state != OB_FREE && o->state != OB_CANCELLED_IN_FLIGHT && o->seq <= g->seq) {
            if (o->state == OB_SENT)
                o->state = OB_QUEUED;  // it may have arrived: the DMS takes no version and no sequence twice
            ids[n++] = id;
            continue;
        }
        o->state = OB_FREE;
        o->next = g->free_item;
        g->free_item = id;
    }
    qsort_r(ids, n, sizeof *ids, by_sequence, g->item);
    g->done_seq = n ? ITEM(g, ids[0])->seq - 1 : g->seq;
    for (uint32_t i = 0; i < n; i++) {
        struct outbox_item *o = ITEM(g, ids[i]);
        o->space = NULL;
        o->page = o->a;
        o->next = i + 1 < n ? ids[i + 1] : 0;
        if (o->kind == EDM_OUT_EVICT && !g->slot[o->slot].refs++)
            g->slots_used++;
    }
    g->head = n ? ids[0] : 0;
    g->tail = n ? ids[n - 1] : 0;
    g->queued = n;
    g->outbox_urgent = n > 0;
    free(ids);
}
