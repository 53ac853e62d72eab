// The order of address-space events of different threads. The kernel makes a change, lets go of its lock, and then
// queues the event: one thread may be given the addresses that another has just left, and its event be read first. And
// a thread that has moved pages still owes the event of the unmap of where they were. Source: mm/mremap.c notify_uffd.
//
// While any event is unread the kernel refuses to install or move pages (EAGAIN), so nothing but these tables can be
// wrong meanwhile.
#include "engine.h"

#include <string.h>

// What a DM-Handler that takes over has found out about a remap, in a word of the message that the kernel leaves zero.
enum { AS_READ = 1, SWAPPED };

static uint64_t page_of(uint64_t address) { return address >> PAGE_SHIFT; }

// Which message of the segment it was, from 1 on: killed before that one is marked, the next DM-Handler would take it
// for two.
static uint32_t number(const struct space *s, const struct uffd_msg *m) { return (uint32_t)(m - s->state->event) + 1; }

static void late_mark(struct space *s, uint64_t committed, uint32_t at) {
    __atomic_store_n(&s->state->late_mark, committed * EVENT_AT + at, __ATOMIC_RELEASE);
}

static bool put_off(struct space *s, const struct uffd_msg *m) {
    for (int i = 0; i < STATE_LATE; i++)
        if (!s->state->late[i].event) {
            s->state->late[i].arg = m->arg;
            s->state->late[i].reserved3 = number(s, m);
            STATE_BARRIER();
            s->state->late[i].event = m->event;
            s->late++;
            s->unsure = true;
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
    if (!s->ops->changing || (s->adopting && m->reserved3 != SWAPPED))
        return false;
    if (s->adopting)  // others are there
        ranges_add(&s->known, to, to + n);
    return others_known(s, to, to + n) && put_off(s, m);
}

static bool touches(uint64_t at, const struct uffd_msg *m, uint64_t a, uint64_t b) {
    return page_of(at) < b && a < page_of(at + m->arg.remap.len);
}

// Whether, in the order they were read in, a later remap takes away what this one brings, and none brings more.
static bool taken_away(const struct uffd_msg *m, const struct uffd_msg *end) {
    uint64_t a = page_of(m->arg.remap.to), b = a + page_of(m->arg.remap.len);
    bool away = false;
    for (const struct uffd_msg *x = m + 1; x < end; x++)
        if (x->event == UFFD_EVENT_REMAP)
            away = touches(x->arg.remap.to, x, a, b) ? false : away || touches(x->arg.remap.from, x, a, b);
    return away;
}

static bool all_registered(struct space *s, uint64_t a, uint64_t b) {
    struct ranges there = {0};
    uint64_t e;
    bool all = s->ops->registered(s, a, b, &there) && !ranges_gap(&there, &a, b, &e);
    ranges_free(&there);
    return all;
}

// Before messages [at, n) are applied by a DM-Handler that takes over, to which nothing is known yet: two remaps may
// have been read the wrong way round. As read, the place between them is empty in the end; if it is not, the first
// comes behind the second. False: more must be read before that can be told.
bool order_swapped(struct space *s, uint32_t at, uint32_t n) {
    struct uffd_msg *m = s->state->event;
    for (uint32_t i = at; i < n; i++) {
        if (m[i].event != UFFD_EVENT_REMAP || m[i].reserved3 || !taken_away(&m[i], m + n))
            continue;
        uint64_t to = page_of(m[i].arg.remap.to);
        bool there = all_registered(s, to, to + page_of(m[i].arg.remap.len));
        if (s->ops->changing(s))
            return false;
        m[i].reserved3 = there ? SWAPPED : AS_READ;
    }
    return true;
}

// Taking over, before any event: what was put off is put off still.
void order_again(struct space *s) {
    const struct state_space *t = s->state;
    for (int i = 0; i < STATE_LATE; i++) {
        if (!t->late[i].event)
            continue;
        s->late++;
        if (t->late[i].event == UFFD_EVENT_REMAP) {  // others are there
            uint64_t to = page_of(t->late[i].arg.remap.to);
            ranges_add(&s->known, to, to + page_of(t->late[i].arg.remap.len));
        }
    }
}

// Whether a message has been put off already.
bool order_has(const struct space *s, const struct uffd_msg *m) {
    for (int i = 0; i < STATE_LATE; i++) {
        const struct uffd_msg *o = &s->state->late[i];
        if (o->event == m->event && o->reserved3 == number(s, m) && !memcmp(&o->arg, &m->arg, sizeof m->arg))
            return true;
    }
    return false;
}

// A removal of pages that are still to be brought there: it comes behind that.
bool order_put_off_removal(struct space *s, uint64_t a, uint64_t b, const struct uffd_msg *m) {
    return late_touches(s, a, b) && put_off(s, m);
}

bool order_waits(const struct space *s, uint64_t page) { return s->late && late_touches(s, page, page + 1); }

// Pages have been moved: of the unmap of where they were, which is still to come, nothing may suffer that comes there
// before it.
void order_moved(struct space *s, uint64_t from, uint64_t n) {
    if (!s->ops->changing)
        return;
    s->unquiet = true;
    for (int i = 0; i < STATE_LATE; i++) {
        struct state_source *e = &s->state->source[i];
        if (e->n)
            continue;
        e->a = from;
        STATE_BARRIER();
        e->n = n;
        return;
    }
    // Dozens of threads remap at once: then an unmap counts as it comes.
}

// What of [a, b) a remap that was put off is to move, or to bring pages to.
static struct ranges late_in(const struct space *s, uint64_t a, uint64_t b) {
    struct ranges in = {0};
    for (int i = 0; i < STATE_LATE && s->late; i++) {
        const struct uffd_msg *m = &s->state->late[i];
        if (m->event != UFFD_EVENT_REMAP)
            continue;
        const uint64_t place[2] = {page_of(m->arg.remap.from), page_of(m->arg.remap.to)};
        for (int k = 0; k < 2; k++) {
            uint64_t from = place[k], to = from + page_of(m->arg.remap.len);
            ranges_add(&in, from > a ? from : a, to < b ? to : b);
        }
    }
    return in;
}

// Whether an unmap may be the one owed by a remap from there, and what is known there now have come since. Two threads'
// unmaps of one place cannot be told from each other: the kernel must say what is there.
static bool maybe_owed(struct space *s, uint64_t a, uint64_t b) {
    for (int i = 0; i < STATE_LATE && s->unquiet; i++) {
        struct state_source *e = &s->state->source[i];
        if (!e->n || e->a != a || e->a + e->n != b)
            continue;
        if (ranges_touch(&s->known, a, b))
            return true;
        e->n = 0;
        return false;
    }
    return false;
}

// What is registered is what another thread has moved there; or it will be, and the remap that is still to be read
// forgets what was there before. What is not registered is gone whichever unmap this is.
static void unmap_as_the_kernel_says(struct space *s, uint64_t a, uint64_t b) {
    struct ranges there = {0};
    if (s->ops->registered(s, a, b, &there))
        for (uint64_t e; ranges_gap(&there, &a, b, &e); a = e)
            event_unmap(s, a, e);
    ranges_free(&there);
}

// Pages [a, b) have been unmapped, as an event says. Where a remap waits it may be what that waits for, what it owes,
// or the end of what it brought: nothing is forgotten there before all is quiet.
void order_unmap(struct space *s, uint64_t a, uint64_t b) {
    struct ranges late = late_in(s, a, b);
    if (s->adopting)  // what that waits for, or what it brought: it need not wait
        ranges_del(&s->known, a, b);
    bool doubt = late.n > 0;
    // While nobody served the program, other threads had all the time to take a place that a remap has left, and its
    // unmap comes behind what they moved there. What is known is not known yet then.
    bool ask = s->adopting || (!doubt && maybe_owed(s, a, b));
    doubt |= ask;
    for (uint64_t e; ranges_gap(&late, &a, b, &e); a = e)
        (ask ? unmap_as_the_kernel_says : event_unmap)(s, a, e);
    s->unsure |= doubt;
    ranges_free(&late);
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
        late_mark(s, g->seq, (uint32_t)i);
        if (remap)
            event_remap(g, s, m);
        else
            event_remove(s, a, b);
        state_commit(g);
        m->event = 0;
        late_mark(s, NOT_YET, 0);
        s->late--;
        i = -1;
    }
}

// What is known and no longer registered has gone by an event that was taken for another's. Nothing changes unseen
// meanwhile: the kernel says that a change is under way before it makes it, until its event has been read.
static bool known_again(struct space *s) {
    struct ranges there = {0}, gone = {0};
    bool sure = s->ops->registered(s, 0, LSPT_MAX_PAGE, &there) && !s->ops->changing(s);
    for (uint32_t i = 0; sure && i < s->known.n; i++) {
        uint64_t a = s->known.v[i].a, b = s->known.v[i].b, e;
        for (; ranges_gap(&there, &a, b, &e); a = e)
            ranges_add(&gone, a, e);
    }
    for (uint32_t i = 0; i < gone.n; i++)
        event_unmap(s, gone.v[i].a, gone.v[i].b);
    ranges_free(&there);
    ranges_free(&gone);
    return sure;
}

// Called now and then: while no event is unread, none is owed.
void order_settle(struct edm_engine *g, struct space *s) {
    if ((!s->late && !s->unquiet && !s->doubtful.n) || s->applying || s->batch_busy || s->ops->changing(s))
        return;
    order_catch_up(g, s, true);
    if (s->unsure && !known_again(s))
        return;
    state_commit(g);
    s->unsure = false;
    for (int i = 0; i < STATE_LATE; i++)
        s->state->source[i].n = 0;
    s->unquiet = false;
    s->doubtful.n = 0;
    for (uint32_t i = 0; i < g->nspaces; i++)
        if (g->space[i]->parent == s) {
            g->space[i]->young = false;
            ranges_free(&g->space[i]->at_fork);
        }
}
