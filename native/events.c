// Reading a space's uffd [3-5]: address-space events first, then faults.
//
// Reading an event lets the program's system call go on, so the table must be right before anything else looks at it:
// all events of one read are applied before any fault of it, and while they are, `applying` keeps everybody else out.
#include "engine.h"

#include <errno.h>
#include <signal.h>
#include <string.h>
#include <time.h>

#define READ_MESSAGES 32

static uint64_t page_of(uint64_t address) { return address >> PAGE_SHIFT; }

static void event_fork(struct edm_engine *g, struct space *s, const struct uffd_msg *m) {
    g->count.events_fork++;
    struct space *child = space_fork(s);
    point(POINT_fork_made);
    int r = s->ops->forked(child, m);
    if (r) {
        engine_error(g, "fork: the child cannot be served: errno %d", -r);
        space_retire(child);
    }
    point(POINT_fork_served);
}

void event_remove(struct space *s, uint64_t a, uint64_t b) {
    removed_note(s, a, b);
    space_forget(s, a, b);
}

static void at_fork_not(struct space *s, uint64_t page, uint64_t n) {
    if (s->young)
        ranges_del(&s->at_fork, page, page + n);
}

// A child forked after a move, whose event came first, has nothing mapped at the old place, though its parent had when
// the event was read. What its parent has mapped there since, and moved on, is none of the child's.
static bool forked_after(struct space *child, const struct space *s, uint64_t from, uint64_t n) {
    return child->parent == s && child->young && !child->dead && child->ops->mapped &&
           ranges_touch(&child->at_fork, from, from + n) && !child->ops->mapped(child, from);
}

void event_remap(struct edm_engine *g, struct space *s, const struct uffd_msg *m) {
    uint64_t from = page_of(m->arg.remap.from), to = page_of(m->arg.remap.to), n = page_of(m->arg.remap.len);
    ranges_del(&s->known, from, from + n);
    ranges_del(&s->known, to, to + n);
    ranges_del(&s->doubtful, from, from + n);
    ranges_del(&s->doubtful, to, to + n);
    hints_forget(s, from, from + n);
    hints_forget(s, to, to + n);
    exits_forget(s, from, from + n);
    exits_forget(s, to, to + n);
    ranges_del(&s->foreign, to, to + n);
    at_fork_not(s, from, n);
    at_fork_not(s, to, n);
    if (!s->adopting)
        ranges_add(&s->known, to, to + n);
    space_move(s, from, to, n);
    for (uint32_t i = 0; i < g->nspaces; i++)
        if (forked_after(g->space[i], s, from, n)) {
            space_move(g->space[i], from, to, n);
            at_fork_not(g->space[i], from, n);
            ranges_add(&g->space[i]->at_fork, to, to + n);
        }
    point(POINT_move_done);
    order_moved(s, from, n);
    s->sweep_soon = true;
}

void event_unmap(struct space *s, uint64_t a, uint64_t b) {
    ranges_del(&s->known, a, b);
    ranges_del(&s->doubtful, a, b);
    ranges_del(&s->removed, a, b);
    at_fork_not(s, a, b - a);
    hints_forget(s, a, b);
    exits_forget(s, a, b);
    space_forget(s, a, b);
}

static void event_apply(struct edm_engine *g, struct space *s, const struct uffd_msg *m) {
    switch (m->event) {
    case UFFD_EVENT_FORK:
        event_fork(g, s, m);
        break;
    case UFFD_EVENT_REMAP:
        g->count.events_remap++;
        if (!order_put_off(s, m))
            event_remap(g, s, m);
        break;
    case UFFD_EVENT_REMOVE: {
        uint64_t a = page_of(m->arg.remove.start), b = page_of(m->arg.remove.end);
        g->count.events_remove++;
        if (!order_put_off_removal(s, a, b, m))
            event_remove(s, a, b);
        break;
    }
    case UFFD_EVENT_UNMAP: {
        uint64_t a = page_of(m->arg.remove.start), b = page_of(m->arg.remove.end);
        g->count.events_unmap++;
        s->sweep_soon = true;
        order_unmap(s, a, b);
        break;
    }
    default:
        engine_error(g, "unknown userfaultfd event %#x", m->event);
    }
}

bool space_event(const struct space *s, const struct uffd_msg *m) {
    if (m->event == UFFD_EVENT_PAGEFAULT)
        return false;
    return !s->staging || m->event != UFFD_EVENT_REMOVE || m->arg.remove.start < s->staging ||
           m->arg.remove.end > s->staging + EDM_STAGING_PAGES * PAGE_SIZE_;
}

// A number of the table it was read into; after an adoption a pair by the head's turn, in words the kernel leaves zero.
int event_uffd(const struct edm_engine *g, const struct uffd_msg *m) {
    uint64_t pair = m->arg.reserved.reserved2;
    return m->arg.reserved.reserved3 ? (int)(uint32_t)(pair >> 32 * g->turn) : (int)m->arg.fork.ufd;
}

void event_uffd_again(const struct edm_engine *g, struct uffd_msg *m, int fd) {
    uint64_t now = (uint32_t)event_uffd(g, m), then = (uint32_t)fd;
    m->arg.reserved.reserved2 = g->turn ? now << 32 | then : then << 32 | now;
    STATE_BARRIER();
    m->arg.reserved.reserved3 = 1;
}

static void event_mark(struct space *s, uint64_t committed, uint32_t at) {
    __atomic_store_n(&s->state->event_mark, committed * EVENT_AT + at, __ATOMIC_RELEASE);
}

// The same moment of a fork, of a remap, and of all others.
#define POINT_OF_EVENT(m, moment)                                \
    point((m).event == UFFD_EVENT_FORK    ? POINT_fork_##moment  \
          : (m).event == UFFD_EVENT_REMAP ? POINT_remap_##moment \
                                          : POINT_event_##moment)

// From number `from` on; what is killed on the way is taken up there by the next DM-Handler.
static void events_apply(struct edm_engine *g, struct space *s, uint32_t from, uint32_t n) {
    const struct uffd_msg *m = s->state->event;
    for (uint32_t i = from; i < n && !s->dead; i++) {
        if (!space_event(s, &m[i]))
            continue;
        event_mark(s, g->seq, i);
        POINT_OF_EVENT(m[i], begun);
        event_apply(g, s, &m[i]);
        if (s->late && !s->dead)
            order_catch_up(g, s, false);
        POINT_OF_EVENT(m[i], applied);
        state_commit(g);
        POINT_OF_EVENT(m[i], committed);
        event_mark(s, NOT_YET, i + 1);
    }
}

// Last first: what is left of them when this is cut short lies before the mark.
static void events_clear(struct space *s, uint32_t n) {
    while (n-- > 0) {
        s->state->event[n].arg.reserved.reserved3 = 0;
        __atomic_store_n(&s->state->event[n].event, 0, __ATOMIC_RELEASE);
    }
    event_mark(s, NOT_YET, 0);
}

// Now it is known whose uffd this is. One that does not begin with the anchor may be a child that the C library knows
// nothing of, and never come: what was not copied for it is found out now.
static void first_fault(struct space *s, const struct uffd_msg *m) {
    int number = (int)m->arg.pagefault.feat.ptid;
    if (s->apart)
        s->pid = s->state->pid = process_here(s->parent ? s->parent->pid : 0, s->apart, number);
    else
        s->pid = s->state->pid = number;
    s->own = s->pid ? 0 : number;
    if (s->lacks) {
        engine_error(s->engine, "process %d is stopped: its parent has ended, with pages of it, as the DM-Handler did",
                     s->pid);
        if (s->pid > 0)
            kill(s->pid, SIGKILL);
    }
    if (s->forked && page_of(m->arg.pagefault.address) != page_of(s->anchor))
        space_prune_unmapped(s);
}

// Called with the lock held; may let it go while a batch that is moving out comes to its end.
int space_read(struct edm_engine *g, struct space *s, int worker) {
    struct uffd_msg m[READ_MESSAGES];
    if (s->applying || s->dead)
        return 0;
    // Into the segment: once it is read, only we know of an event.
    int n = s->ops->read(s, s->state->event, READ_MESSAGES);
    if (n <= 0) {
        if (n < 0 && n != -EAGAIN)
            engine_error(g, "read of a uffd: errno %d", -n);
        return 0;
    }
    memcpy(m, s->state->event, (size_t)n * sizeof *m);
    s->refs++;
    hints_look(g, s, hints_given(s), false);
    int events = 0;
    for (int i = 0; i < n; i++)
        events += space_event(s, &m[i]);
    if (events) {
        point(POINT_messages_read);
        s->applying = true;
        space_wait_idle(s);
        events_apply(g, s, 0, (uint32_t)n);
        s->applying = false;
        pthread_cond_broadcast(&s->idle);
    }
    if (s->state)
        events_clear(s, (uint32_t)n);
    if (events)
        point(POINT_events_cleared);
    for (int i = 0; i < n && !s->dead; i++) {
        if (m[i].event != UFFD_EVENT_PAGEFAULT)
            continue;
        g->count.faults++;
        if (s->pid <= 0 && !s->own && s->ops == &uffd_ops)
            first_fault(s, &m[i]);
        if (s->lacks)  // it is stopped, or waits: what it would find is not what it is to read
            continue;
        worker_follow(g, worker, (int)m[i].arg.pagefault.feat.ptid);
        idle_fault(g, m[i].arg.pagefault.feat.ptid);
        struct fault f = {s, page_of(m[i].arg.pagefault.address), (uint32_t)m[i].arg.pagefault.flags,
                          m[i].arg.pagefault.feat.ptid};
        if (g->trace)
            trace_begin(g, &f, m[i].arg.pagefault.feat.ptid);
        fault_take(g, worker, f);
    }
    space_unref(s);
    return n;
}

static uint32_t events_left(const struct space *s) {
    uint32_t n = 0;
    while (n < STATE_EVENTS && s->state->event[n].event)
        n++;
    return n;
}

#define QUIET_TRIES 200

static void wait_a_little(void) {
    struct timespec t = {0, 100000};
    nanosleep(&t, NULL);
}

// Where the order of remaps is in doubt, what more there is to be read, as far as there is room: that tells it.
static uint32_t events_more(struct space *s, uint32_t at, uint32_t n) {
    for (int tries = 0; tries < QUIET_TRIES && n + READ_MESSAGES <= STATE_EVENTS && !order_swapped(s, at, n);) {
        int r = s->ops->read(s, s->state->event + n, READ_MESSAGES);
        n += r > 0 ? (uint32_t)r : 0;
        if (r > 0)
            continue;
        wait_a_little();
        tries++;
    }
    return n;
}

// The first that has not been applied.
static uint32_t events_at(const struct space *s, uint32_t n) {
    uint32_t at = (uint32_t)(s->state->event_mark % EVENT_AT);
    return at + (at < n && order_has(s, &s->state->event[at]));
}

bool events_fork_left(const struct space *s) {
    uint32_t n = events_left(s);
    for (uint32_t i = events_at(s, n); i < n; i++)
        if (s->state->event[i].event == UFFD_EVENT_FORK)
            return true;
    return false;
}

void events_again(struct edm_engine *g, struct space *s) {
    uint32_t n = events_left(s), at = events_at(s, n);
    order_again(s);
    s->unquiet = s->unsure = true;
    // A thread that is let go on may owe another event; what was put off comes behind all of them.
    for (int tries = 0; tries < QUIET_TRIES;) {
        n = events_more(s, at, n);
        events_apply(g, s, at, n);
        if (s->dead)
            return;
        events_clear(s, n);
        at = 0;
        int r = s->ops->read(s, s->state->event, READ_MESSAGES);
        n = r > 0 ? (uint32_t)r : 0;
        if (n)
            continue;
        if (!s->ops->changing(s))
            break;
        wait_a_little();
        tries++;
    }
    order_catch_up(g, s, true);
}
