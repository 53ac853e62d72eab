// Memory that grows is registered in steps, and the steps are to become one mapping again. A mapping that was touched
// before it was registered has an anon_vma of its own, and never merges with a registered neighbour: registered at each
// look, a heap would lie in one mapping a look. So a part of the program's memory may wait; it counts against the
// budget. New memory merges with what waits beside it, and shares its anon_vma, as it does without EDM; when the part
// is reached, what has come since the last look waits on and the rest, of the same anon_vma, merges with what was
// registered before. Source: mm/vma.c is_mergeable_anon_vma, mm/rmap.c anon_vma_compatible.
#include <sys/ioctl.h>

#include "engine.h"
#include "pagemap_abi.h"

#define PART 64        // of a program's memory may wait,
#define LOCAL_PART 16  // and of the budget, together with what waits of other programs;
#define YOUNG_PART 40  // these parts of what has come since the last look, until the next one
#define YOUNG_LOCAL_PART 8
#define LEAST_SPLIT 64  // pages that may wait, for a mapping to be registered in part, or for any of a budget to wait

static uint64_t may_wait(const struct space *s, uint64_t part, uint64_t local_part) {
    const struct edm_engine *g = s->engine;
    uint64_t known = s->lspt.leaves * LEAF_PAGES / part, others = g->put_off - s->put_off;
    if (s->asks || g->user_mode || (g->limit && g->limit / LOCAL_PART < LEAST_SPLIT))
        return 0;
    uint64_t local = g->limit / local_part > others ? g->limit / local_part - others : 0;
    return g->limit && local < known ? local : known;
}

static void now_waiting(struct space *s, struct ranges waiting) {
    struct edm_engine *g = s->engine;
    ranges_free(&s->waiting);
    s->waiting = waiting;
    g->put_off -= s->put_off;
    s->put_off = 0;
    for (uint32_t i = 0; i < waiting.n; i++)
        s->put_off += waiting.v[i].b - waiting.v[i].a;
    g->put_off += s->put_off;
    if (g->high && local_pages(g) > g->high)
        pthread_cond_signal(&g->lpet_wake);
}

// Whether a page of some was written to, so that their mapping has an anon_vma.
static bool written(const struct space *s, uint64_t a, uint64_t b) {
    struct page_region found;
    struct pm_scan_arg arg = {.size = sizeof arg,
                              .start = a << PAGE_SHIFT,
                              .end = b << PAGE_SHIFT,
                              .vec = (uint64_t)(uintptr_t)&found,
                              .vec_len = 1,
                              .max_pages = 1,
                              .category_inverted = PAGE_IS_PFNZERO,
                              .category_mask = PAGE_IS_PRESENT | PAGE_IS_PFNZERO,
                              .return_mask = PAGE_IS_PRESENT};
    return ioctl(s->pagemap_fd, PAGEMAP_SCAN, &arg) == 1;
}

// What has come to a stretch since the last look, empty where that is not known. A mapping is only cut where one call
// of the program ended and the next began: a mremap(2) of memory on both sides of the cut would fail. So heaps of
// brk(2), that grow up, and mappings that grow down, which none does in place. Source: mremap(2).
static struct range young(const struct space *s, const struct stretch *t) {
    const struct range *was = ranges_at(&s->waiting, t->heap ? t->a : t->b - 1);
    if (!was && !ranges_touch(&s->waiting, t->a, t->b))
        return (struct range){t->a, t->b};
    if (was && t->heap && was->a == t->a && was->b < t->b && written(s, was->a, was->b))
        return (struct range){was->b, t->b};
    if (was && !t->heap && was->b == t->b && was->a > t->a && ranges_has(&s->known, t->b) && written(s, was->a, was->b))
        return (struct range){t->a, was->a};
    return (struct range){t->a, t->a};
}

void growth_put_off(struct space *s, struct unregistered *u) {
    struct ranges waiting = {0};
    uint64_t all = 0, since = 0;
    uint64_t most = may_wait(s, PART, LOCAL_PART), young_most = may_wait(s, YOUNG_PART, YOUNG_LOCAL_PART);
    for (uint32_t i = 0; i < u->n; i++)
        all += u->v[i].foreign ? 0 : u->v[i].b - u->v[i].a;
    for (uint32_t i = 0; i < u->n && all > most; i++) {
        if (u->v[i].foreign)
            continue;
        struct range r = young(s, &u->v[i]);
        since += r.b - r.a;
    }
    bool split = since <= young_most && young_most >= LEAST_SPLIT;
    for (uint32_t i = 0; i < u->n; i++) {
        struct stretch *t = &u->v[i];
        if (t->foreign)  // tried at each look
            continue;
        struct range r = {t->a, all <= most ? t->b : t->a};
        if (all > most && split)
            r = young(s, t);
        if (r.a == r.b)
            continue;
        s->engine->count.growth_cuts += r.a > t->a || r.b < t->b;
        ranges_append(&waiting, r.a, r.b);
        if (r.a == t->a)
            t->a = r.b;
        else
            t->b = r.a;
    }
    now_waiting(s, waiting);
}
