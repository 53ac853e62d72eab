// Bringing pages before they are asked for: what a stream of faults will want next is fetched with its fault in one
// message and installed in one call; new pages are filled the same way. Only within the budget.
#include "engine.h"

// How many pages may come: never into what waiting faults need, and never at the price of a page that is in use.
static uint32_t room_ahead(const struct edm_engine *g) {
    uint64_t used = local_pages(g) + 1, limit = local_most(g);
    if (g->waiting.n || (limit && used >= limit))
        return 0;
    return limit && limit - used < MAX_FETCH ? (uint32_t)(limit - used) : MAX_FETCH;
}

static struct stream *stream_of(struct edm_engine *g, struct fault f) {
    if (!g->cfg.ahead_pages || !f.thread || f.space->late ||
        ranges_has(&f.space->random, f.page))  // with events to come that may rename what lies ahead
        return NULL;
    struct streams *t = &f.space->streams;
    uint64_t brought = t->total_brought, useful = t->total_useful;
    struct stream *st = stream_fault(t, f.thread, f.page);
    if (ranges_has(&f.space->sequential, f.page)) {
        st->stride = st->stride ? st->stride : 1;
        st->window = g->cfg.ahead_pages;
    }
    if (st->window > g->cfg.ahead_pages)
        st->window = g->cfg.ahead_pages;
    g->count.ahead += t->total_brought - brought;
    g->count.ahead_useful += t->total_useful - useful;
    return st->stride ? st : NULL;
}

// The fault itself is the last of the worker's batch already.
void ahead_fetch(struct edm_engine *g, struct worker *w, struct fault f) {
    struct stream *st = stream_of(g, f);
    if (!st)
        return;
    uint64_t found[MAX_FETCH], page = f.page, last = f.page;
    uint32_t n = 0, most = MAX_FETCH - w->n, room = room_ahead(g);
    if (most > room)
        most = room;
    for (uint32_t looked = 0; n < st->window && n < most && looked < 2 * MAX_FETCH; looked++) {
        page += (uint64_t)st->stride;
        struct leaf *l = lspt_leaf(&f.space->lspt, page);
        if (!l || l->moving)
            break;
        enum page_state state = (enum page_state)l->e[page % LEAF_PAGES].state;
        if (state != PS_REMOTE && state != PS_RESIDENT && state != PS_FETCHING)
            break;
        last = page;
        if (state == PS_REMOTE)
            found[n++] = page;
    }
    // In the order of their addresses, for one copy to install them.
    uint32_t flags = FAULT_AHEAD | (f.flags & UFFD_PAGEFAULT_FLAG_WRITE);
    bool protect = g->fetch[w->slot[w->n - 1]].protect;
    for (uint32_t i = 0; i < n; i++) {
        uint64_t at = st->stride < 0 ? found[n - 1 - i] : found[i];
        if (!fetch_ask(g, w, f.space, at, lspt_entry(&f.space->lspt, at), flags, protect))
            engine_error(g, "no place to fetch page %#lx", (unsigned long)at);  // there is one for each of a batch
    }
    if (protect)
        f.space->protects += n;
    stream_brought(st, n, last);
}

static uint64_t known_until(const struct ranges *known, uint64_t page, uint64_t most) {
    uint64_t a = page, e;
    return ranges_gap(known, &a, most, &e) ? a : most;
}

static bool fillable(struct space *s, uint64_t page) {
    struct leaf *l = lspt_leaf(&s->lspt, page);
    if (!l)
        return true;
    enum page_state state = (enum page_state)l->e[page % LEAF_PAGES].state;
    return !l->moving && state_new(state) && !ranges_has(&s->removed, page);
}

// A stream over pages that are new: they are zeros, and a writer gets them with memory behind them, or each would fault
// once more in the kernel.
void ahead_fill(struct edm_engine *g, struct fault f) {
    struct stream *st = space_own_uffd(f.space) ? NULL : stream_of(g, f);
    if (!st || (st->stride != 1 && st->stride != -1))
        return;
    struct space *s = f.space;
    uint64_t end = st->stride > 0 ? known_until(&s->known, f.page + 1, f.page + 1 + st->window) : f.page;
    uint32_t n = 0;
    if (st->stride > 0)
        while (f.page + 1 + n < end && fillable(s, f.page + 1 + n))
            n++;
    else
        while (n < st->window && f.page > n && ranges_has(&s->known, f.page - n - 1) && fillable(s, f.page - n - 1))
            n++;
    uint32_t room = room_ahead(g);
    n = n < room ? n : room;
    if (!n)
        return;
    n = guards_until(s, st->stride > 0 ? f.page + 1 : f.page - n, n, st->stride < 0);
    if (!n)
        return;
    uint64_t from = st->stride > 0 ? f.page + 1 : f.page - n;
    bool write = f.flags & UFFD_PAGEFAULT_FLAG_WRITE && !guards_hidden();
    int done = write ? s->ops->copy(s, from, n, g->zeros, false) : s->ops->zero(s, from, n);
    if (done < 0)
        return;  // something is there already, or an event is on its way: each will fault for itself
    for (uint32_t i = 0; i < (uint32_t)done; i++) {
        struct leaf *l = lspt_leaf_make(&s->lspt, s, from + i);
        struct lspt_entry *e = &l->e[(from + i) % LEAF_PAGES];
        e->flags = e->state == PS_NEW ? PF_AHEAD : 0;
        entry_resident(s, l, e, from + i);
    }
    g->count.zero_fills += (uint64_t)done;
    if ((uint32_t)done == n)
        stream_brought(st, n, f.page + (uint64_t)(st->stride * (int64_t)n));
}
