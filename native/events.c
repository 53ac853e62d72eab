// Reading a space's uffd [3-5]: address-space events first, then faults.
//
// Reading an event lets the program's system call go on, so the table must be right before anything else looks at it:
// all events of one read are applied before any fault of it, and while they are, `applying` keeps everybody else out.
#include "engine.h"

#include <errno.h>

#define READ_MESSAGES 32

static uint64_t page_of(uint64_t address) { return address >> PAGE_SHIFT; }

static void event_fork(struct edm_engine *g, struct space *s, const struct uffd_msg *m) {
    g->count.events_fork++;
    struct space *child = space_fork(s);
    int r = s->ops->forked(child, m);
    if (r) {
        engine_error(g, "fork: the child cannot be served: errno %d", -r);
        space_retire(child);
    }
}

static void event_apply(struct edm_engine *g, struct space *s, const struct uffd_msg *m) {
    switch (m->event) {
    case UFFD_EVENT_FORK:
        event_fork(g, s, m);
        break;
    case UFFD_EVENT_REMAP: {
        uint64_t from = page_of(m->arg.remap.from), to = page_of(m->arg.remap.to), n = page_of(m->arg.remap.len);
        g->count.events_remap++;
        ranges_del(&s->known, from, from + n);
        ranges_del(&s->known, to, to + n);
        ranges_add(&s->known, to, to + n);
        space_move(s, from, to, n);
        s->sweep_soon = true;
        break;
    }
    case UFFD_EVENT_REMOVE: {
        uint64_t a = page_of(m->arg.remove.start), b = page_of(m->arg.remove.end);
        g->count.events_remove++;
        removed_note(s, a, b);
        space_forget(s, a, b);
        break;
    }
    case UFFD_EVENT_UNMAP: {
        uint64_t a = page_of(m->arg.remove.start), b = page_of(m->arg.remove.end);
        g->count.events_unmap++;
        ranges_del(&s->known, a, b);
        ranges_del(&s->removed, a, b);
        space_forget(s, a, b);
        s->sweep_soon = true;
        break;
    }
    default:
        engine_error(g, "unknown userfaultfd event %#x", m->event);
    }
}

// Called with the lock held; may let it go while a batch that is moving out comes to its end.
void space_read(struct edm_engine *g, struct space *s, int worker) {
    struct uffd_msg m[READ_MESSAGES];
    if (s->applying || s->dead)
        return;
    int n = s->ops->read(s, m, READ_MESSAGES);
    if (n <= 0) {
        if (n < 0 && n != -EAGAIN)
            engine_error(g, "read of a uffd: errno %d", -n);
        return;
    }
    s->refs++;
    int events = 0;
    for (int i = 0; i < n; i++)
        events += m[i].event != UFFD_EVENT_PAGEFAULT;
    if (events) {
        s->applying = true;
        space_wait_idle(s);
        for (int i = 0; i < n && !s->dead; i++)
            if (m[i].event != UFFD_EVENT_PAGEFAULT)
                event_apply(g, s, &m[i]);
        s->applying = false;
        pthread_cond_broadcast(&s->idle);
    }
    for (int i = 0; i < n && !s->dead; i++) {
        if (m[i].event != UFFD_EVENT_PAGEFAULT)
            continue;
        g->count.faults++;
        if (s->pid <= 0 && s->ops == &uffd_ops)
            s->pid = (int)m[i].arg.pagefault.feat.ptid;
        worker_follow(g, worker, (int)m[i].arg.pagefault.feat.ptid);
        struct fault f = {s, page_of(m[i].arg.pagefault.address), (uint32_t)m[i].arg.pagefault.flags,
                          m[i].arg.pagefault.feat.ptid};
        if (g->trace)
            trace_begin(g, &f, m[i].arg.pagefault.feat.ptid);
        fault_take(g, worker, f);
    }
    space_unref(s);
}
