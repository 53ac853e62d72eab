// The order of address-space events of different threads. The kernel makes a change, lets go of its lock, and then
// queues the event: one thread may be given the addresses that another has just left, and its event be read first. And
// a thread that has moved pages still owes the event of the unmap of where they were. Source: mm/mremap.c notify_uffd.
//
// While any event is unread the kernel refuses to install or move pages (EAGAIN), so nothing but these tables can be
// wrong meanwhile.
#include "engine.h"

static uint64_t page_of(uint64_t address) { return address >> PAGE_SHIFT; }

static bool put_off(struct space *s, const struct uffd_msg *m) {
    for (int i = 0; i < STATE_LATE; i++)
        if (!s->state->late[i].event) {
            s->state->late[i].arg = m->arg;
            s->state->late[i].reserved3 = 0;
            STATE_BARRIER();
            s->state->late[i].event = m->event;
            s->late++;
            return true;
        }
    return false;
}

// Whether a remap that was put off is to bring pages to any of [a, b).
static bool late_touches(const struct space *s, uint64_t a, uint64_t b) {
    for (int i = 0; i < STATE_LATE && s->late; i++) {
        const struct uffd_msg *m = &s->state->late[i];
        if (m->event == UFFD_EVENT_REMAP && page_of(m->arg.remap.to) < b &&
            a < page_of(m->arg.remap.to + m->arg.remap.len))
            return true;
    }
    return false;
}

// Whether pages of [a, b) were known before the last event was read.
static bool others_known(const struct space *s, uint64_t a, uint64_t b) {
    for (uint64_t e; ranges_gap(&s->doubtful, &a, b, &e); a = e)
        if (ranges_touch(&s->known, a, e))
            return true;
    return false;
}

// A remap to where other pages are known: what takes those away has not been read. True when it was put off.
bool order_put_off(struct space *s, const struct uffd_msg *m) {
    uint64_t to = page_of(m->arg.remap.to), n = page_of(m->arg.remap.len);
    return s->ops->changing && !s->adopting && others_known(s, to, to + n) && put_off(s, m);
}

// A removal of pages that are still to be brought there: it comes behind that.
bool order_put_off_removal(struct space *s, uint64_t a, uint64_t b, const struct uffd_msg *m) {
    return late_touches(s, a, b) && put_off(s, m);
}

bool order_waits(const struct space *s, uint64_t page) { return s->late && late_touches(s, page, page + 1); }

// Pages have been moved, and their source perhaps unmapped: of the unmap that is still to come nothing at the source
// may suffer that comes there before.
void order_moved(struct space *s, uint64_t from, uint64_t to, uint64_t n, bool unmapped) {
    struct state_source *free_ = NULL;
    if (!s->ops->changing)
        return;
    for (int i = 0; i < STATE_LATE; i++) {
        struct state_source *e = &s->state->source[i];
        if (!e->n)
            free_ = e;
        else if (e->a < to + n && to < e->a + e->n)
            e->taken = true;
    }
    s->unquiet = true;
    if (!free_ || unmapped)
        return;  // dozens of threads remap at once: then an unmap counts as it comes
    free_->a = from;
    free_->taken = false;
    STATE_BARRIER();
    free_->n = n;
}

// Whether an unmap is the one owed by a remap from there, with other pages there by now.
bool order_owed(struct space *s, uint64_t a, uint64_t b) {
    for (int i = 0; i < STATE_LATE && s->late; i++) {
        struct uffd_msg *m = &s->state->late[i];
        if (m->event == UFFD_EVENT_REMAP && !m->reserved3 && page_of(m->arg.remap.from) == a &&
            page_of(m->arg.remap.from + m->arg.remap.len) == b) {
            m->reserved3 = 1;  // and its pages are still to go
            return true;
        }
    }
    for (int i = 0; i < STATE_LATE; i++) {
        struct state_source *e = &s->state->source[i];
        if (e->n && e->a == a && e->a + e->n == b) {
            bool taken = e->taken;
            e->n = 0;
            return taken;
        }
    }
    return false;
}

// What was put off and need no longer be; `all`: nothing is to come any more that it could wait for.
void order_catch_up(struct edm_engine *g, struct space *s, bool all) {
    for (int i = 0; i < STATE_LATE && s->late; i++) {
        struct uffd_msg *m = &s->state->late[i];
        bool remap = m->event == UFFD_EVENT_REMAP;
        uint64_t a = page_of(remap ? m->arg.remap.to : m->arg.remove.start);
        uint64_t b = remap ? a + page_of(m->arg.remap.len) : page_of(m->arg.remove.end);
        if (!m->event || (remap && !all && others_known(s, a, b)) || (!remap && late_touches(s, a, b)))
            continue;
        if (remap)
            event_remap(g, s, m);
        else
            event_remove(s, a, b);
        state_commit(g);
        m->event = 0;
        s->late--;
        i = -1;
    }
}

// Called now and then: while no event is unread, none is owed.
void order_settle(struct edm_engine *g, struct space *s) {
    if ((!s->late && !s->unquiet && !s->doubtful.n) || s->applying || s->batch_busy || s->ops->changing(s))
        return;
    order_catch_up(g, s, true);
    for (int i = 0; i < STATE_LATE; i++)
        s->state->source[i].n = 0;
    s->unquiet = false;
    s->doubtful.n = 0;
    for (uint32_t i = 0; i < g->nspaces; i++)
        if (g->space[i]->parent == s)
            g->space[i]->young = false;
}
