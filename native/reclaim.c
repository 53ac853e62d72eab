// The LPET: when more pages are resident than the high threshold allows, cold ones leave until the low one. Coldness is
// the policy's to say (policy.c), of 256 KiB leaves; a leaf's pages leave together, in runs, since a scattered page of
// a busy program costs an order of magnitude more than one in a run.
#include "engine.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <unistd.h>

#define SCAN_LEAVES 512    // leaves looked at for one batch
#define REST_NS 20000000u  // unless it is woken
#define ROUND_NS 500000u   // … while it does not get on
#define STUCK_NS 2000000u  // then faults are let in, one a round

static uint64_t at_most(uint64_t x, uint64_t most) { return x < most ? x : most; }
static uint64_t at_least(uint64_t x, uint64_t least) { return x > least ? x : least; }

// limit: faults wait above it. The pages of one batch sit in staging for a moment, so they come off the budget.
void budget_set(struct edm_engine *g) {
    const struct edm_engine_config *c = &g->cfg;
    uint64_t budget = c->local_pages ? c->local_pages : c->high_pages ? c->high_pages + EDM_BATCH_PAGES : 0;
    if (!budget) {
        g->batch_pages = EDM_BATCH_PAGES;
        return;
    }
    g->batch_pages = at_least(at_most(EDM_BATCH_PAGES, budget / 16), 1);
    g->limit = at_least(budget - at_most(g->batch_pages, budget - 1), 1);
    uint64_t below = at_most(at_least(g->limit / 32, 1), 512);
    g->high = c->high_pages ? at_most(c->high_pages, g->limit) : at_least(g->limit - below, 1);
    uint64_t step = at_most(at_least(g->high / 16, 1), 1024);
    g->low = c->low_pages ? at_most(c->low_pages, g->high) : g->high - at_most(step, g->high);
}

// Bits of the leaf's pages that lie in r.
static uint64_t ranges_mask(const struct ranges *r, uint64_t base) {
    uint64_t mask = ~0ull, a = base, e;
    while (ranges_gap(r, &a, base + LEAF_PAGES, &e)) {
        for (; a < e; a++)
            mask &= ~(1ull << (a - base));
    }
    return mask;
}

static uint64_t recent_mask(const struct edm_engine *g, const struct leaf *l) {
    uint64_t mask = 0;
    uint64_t n = at_most(RECENT_FAULTS, g->low / 2);
    for (uint32_t i = 1; i <= n && i <= g->recent_at; i++) {
        uint32_t k = (g->recent_at - i) % RECENT_FAULTS;
        if (g->recent[k].space == l->space && g->recent[k].page / LEAF_PAGES == l->base / LEAF_PAGES)
            mask |= 1ull << (g->recent[k].page % LEAF_PAGES);
    }
    return mask;
}

// Pages that may leave, and in *pass those that are not there: one move may reach across them.
static uint64_t evictable(struct edm_engine *g, struct leaf *l, const struct ranges *excluded, uint64_t *pass) {
    *pass = 0;
    uint64_t mask = l->resident & ~refused_lately(l) & ~recent_mask(g, l);
    if (!mask)
        return 0;
    uint64_t inside = ranges_mask(&l->space->known, l->base);
    if (excluded->n)
        inside &= ~ranges_mask(excluded, l->base);
    if (inside && l->space->stack_tops.n)
        inside &= ~ranges_mask(&l->space->stack_tops, l->base);
    if (inside && l->space->exits.n)
        inside &= ~ranges_mask(&l->space->exits, l->base);
    if (inside && l->space->given.n)
        inside &= ~ranges_mask(&l->space->given, l->base);
    if (inside && l->space->wanted.n)
        inside &= ~ranges_mask(&l->space->wanted, l->base);
    *pass = inside & ~l->resident;
    if (*pass && l->space->removed.n)
        *pass &= ~ranges_mask(&l->space->removed, l->base);
    return mask & inside;
}

bool can_move_out(const struct space *s) {
    return s->ready && !s->dead && !s->applying && !s->batch_busy && !s->late && !s->staging_touched && !space_whole(s);
}

// Keep the first `most` pages of a mask.
static uint64_t first_bits(uint64_t mask, uint64_t most) {
    uint64_t out = 0;
    for (; mask && most; most--) {
        out |= mask & -mask;
        mask &= mask - 1;
    }
    return out;
}

void batch_choose(struct move_batch *b, struct leaf *l, uint64_t mask, uint64_t pass) {
    struct move_window *w = &b->w[b->n++];
    *w = (struct move_window){.leaf = l, .base = l->base, .mask = mask, .pass = pass};
    for (uint64_t m = mask; m; m &= m - 1) {
        int i = __builtin_ctzll(m);
        if (l->e[i].flags & PF_CLEAN)
            w->clean |= 1ull << i;
        l->e[i].state = PS_EVICTING;
    }
}

// What select_batch has so far. `space`: of the batch; NULL while nothing was chosen.
struct selection {
    struct move_batch *batch;
    struct space *space;
    struct ranges excluded;  // of that space, or of the one that was looked at last
    uint64_t most;
    uint32_t scanned;
};

// Whether the leaf was worth looking at where it stands; else it goes behind the others.
static bool select_leaf(struct edm_engine *g, struct selection *c, struct leaf *l) {
    if (c->space && l->space != c->space)
        return true;
    if (!can_move_out(l->space))
        return false;
    if (!c->space && l->space->pid > 0) {
        ranges_free(&c->excluded);
        exits_look(l->space, &c->excluded);
    }
    uint64_t pass, mask = first_bits(evictable(g, l, &c->excluded, &pass), c->most);
    if (space_merges(l->space))
        mask = merging_unprotect(l, mask);
    if (!mask)
        return false;
    if (!leaf_may_leave(g, l))
        return true;
    c->space = l->space;
    batch_choose(c->batch, l, mask, pass);
    c->most -= (uint64_t)__builtin_popcountll(mask);
    return true;
}

// Each leaf of the queue at most once, though leaves go to its end meanwhile.
static void select_queue(struct edm_engine *g, struct selection *c, const struct leaf_queue *q) {
    struct leaf *end = q->hottest, *next;
    for (struct leaf *l = q->coldest; l; l = next) {
        bool last = l == end;
        next = l->newer;
        if (c->scanned++ == SCAN_LEAVES || c->batch->n == EDM_WINDOWS || !c->most)
            return;
        if (!select_leaf(g, c, l) && !last)
            leaf_pass(g, l);
        if (last)
            return;
    }
}

// Up to `most` of the coldest pages, all of one space.
static struct space *select_batch(struct edm_engine *g, struct move_batch *b, uint64_t most) {
    struct selection c = {.batch = b, .most = most};
    for (uint32_t i = 0; i < EDM_POLICY_QUEUES; i++)
        select_queue(g, &c, &g->queue[i]);
    ranges_free(&c.excluded);
    return c.space;
}

// Wait until what the last batches left in staging is gone. No batch is under way meanwhile: the fault workers, which
// have to read of it, never wait for this.
static void settle(struct edm_engine *g) {
    for (uint32_t i = 0; i < g->nspaces; i++) {
        struct space *s = g->space[i];
        if (!s->dead && s->ready && s->staging_touched && !s->dropping) {
            s->staging_touched = false;
            s->ops->drop_out(s, EDM_WINDOWS);
        }
        if (!s->dropping || s->dead)
            continue;
        s->dropping = false;
        s->draining = true;
        s->refs++;
        pthread_mutex_unlock(&g->mu);
        s->ops->settle(s);
        pthread_mutex_lock(&g->mu);
        s->draining = false;
        pthread_cond_broadcast(&s->idle);
        space_unref(s);
        i = (uint32_t)-1;  // the table may have changed
    }
}

// One batch; returns pages freed.
static uint64_t reclaim_once(struct edm_engine *g, uint64_t want) {
    struct move_batch *b = g->batch;
    thread_home(g, &g->lpet_cpu);
    settle(g);
    b->n = 0;
    uint64_t most = at_most(g->batch_pages, g->nslots - g->slots_used);
    struct space *s = foreign_select(g, b, most);
    if (!s && want)
        s = select_batch(g, b, at_most(want, most));
    return s ? batch_carry_out(g, s, b) : 0;
}

// Faults that waited for room, as far as there is room.
static void admit(struct edm_engine *g, uint32_t at_all_costs) {
    struct fault f;
    uint32_t n = g->waiting.n;
    while (n-- > 0 && (at_all_costs || local_pages(g) < local_most(g)) && queue_pop(&g->waiting, &f)) {
        if (local_pages(g) >= local_most(g)) {
            at_all_costs--;
            g->grace++;
        }
        if (f.space->applying && !f.space->dead)
            queue_fault(&g->waiting, f);
        else
            fault_take(g, -1, f);
        space_unref(f.space);
    }
    if (local_pages(g) < local_most(g))
        g->grace = 0;
}

static void lpet_sleep(struct edm_engine *g, uint64_t ns) {
    uint64_t until = now_ns() + ns;
    struct timespec t = {.tv_sec = (time_t)(until / 1000000000u), .tv_nsec = (long)(until % 1000000000u)};
    pthread_cond_timedwait(&g->lpet_wake, &g->mu, &t);
}

void *lpet_thread(void *engine) {
    struct edm_engine *g = engine;
    prctl(PR_SET_NAME, "edm-lpet", 0, 0, 0);
    uint64_t stuck_since = 0;  // nothing has left since
    bool evicting = false;
    pthread_mutex_lock(&g->mu);
    while (!atomic_load(&g->stop)) {
        idle_rest(g);
        uint64_t used = local_pages(g), low = g->low + refused_over(g), refused = g->count.move_refused;
        if (g->high && (used > g->high + refused_over(g) || g->waiting.n))
            evicting = true;
        if (used <= low && !g->waiting.n)
            evicting = false;
        if (!evicting && !g->page_out && !foreign_waits(g)) {
            lpet_sleep(g, REST_NS);
            continue;
        }
        bool full = g->slots_used >= g->nslots;
        uint64_t want = at_least(evicting && used > low ? used - low : 0, g->page_out);
        g->reclaim_round++;
        uint64_t freed = full ? 0 : reclaim_once(g, at_least(want, at_most(g->waiting.n, g->batch_pages)));
        if (!full)
            g->page_out = freed ? g->page_out - at_most(freed, g->page_out) : 0;
        admit(g, 0);
        if (freed) {
            stuck_since = 0;
            continue;
        }
        // A full buffer means a slow memory server: faults wait for it. Otherwise nothing can leave (pinned, locked,
        // mid-move): let a fault through rather than hang the program. What has just been found not to move is left
        // alone from now on, and others may.
        uint64_t now = now_ns();
        if (full || !stuck_since)
            stuck_since = now;
        bool stuck = now - stuck_since >= STUCK_NS;
        if (stuck && g->waiting.n) {
            admit(g, 1);
            stuck_since = now - STUCK_NS + ROUND_NS;
        }
        if (g->count.move_refused != refused)
            continue;
        g->slot_wanted = full;
        lpet_sleep(g, stuck && !g->waiting.n ? REST_NS : ROUND_NS);
        g->slot_wanted = false;
    }
    pthread_mutex_unlock(&g->mu);
    return NULL;
}
