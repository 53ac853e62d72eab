// What a program told the kernel with madvise(2), as libedm_app.so noted it. Hints: nothing goes wrong without them,
// and the program could have written anything there.
#include <sys/mman.h>

#include "engine.h"

#ifndef MADV_COLD
#define MADV_COLD 20
#define MADV_PAGEOUT 21
#endif
#define BRING_AT_ONCE 512  // pages

static void leaves_cold(struct edm_engine *g, struct space *s, uint64_t a, uint64_t b, bool out) {
    struct leaf *l;
    for (uint64_t at = a; (l = lspt_next(&s->lspt, at)) && l->base < b; at = l->base + LEAF_PAGES) {
        if (!l->listed || l->base + LEAF_PAGES <= a)
            continue;
        leaf_cold(g, l);
        if (out)
            g->page_out += (uint64_t)__builtin_popcountll(l->resident);
    }
    if (out)
        pthread_cond_signal(&g->lpet_wake);
}

// The kernel's readings: RANDOM and SEQUENTIAL exclude each other, NORMAL takes both back.
static void hint_follow(struct edm_engine *g, struct space *s, uint64_t a, uint64_t b, int advice) {
    switch (advice) {
    case MADV_NORMAL:
    case MADV_RANDOM:
    case MADV_SEQUENTIAL:
        ranges_del(&s->random, a, b);
        ranges_del(&s->sequential, a, b);
        if (advice != MADV_NORMAL)
            ranges_add(advice == MADV_RANDOM ? &s->random : &s->sequential, a, b);
        break;
    case MADV_WILLNEED:
        s->needed = (struct range){a, b};
        s->needed_most = g->limit ? g->limit / 2 : b - a;
        break;
    case MADV_COLD:
    case MADV_PAGEOUT:
        leaves_cold(g, s, a, b, advice == MADV_PAGEOUT);
        break;
    default:
        return;
    }
    g->count.hints++;
}

// What leaves may not be captured yet: there is nothing of it to make cold before a sweep.
static bool before_its_sweep(struct space *s, uint64_t a, uint64_t b, int advice) {
    uint64_t e;
    return (advice == MADV_COLD || advice == MADV_PAGEOUT) && ranges_gap(&s->known, &a, b, &e);
}

static void hints_read(struct edm_engine *g, struct space *s, uint32_t next, bool swept) {
    if (next - s->hints_seen > EDM_HINTS)
        s->hints_seen = next - EDM_HINTS;  // written over
    for (; s->hints_seen != next; s->hints_seen++) {
        const struct edm_hint *from = &s->ctl->hint[s->hints_seen % EDM_HINTS];
        if (__atomic_load_n(&from->number, __ATOMIC_ACQUIRE) != s->hints_seen + 1)
            continue;  // being written, or over
        struct edm_hint h = *from;
        uint64_t a = h.address >> PAGE_SHIFT, n = (h.bytes >> PAGE_SHIFT) + (h.bytes % PAGE_SIZE_ != 0);
        if (a >= LSPT_MAX_PAGE || n > LSPT_MAX_PAGE - a)
            continue;
        if (!swept && before_its_sweep(s, a, a + n, h.advice)) {
            s->sweep_soon = true;
            return;
        }
        hint_follow(g, s, a, a + n, h.advice);
    }
}

// Some of what the program said it will need; more with the next sweep, as the LPET makes room.
static void bring(struct edm_engine *g, struct space *s) {
    uint64_t used = local_pages(g) + g->ready.n, most = BRING_AT_ONCE;
    if (g->limit)
        most = used < local_most(g) && !g->waiting.n ? (local_most(g) - used) / 2 : 0;
    most = most < s->needed_most ? most : s->needed_most;
    most = most < BRING_AT_ONCE ? most : BRING_AT_ONCE;
    uint64_t n = 0, at = s->needed.a;
    for (struct leaf *l; n < most && at < s->needed.b && (l = lspt_next(&s->lspt, at)) && l->base < s->needed.b;) {
        uint64_t end = l->base + LEAF_PAGES < s->needed.b ? l->base + LEAF_PAGES : s->needed.b;
        for (at = at > l->base ? at : l->base; at < end && n < most; at++) {
            enum page_state state = (enum page_state)l->e[at % LEAF_PAGES].state;
            if (state != PS_REMOTE && state != PS_STAGED)
                continue;
            queue_push(&g->ready, s, at, FAULT_AHEAD);
            n++;
        }
    }
    s->needed.a = at;
    s->needed_most -= n;
    if (n < most || !s->needed_most || at >= s->needed.b)
        s->needed = (struct range){0};
    g->count.hinted += n;
    if (n)
        engine_kick(g);
}

uint32_t hints_given(const struct space *s) {
    return s->ctl ? __atomic_load_n(&s->ctl->hint_next, __ATOMIC_ACQUIRE) : 0;
}

void hints_look(struct edm_engine *g, struct space *s, uint32_t given, bool swept) {
    if (!s->ctl || s->applying || s->dead)
        return;
    if (given != s->hints_seen)
        hints_read(g, s, given, swept);
    if (s->needed.b)
        bring(g, s);
}

void hints_forget(struct space *s, uint64_t a, uint64_t b) {
    ranges_del(&s->random, a, b);
    ranges_del(&s->sequential, a, b);
}

static void copied(const struct ranges *from, struct ranges *to) {
    for (uint32_t i = 0; i < from->n; i++)
        ranges_add(to, from->v[i].a, from->v[i].b);
}

void hints_fork(const struct space *parent, struct space *child) {
    copied(&parent->random, &child->random);
    copied(&parent->sequential, &child->sequential);
}
