// One batch of the LPET: pages move to staging, are read into the write-back buffer, and the table follows. The
// engine's lock is let go while the kernel works; the leaves concerned are marked, and what faults in them waits.
#include "engine.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "crc32c.h"

// What a batch may bring: the pages asked for, and those that had come between them meanwhile.
#define MOST_READ (EDM_WINDOWS * LEAF_PAGES)

struct move_batch *batch_new(void) {
    struct move_batch *b = calloc(1, sizeof *b);
    if (!b)
        return NULL;
    b->into = calloc(MOST_READ, sizeof *b->into);
    b->slot = calloc(MOST_READ, sizeof *b->slot);
    b->check = calloc(MOST_READ, sizeof *b->check);
    if (b->into && b->slot && b->check)
        return b;
    batch_free(b);
    return NULL;
}

void batch_free(struct move_batch *b) {
    if (!b)
        return;
    free(b->into);
    free(b->slot);
    free(b->check);
    free(b);
}

bool page_is_zero(const uint8_t *page) { return page[0] == 0 && memcmp(page, page + 1, PAGE_SIZE_ - 1) == 0; }

// A place in the write-back buffer for each page that must be read. There is room, as the batch was not larger than it;
// what had come between the pages asked for may go beyond it.
static void slots_reserve(struct edm_engine *g, struct move_batch *b) {
    b->nread = 0;
    for (uint32_t k = 0; k < b->n; k++)
        for (uint64_t m = move_to_read(&b->w[k]); m; m &= m - 1) {
            int slot = write_slot_get(g);
            while (slot < 0 && (slot = write_slot_spare(g)) < 0) {
                pthread_cond_signal(&g->outbox_wake);
                g->slot_wanted = true;
                pthread_cond_wait(&g->lpet_wake, &g->mu);
                g->slot_wanted = false;
            }
            b->slot[b->nread] = (uint32_t)slot;
            b->into[b->nread++] = write_slot_data(g, (uint32_t)slot);
        }
}

static void forget_clean(struct edm_engine *g, struct lspt_entry *e) {
    e->state = PS_REMOTE;
    e->flags = PF_STORED;
    g->count.remote++;
    g->count.evicted_clean++;
}

// A page has left the program: it stays in the write-back buffer until the DMS has it, unless there is nothing to
// store.
static void stage(struct edm_engine *g, struct leaf *l, int i, uint32_t slot, uint32_t checksum) {
    struct lspt_entry *e = &l->e[i];
    uint8_t stored = e->flags & PF_STORED;
    if (!stored && !space_asks(l->space) && page_is_zero(write_slot_data(g, slot))) {
        write_slot_put(g, slot);
        e->state = e->flags & PF_AHEAD ? PS_NEW : PS_ZERO;
        e->flags = 0;
        g->count.evicted_zero++;
        return;
    }
    uint32_t id = outbox_push(g, EDM_OUT_EVICT, l->space);
    struct outbox_item *o = outbox_item_at(g, id);
    o->page = o->a = l->base + (uint64_t)i;
    o->version = ++g->state->page_version;
    o->checksum = checksum;
    o->slot = slot;
    e->state = PS_STAGED;
    e->where = id;
    e->flags = stored;
}

// A page that did not move. Where all that could move did, one that was not refused is not there: it had come after a
// REMOVE event and before what that told of, and went with it.
static void stays(struct leaf *l, struct move_window *w, int i, bool all) {
    struct lspt_entry *e = &l->e[i];
    uint64_t bit = 1ull << i;
    if (all && !(w->busy & bit)) {
        // Zeros from now on: with its version, and stored as it may be, the DMS could be asked for what it was.
        bool stored = e->flags & PF_STORED;
        entry_leave(l, e);
        memset(e, 0, sizeof *e);
        if (stored)
            space_drop_stored(l->space, l->base + (uint64_t)i, 1);
        return;
    }
    e->state = PS_RESIDENT;
    if ((w->busy & w->clean & bit) && l->space->ops->unprotect(l->space, l->base + (uint64_t)i) == 0) {
        // Shared since a fork, and write-protected: as a dirty page it can be unshared and moved next time.
        e->flags &= ~PF_CLEAN;
        w->busy &= ~bit;
    }
}

static void faults_resume(struct edm_engine *g, struct leaf *l, uint64_t waited, uint64_t writers) {
    for (; waited; waited &= waited - 1) {
        int i = __builtin_ctzll(waited);
        uint32_t flags = writers & 1ull << i ? UFFD_PAGEFAULT_FLAG_WRITE : 0;
        if (l->e[i].state == PS_RESIDENT)
            flags |= UFFD_PAGEFAULT_FLAG_WP;
        fault_take(g, -1, (struct fault){l->space, l->base + (uint64_t)i, flags, 0});
    }
}

static uint64_t window_apply(struct edm_engine *g, struct move_batch *b, uint32_t k, bool all, uint32_t *read) {
    struct move_window *w = &b->w[k];
    struct leaf *l = w->leaf;
    w->waited = w->writers = 0;
    for (int i = 0; i < LEAF_PAGES; i++) {
        uint64_t bit = 1ull << i;
        struct lspt_entry *e = &l->e[i];
        if (e->flags & PF_WAITED)
            w->waited |= bit;
        if (e->flags & PF_WRITER)
            w->writers |= bit;
        e->flags &= ~(PF_WAITED | PF_WRITER);
        if (w->moved & bit) {
            if (e->state != PS_EVICTING && e->state != PS_RESIDENT && !state_new((enum page_state)e->state))
                engine_error(g, "page %#lx moved out in state %d", (unsigned long)(l->base + (uint64_t)i),
                             (int)e->state);
            entry_leave(l, e);
            leaf_left(g, l);
            g->count.evictions++;
            e->where = 0;
            if (w->clean & bit) {
                forget_clean(g, e);
            } else {
                stage(g, l, i, b->slot[*read], b->check[*read]);
                ++*read;
            }
        } else if (w->mask & bit) {
            stays(l, w, i, all);
        }
    }
    if (w->busy & w->mask)
        refused_note(g, l, w->busy & w->mask);
    l->moving = false;
    if (!l->resident)
        leaf_unlist(g, l);
    return (uint64_t)__builtin_popcountll(w->moved);
}

// From here on what lies in staging is the only copy of its pages …
static void batch_begins(struct space *s, const struct move_batch *b) {
    struct state_space *t = s->state;
    for (uint32_t k = 0; k < b->n; k++)
        t->window[k] = (struct state_window){b->w[k].base, b->w[k].clean};
    t->windows = b->n;
    t->moved_from = NOT_YET;
    STATE_BARRIER();
    t->moving = 1;
}

// … until all of them are in the outbox, at once. Only then may any of them go back to the program.
static uint64_t batch_apply(struct edm_engine *g, struct space *s, struct move_batch *b, bool all) {
    uint64_t freed = 0;
    uint32_t read = 0;
    s->state->moved_from = g->seq;
    STATE_BARRIER();
    for (uint32_t k = 0; k < b->n; k++) {
        freed += window_apply(g, b, k, all, &read);
        point(POINT_batch_half);
    }
    point(POINT_batch_applied);
    state_commit(g);
    point(POINT_batch_committed);
    s->state->moving = 0;
    point(POINT_batch_over);
    for (uint32_t k = 0; k < b->n; k++)
        faults_resume(g, b->w[k].leaf, b->w[k].waited, b->w[k].writers);
    return freed;
}

// Move the batch out of its space; returns pages freed. Called and left with the lock held.
uint64_t batch_carry_out(struct edm_engine *g, struct space *s, struct move_batch *b) {
    s->batch_busy = true;
    b->generation = s->generation;
    s->refs++;
    for (uint32_t k = 0; k < b->n; k++)
        b->w[k].leaf->moving = true;
    batch_begins(s, b);
    pthread_mutex_unlock(&g->mu);
    int r = point_fails(POINT_batch_begun, NULL) ? -ENOMEM : s->ops->move_out(s, b);
    point(POINT_batch_moved);
    pthread_mutex_lock(&g->mu);
    if (r == -EAGAIN)
        g->count.move_again++;
    slots_reserve(g, b);
    pthread_mutex_unlock(&g->mu);
    if (b->nread)
        s->ops->read_out(s, b);
    point(POINT_batch_read);
    for (uint32_t i = 0; i < b->nread; i++)
        b->check[i] = edm_crc32c(b->into[i], PAGE_SIZE_);
    if (b->nread)
        point_fails(POINT_batch_summed, b->into[0]);
    pthread_mutex_lock(&g->mu);
    uint64_t freed = batch_apply(g, s, b, r == 0);
    s->batch_busy = false;
    if (freed)
        s->ops->drop_out(s, b->n);
    point(POINT_staging_dropped);
    pthread_cond_broadcast(&s->idle);
    space_unref(s);
    return freed;
}
