// Spaces: one captured address space each, with its LSPT. Making, forking and retiring them, and the changes an
// address-space event makes to a table. All with the engine's lock held.
#include "engine.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

static struct space *space_alloc(struct edm_engine *g, const struct source_ops *ops) {
    struct space *s = xcalloc(1, sizeof *s);
    s->engine = g;
    s->ops = ops;
    s->refs = 1;
    s->sidecar_cpu = -1;
    s->uffd = s->ctl_fd = s->pidfd = s->sidecar_fd = s->pagemap_fd = s->statm_fd = s->ksm_fd = s->mem_fd = -1;
    pthread_condattr_t mono;
    pthread_condattr_init(&mono);
    pthread_condattr_setclock(&mono, CLOCK_MONOTONIC);
    pthread_cond_init(&s->idle, &mono);
    pthread_condattr_destroy(&mono);
    if (g->nspaces == g->cap_spaces) {
        g->cap_spaces = g->cap_spaces ? g->cap_spaces * 2 : 16;
        g->space = xrealloc(g->space, g->cap_spaces * sizeof(struct space *));
    }
    g->space[g->nspaces++] = s;
    g->count.processes++;
    return s;
}

// With a region and an entry in the segment; the outbox item that makes it valid is the caller's to push.
static struct space *space_named(struct edm_engine *g, const struct source_ops *ops) {
    struct space *s = space_alloc(g, ops);
    s->state = state_space_new(g);
    if (!s->state)
        abort();  // 65536 programs at once: as out of memory
    s->region = s->state->region = (uint64_t)g->instance << 32 | ++g->state->next_region;
    return s;
}

struct space *space_again(struct edm_engine *g, const struct source_ops *ops, struct state_space *state) {
    struct space *s = space_alloc(g, ops);
    s->state = state;
    s->region = state->region;
    s->anchor = state->anchor;
    s->forked = state->forked;
    s->apart = state->apart;
    s->asks = true;
    s->pid = state->pid;
    s->uffd = state->uffd[g->turn];
    s->ctl_fd = state->ctl[g->turn];
    return s;
}

struct space *space_new(struct edm_engine *g, const struct source_ops *ops) {
    struct space *s = space_named(g, ops);
    outbox_push(g, EDM_OUT_CREATE, s);
    state_commit(g);
    return s;
}

void space_unref(struct space *s) {
    if (--s->refs)
        return;
    struct edm_engine *g = s->engine;
    for (uint32_t i = 0; i < g->nspaces; i++)
        if (g->space[i] == s) {
            g->space[i] = g->space[--g->nspaces];
            break;
        }
    ranges_free(&s->known);
    ranges_free(&s->doubtful);
    ranges_free(&s->at_fork);
    ranges_free(&s->removed);
    ranges_free(&s->waiting);
    ranges_free(&s->stack_tops);
    ranges_free(&s->exits);
    ranges_free(&s->given);
    ranges_free(&s->wanted);
    ranges_free(&s->foreign);
    ranges_free(&s->blank);
    ranges_free(&s->random);
    ranges_free(&s->sequential);
    free(s->suspect);
    pthread_cond_destroy(&s->idle);
    free(s);
}

// A batch of pages is leaving this space: its outcome must be known before the table changes under it.
void space_wait_idle(struct space *s) {
    s->refs++;
    while (s->batch_busy)  // at the end too: the LPET finishes its batch, and it has pointers into the table
        pthread_cond_wait(&s->idle, &s->engine->mu);
    space_unref(s);
}

void entry_resident(struct space *s, struct leaf *l, struct lspt_entry *e, uint64_t page) {
    struct edm_engine *g = s->engine;
    uint64_t bit = 1ull << (page % LEAF_PAGES);
    bool back = e->state == PS_STAGED || (e->state == PS_FETCHING && e->flags & PF_STORED);
    if (!(l->resident & bit)) {
        l->resident |= bit;
        g->queue[l->queue].pages += l->listed;
        s->resident++;
        if (++g->resident > g->count.peak_resident)
            g->count.peak_resident = g->resident;
    }
    e->state = PS_RESIDENT;
    e->where = 0;
    leaf_arrived(g, l, back);
}

void entry_arrived(struct space *s, struct leaf *l, struct lspt_entry *e, uint64_t page) {
    entry_resident(s, l, e, page);
    if (s->engine->cfg.record_pfn && s->ops->pfn)
        e->where = entry_pfn(s->ops->pfn(s, page));
}

int edm_engine_page(struct edm_engine *g, int32_t pid, uint64_t page, struct edm_page_state *out) {
    int result = -ESRCH;
    pthread_mutex_lock(&g->mu);
    for (uint32_t i = 0; i < g->nspaces && result; i++) {
        struct space *s = g->space[i];
        if (s->dead || s->pid != pid)
            continue;
        struct lspt_entry *e = lspt_entry(&s->lspt, page);
        *out = (struct edm_page_state){0};
        if (e && e->state == PS_RESIDENT && !e->where && s->ops->pfn)
            e->where = entry_pfn(s->ops->pfn(s, page));
        if (e) {
            out->state = e->state;
            out->clean = (e->flags & PF_CLEAN) != 0;
            out->version = entry_version(e);
            out->pfn = e->state == PS_RESIDENT ? e->where : 0;
        }
        result = 0;
    }
    pthread_mutex_unlock(&g->mu);
    return result;
}

void entry_leave(struct leaf *l, struct lspt_entry *e) {
    uint64_t bit = 1ull << (e - l->e);
    if (!(l->resident & bit))
        return;
    refused_forget(l->space->engine, l, bit);
    l->resident &= ~bit;
    l->space->engine->queue[l->queue].pages -= l->listed;
    l->space->resident--;
    l->space->engine->resident--;
}

// Drop one entry's ties; returns whether the DMS may hold the page.
static bool entry_forget(struct space *s, struct leaf *l, struct lspt_entry *e) {
    struct edm_engine *g = s->engine;
    bool stored = e->flags & PF_STORED;
    switch ((enum page_state)e->state) {
    case PS_NEW:
    case PS_ZERO:
        break;
    case PS_RESIDENT:
        entry_leave(l, e);
        break;
    case PS_FETCHING:
        fetch_cancel(g, (uint32_t)e->where);
        stored = true;
        break;
    case PS_EVICTING:
        engine_error(g, "page %#lx changed while it was being evicted", (unsigned long)(l->base + (e - l->e)));
        break;
    case PS_STAGED:
        stored |= outbox_item_at(g, e->where)->state == OB_SENT;
        outbox_cancel(g, e->where);
        break;
    case PS_REMOTE:
        g->count.remote--;
        stored = true;
        break;
    }
    memset(e, 0, sizeof *e);
    return stored;
}

static bool leaf_empty(const struct leaf *l) {
    for (int i = 0; i < LEAF_PAGES; i++)
        if (l->e[i].state || l->e[i].flags)
            return false;
    return true;
}

static void leaf_settle(struct space *s, struct leaf *l) {
    if (!l->resident)
        leaf_unlist(s->engine, l);
    if (leaf_empty(l))
        lspt_leaf_free(&s->lspt, l);
}

// The DMS is to forget pages that the program no longer has.
void space_drop_stored(struct space *s, uint64_t page, uint64_t count) {
    uint32_t id = outbox_push(s->engine, EDM_OUT_DROP, s);
    struct outbox_item *o = outbox_item_at(s->engine, id);
    o->a = page;
    o->b = count;
    if (space_asks(s)) {  // or a question asked before the drop is carried out finds the old page
        s->barrier = o->seq;
        s->engine->outbox_urgent = true;
    }
}

// Whether the DMS may hold any of them.
static bool pages_forget(struct space *s, uint64_t a, uint64_t b) {
    bool stored = s->asks;
    struct leaf *l;
    for (uint64_t at = a; (l = lspt_next(&s->lspt, at)) && l->base < b;) {
        uint64_t base = l->base;
        uint64_t from = base < a ? a - base : 0, to = b - base < LEAF_PAGES ? b - base : LEAF_PAGES;
        for (uint64_t i = from; i < to; i++)
            stored |= entry_forget(s, l, &l->e[i]);
        leaf_settle(s, l);
        point(POINT_forget_half);
        at = base + LEAF_PAGES;
    }
    return stored;
}

void space_forget(struct space *s, uint64_t a, uint64_t b) {
    if (a < b && pages_forget(s, a, b) && !s->dead)
        space_drop_stored(s, a, b - a);
}

// One entry changes its address. Returns whether the DMS may hold the page.
static bool entry_rename(struct space *s, struct leaf *l, struct lspt_entry *e, uint64_t to) {
    uint64_t from = l->base + (uint64_t)(e - l->e);
    struct edm_engine *g = s->engine;
    if (!e->state && !e->flags)
        return false;
    struct leaf *tl = lspt_leaf_make(&s->lspt, s, to);
    struct lspt_entry *te = &tl->e[to % LEAF_PAGES];
    struct lspt_entry was = *e;
    if (was.state == PS_RESIDENT)
        entry_leave(l, e);
    memset(e, 0, sizeof *e);
    *te = was;
    bool stored = was.flags & PF_STORED;
    if (was.state == PS_RESIDENT)
        entry_resident(s, tl, te, to);
    else if (was.state == PS_FETCHING) {
        // The answer goes to the new address: who waits at the old one looks again what is there now.
        s->ops->wake(s, from, 1);
        g->fetch[was.where].page = to;
        stored = true;
    } else if (was.state == PS_STAGED) {
        outbox_item_at(g, was.where)->page = to;
        stored = true;
    } else if (was.state == PS_REMOTE)
        stored = true;
    return stored;
}

bool space_rename(struct space *s, uint64_t from, uint64_t to, uint64_t count) {
    bool stored = s->asks;
    struct leaf *l;
    for (uint64_t at = from; (l = lspt_next(&s->lspt, at)) && l->base < from + count;) {
        uint64_t base = l->base;
        for (uint64_t i = 0; i < LEAF_PAGES; i++) {
            uint64_t page = base + i;
            if (page >= from && page < from + count)
                stored |= entry_rename(s, l, &l->e[i], to + (page - from));
        }
        leaf_settle(s, l);
        at = base + LEAF_PAGES;
    }
    return stored;
}

void space_move(struct space *s, uint64_t from, uint64_t to, uint64_t count) {
    struct edm_engine *g = s->engine;
    space_forget(s, to, to + count);
    if (!space_rename(s, from, to, count))
        return;
    uint32_t id = outbox_push(g, EDM_OUT_MOVE, s);
    struct outbox_item *o = outbox_item_at(g, id);
    o->a = from;
    o->b = to;
    o->c = count;
    s->barrier = o->seq;
}

static void fork_entry(struct space *child, struct leaf *cl, const struct lspt_entry *e, uint64_t page) {
    struct edm_engine *g = child->engine;
    struct lspt_entry *ce = &cl->e[page % LEAF_PAGES];
    *ce = *e;
    ce->flags &= ~(PF_WAITED | PF_WRITER);
    switch ((enum page_state)e->state) {
    case PS_RESIDENT:
        entry_resident(child, cl, ce, page);
        break;
    case PS_FETCHING:
        ce->state = PS_REMOTE;
        ce->where = 0;
        g->count.remote++;
        break;
    case PS_REMOTE:
        g->count.remote++;
        break;
    case PS_STAGED: {
        // The same bytes under the child's name: the slot is shared, the write is the child's own. The clone brings the
        // child what the parent has sent by then.
        ce->flags |= PF_STORED;
        uint32_t id = outbox_push(g, EDM_OUT_EVICT, child);
        struct outbox_item *o = outbox_item_at(g, id), *p = outbox_item_at(g, e->where);
        o->page = o->a = page;
        o->version = p->version;
        o->checksum = p->checksum;
        o->slot = p->slot;
        g->slot[p->slot].refs++;
        ce->where = id;
        break;
    }
    case PS_NEW:
    case PS_ZERO:
        break;
    case PS_EVICTING:
        engine_error(g, "fork while page %#lx was being evicted", (unsigned long)page);
        break;
    }
}

// The child starts with what the parent's table said when the kernel copied the address space: every move and copy
// after that was refused with EAGAIN until the event was read.
struct space *space_fork(struct space *parent) {
    struct edm_engine *g = parent->engine;
    struct space *child = space_named(g, parent->ops);
    child->parent = parent;
    parent->refs++;
    child->forked = true;
    child->state->forked = 1;
    child->asks = parent->asks;
    child->lacks = parent->lacks;
    child->merges = space_merges(parent);
    child->own_uffd = space_own_uffd(parent);
    uint32_t apart = children_apart(parent->pid);  // not to be seen where it has ended, after a takeover
    child->apart = child->state->apart = apart ? apart : parent->apart;
    child->young = parent->unquiet = true;
    if (parent->adopting)  // not known yet
        ranges_add(&child->at_fork, 0, LSPT_MAX_PAGE);
    for (uint32_t i = 0; i < parent->known.n; i++)
        ranges_add(&child->at_fork, parent->known.v[i].a, parent->known.v[i].b);
    hints_fork(parent, child);
    uint32_t id = outbox_push(g, EDM_OUT_CLONE, child);
    struct outbox_item *o = outbox_item_at(g, id);
    o->a = parent->region;
    child->barrier = o->seq;
    struct leaf *l;
    for (uint64_t at = 0; (l = lspt_next(&parent->lspt, at)); at = l->base + LEAF_PAGES) {
        struct leaf *cl = lspt_leaf_make(&child->lspt, child, l->base);
        for (uint64_t i = 0; i < LEAF_PAGES; i++)
            if (l->e[i].state || l->e[i].flags) {
                enum page_state state = (enum page_state)l->e[i].state;
                child->inherited |= (state != PS_RESIDENT && !state_new(state)) || l->e[i].flags & PF_STORED;
                fork_entry(child, cl, &l->e[i], l->base + i);
            }
    }
    return child;
}

// The program has gone, or has another address space now.
void space_retire(struct space *s) {
    struct edm_engine *g = s->engine;
    if (s->dead)
        return;
    // A fork read and not yet applied needs the table as it is.
    while ((s->batch_busy || s->draining || s->applying) && !s->dead)
        pthread_cond_wait(&s->idle, &g->mu);
    if (s->dead)
        return;
    s->dead = true;
    g->put_off -= s->put_off;
    s->put_off = 0;
    point(POINT_retire_begun);
    if (g->trace)
        trace_forget(g, s);
    space_forget(s, 0, LSPT_MAX_PAGE);
    s->ops->retire(s);
    point(POINT_retire_closed);
    outbox_push(g, EDM_OUT_DROP_REGION, s);
    state_commit(g);
    point(POINT_retire_told);
    state_space_gone(g, s);
    point(POINT_retire_over);
    if (s->parent) {
        space_unref(s->parent);
        s->parent = NULL;
    }
    pthread_cond_broadcast(&s->idle);
    pthread_cond_signal(&g->lpet_wake);
    space_unref(s);
}
