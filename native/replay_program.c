// The program's side of replay: its touches, its address-space changes, its forks. Each does what the program's thread
// does in the kernel, up to where the thread waits for the engine.
#include "replay.h"

#include <errno.h>
#include <string.h>
#include <unistd.h>

#define LAST_WORD (PAGE_SIZE_ - sizeof(uint64_t))

static int ended(const struct edm_replay *r) {
    if (r->gone)
        return -ESRCH;
    return atomic_load(&r->engine->stop) ? -ESHUTDOWN : 0;
}

static int wait_for_page(struct edm_replay *r, uint64_t page, uint64_t flags) {
    struct waiter w = {.msg = {.event = UFFD_EVENT_PAGEFAULT}};
    w.msg.arg.pagefault.address = page << PAGE_SHIFT;
    w.msg.arg.pagefault.flags = flags;
    w.msg.arg.pagefault.feat.ptid = (uint32_t)gettid();
    replay_append(r, &r->faults, &w);
    return replay_wait(r, &r->faults, &w, false);
}

// The page made present and, for a write, writable. 0 or -errno.
static int fault_in(struct edm_replay *r, uint64_t page, bool write) {
    for (;;) {
        int result = ended(r);
        uint8_t bits = r->bits[page];
        if (result)
            return result;
        if (bits & RP_POISONED)
            return -EFAULT;
        if (bits & RP_PRESENT) {
            if (!write || !(bits & RP_PROTECTED))
                return 0;
            result = wait_for_page(r, page, UFFD_PAGEFAULT_FLAG_WRITE | UFFD_PAGEFAULT_FLAG_WP);
        } else if (bits & RP_REGISTERED) {
            result = wait_for_page(r, page, write ? UFFD_PAGEFAULT_FLAG_WRITE : 0);
        } else {
            memset(r->arena + page * PAGE_SIZE_, 0, PAGE_SIZE_);
            r->bits[page] |= RP_PRESENT;
            r->present++;
        }
        if (result)
            return result;
    }
}

int edm_replay_touch(struct edm_replay *r, uint64_t page, int write, uint64_t value, uint64_t *out) {
    if (page >= r->pages)
        return -EFAULT;
    pthread_mutex_lock(&r->mu);
    int result = fault_in(r, page, write);
    uint8_t *at = r->arena + page * PAGE_SIZE_;
    if (!result && write) {
        memcpy(at, &value, sizeof value);
        memcpy(at + LAST_WORD, &value, sizeof value);
        r->bits[page] &= (uint8_t)~RP_SHARED;
    } else if (!result) {
        uint64_t last;
        memcpy(out, at, sizeof *out);
        memcpy(&last, at + LAST_WORD, sizeof last);
        result = *out == last ? 0 : -EIO;
    }
    pthread_mutex_unlock(&r->mu);
    return result;
}

// ---- address-space changes

static struct uffd_msg range_event(uint8_t event, uint64_t a, uint64_t n) {
    struct uffd_msg m = {.event = event};
    m.arg.remove.start = a << PAGE_SHIFT;
    m.arg.remove.end = (a + n) << PAGE_SHIFT;
    return m;
}

// Queue the events of one system call, wait until each has been read, and let the call go on: only then are zero, copy
// and move possible again.
static int report(struct edm_replay *r, struct waiter *w, int n) {
    int result = 0;
    for (int i = 0; i < n; i++) {
        r->changing++;
        replay_append(r, &r->events, &w[i]);
    }
    for (int i = 0; i < n; i++) {
        int one = replay_wait(r, &r->events, &w[i], true);
        result = result ? result : one;
    }
    r->changing -= (uint32_t)n;
    return result;
}

static int change_remove(struct edm_replay *r, uint64_t a, uint64_t n) {
    struct waiter w = {.msg = range_event(UFFD_EVENT_REMOVE, a, n)};
    int result = report(r, &w, 1);
    replay_drop(r, a, n, false);  // after the event was read: userfaultfd_remove in mm/madvise.c
    return result;
}

static int change_unmap(struct edm_replay *r, uint64_t a, uint64_t n) {
    struct waiter w = {.msg = range_event(UFFD_EVENT_UNMAP, a, n)};
    replay_drop(r, a, n, true);
    return report(r, &w, 1);
}

// As mremap(2) with MREMAP_FIXED: what was at the target is unmapped, then the move, then the source is unmapped. The
// kernel reports the three one after the other; here they are queued at once, so that no fork comes between them.
static int change_remap(struct edm_replay *r, uint64_t a, uint64_t n, uint64_t b) {
    struct waiter w[3] = {{.msg = range_event(UFFD_EVENT_UNMAP, b, n)},
                          {.msg = {.event = UFFD_EVENT_REMAP}},
                          {.msg = range_event(UFFD_EVENT_UNMAP, a, n)}};
    w[1].msg.arg.remap.from = a << PAGE_SHIFT;
    w[1].msg.arg.remap.to = b << PAGE_SHIFT;
    w[1].msg.arg.remap.len = n << PAGE_SHIFT;
    replay_drop(r, b, n, true);
    memcpy(r->arena + b * PAGE_SIZE_, r->arena + a * PAGE_SIZE_, n * PAGE_SIZE_);
    memcpy(r->bits + b, r->bits + a, n);
    memset(r->bits + a, 0, n);  // the pages have moved: none is dropped
    return report(r, w, 3);
}

// What the sweep does for a real program: register the new mappings, and let pages touched before that join the LSPT.
static void register_again(struct edm_replay *r, uint64_t a, uint64_t n) {
    struct edm_engine *g = r->engine;
    pthread_mutex_lock(&g->mu);
    struct space *s = r->space;
    if (s)
        s->refs++;
    while (s && s->applying && !s->dead && !atomic_load(&g->stop))
        pthread_cond_wait(&s->idle, &g->mu);
    if (s && !s->dead) {
        pthread_mutex_lock(&r->mu);
        for (uint64_t p = a; p < a + n; p++) {
            if (r->bits[p] & RP_PRESENT && !(r->bits[p] & RP_REGISTERED)) {
                struct leaf *l = lspt_leaf_make(&s->lspt, s, p);
                entry_resident(s, l, &l->e[p % LEAF_PAGES], p);
                g->count.joined++;
            }
            r->bits[p] |= RP_REGISTERED;
        }
        pthread_mutex_unlock(&r->mu);
        ranges_add(&s->known, a, a + n);
    }
    if (s)
        space_unref(s);
    pthread_mutex_unlock(&g->mu);
}

static bool within(const struct edm_replay *r, uint64_t a, uint64_t n) {
    return n && a < r->pages && n <= r->pages - a;
}

int edm_replay_event(struct edm_replay *r, int what, uint64_t a, uint64_t n, uint64_t b) {
    if (!within(r, a, n) || what < EDM_REPLAY_REMOVE || what > EDM_REPLAY_REMAP)
        return -EINVAL;
    if (what == EDM_REPLAY_REMAP && (!within(r, b, n) || (a < b + n && b < a + n)))
        return -EINVAL;
    pthread_mutex_lock(&r->mu);
    int result = ended(r);
    if (!result)
        result = what == EDM_REPLAY_REMOVE  ? change_remove(r, a, n)
                 : what == EDM_REPLAY_UNMAP ? change_unmap(r, a, n)
                                            : change_remap(r, a, n, b);
    pthread_mutex_unlock(&r->mu);
    if (!result && what != EDM_REPLAY_REMOVE)
        register_again(r, a, n);
    return result;
}

// ---- fork, exit

static void copy_address_space(struct edm_replay *child, struct edm_replay *parent) {
    for (uint64_t p = 0; p < parent->pages; p++) {
        if (parent->bits[p] & RP_PRESENT) {
            memcpy(child->arena + p * PAGE_SIZE_, parent->arena + p * PAGE_SIZE_, PAGE_SIZE_);
            parent->bits[p] |= RP_SHARED;
        }
        child->bits[p] = parent->bits[p] & (uint8_t)~RP_PINNED;
    }
    child->present = parent->present;
}

// The engine was stopped, or the parent ended, before it read the event: there is no child.
static void unborn(struct edm_replay *parent, struct edm_replay *child) {
    for (struct edm_replay **at = &parent->newborn; *at; at = &(*at)->newborn)
        if (*at == child) {
            *at = child->newborn;
            replay_unref(child);
            break;
        }
    replay_unref(child);
}

int edm_replay_fork(struct edm_replay *r, struct edm_replay **out) {
    struct edm_replay *child = replay_new(r->engine, r->pages);
    if (!child)
        return -errno;
    pthread_mutex_lock(&r->mu);
    int result = ended(r);
    child->newborn = r->newborn;
    r->newborn = child;
    if (!result) {
        struct waiter w = {.msg = {.event = UFFD_EVENT_FORK}};
        w.msg.arg.fork.ufd = (uint32_t)child->readable;
        copy_address_space(child, r);
        result = report(r, &w, 1);
        if (w.read)
            result = 0;
    }
    if (result)
        unborn(r, child);
    pthread_mutex_unlock(&r->mu);
    if (result)
        return result;
    pthread_mutex_lock(&child->mu);
    while (!child->attached)
        pthread_cond_wait(&child->attach, &child->mu);
    pthread_mutex_unlock(&child->mu);
    *out = child;
    return 0;
}

void edm_replay_close(struct edm_replay *r) {
    pthread_mutex_lock(&r->mu);
    bool gone = r->gone;
    pthread_mutex_unlock(&r->mu);
    if (!gone) {
        struct edm_engine *g = r->engine;
        pthread_mutex_lock(&g->mu);
        if (r->space)
            space_retire(r->space);
        pthread_mutex_unlock(&g->mu);
    }
    replay_unref(r);
}

// ---- traces, knobs

static int carry_out(struct edm_replay *r, struct edm_replay_op *op) {
    switch (op->kind) {
    case EDM_REPLAY_READ:
        return edm_replay_touch(r, op->page, 0, 0, &op->value);
    case EDM_REPLAY_WRITE:
        return edm_replay_touch(r, op->page, 1, op->value, NULL);
    default:
        return edm_replay_event(r, (int)op->kind, op->page, op->count, op->value);
    }
}

uint64_t edm_replay_run(struct edm_replay *r, struct edm_replay_op *ops, uint64_t n, int *error) {
    *error = 0;
    for (uint64_t i = 0; i < n; i++) {
        *error = -carry_out(r, &ops[i]);
        if (*error)
            return i;
    }
    return n;
}

uint64_t edm_replay_present(struct edm_replay *r) {
    pthread_mutex_lock(&r->mu);
    uint64_t n = r->present;
    pthread_mutex_unlock(&r->mu);
    return n;
}

int edm_replay_pin(struct edm_replay *r, uint64_t page, uint64_t count, int pinned) {
    if (!within(r, page, count))
        return -EINVAL;
    pthread_mutex_lock(&r->mu);
    for (uint64_t p = page; p < page + count; p++)
        r->bits[p] = pinned ? r->bits[p] | RP_PINNED : r->bits[p] & (uint8_t)~RP_PINNED;
    pthread_mutex_unlock(&r->mu);
    return 0;
}

int edm_replay_fail(struct edm_replay *r, int call, uint32_t after, uint32_t count, int error) {
    if (call < 0 || call >= EDM_REPLAY_CALLS || error <= 0)
        return -EINVAL;
    pthread_mutex_lock(&r->mu);
    r->fail[call].after = after;
    r->fail[call].count = count;
    r->fail[call].error = error;
    pthread_mutex_unlock(&r->mu);
    return 0;
}
