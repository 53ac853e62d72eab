// The kernel's side of a replayed program: what userfaultfd does, over an arena in this process, for tests and for
// traces on machines that allow no userfaultfd. Source: fs/userfaultfd.c, mm/userfaultfd.c, userfaultfd(2).
//
// Where the two could differ the kernel's way is taken: EEXIST wakes nobody; while an address-space event is unread, or
// its system call has not gone on, every call but wake says EAGAIN; faults are read before events.
#include "replay.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <unistd.h>

#define LOOK_FOR_STOP_NS 20000000u

struct edm_replay *replay_new(struct edm_engine *g, uint64_t pages) {
    struct edm_replay *r = xcalloc(1, sizeof *r);
    r->engine = g;
    r->pages = pages;
    r->refs = 2;
    pthread_mutex_init(&r->mu, NULL);
    pthread_cond_init(&r->attach, NULL);
    r->readable = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    r->bits = calloc(pages, 1);
    r->arena =
        mmap(NULL, pages * PAGE_SIZE_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    r->staging = mmap(NULL, EDM_STAGING_PAGES * PAGE_SIZE_, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (r->arena == MAP_FAILED)
        r->arena = NULL;
    if (r->staging == MAP_FAILED)
        r->staging = NULL;
    if (r->arena && r->staging && r->bits && r->readable >= 0)
        return r;
    int e = r->readable < 0 ? errno : ENOMEM;
    r->refs = 1;
    replay_unref(r);
    errno = e;
    return NULL;
}

void replay_unref(struct edm_replay *r) {
    if (--r->refs)
        return;
    if (r->readable >= 0)
        close(r->readable);
    if (r->arena)
        munmap(r->arena, r->pages * PAGE_SIZE_);
    if (r->staging)
        munmap(r->staging, EDM_STAGING_PAGES * PAGE_SIZE_);
    free(r->bits);
    pthread_cond_destroy(&r->attach);
    pthread_mutex_destroy(&r->mu);
    free(r);
}

static bool any_unread(const struct waiter *w) {
    for (; w; w = w->next)
        if (!w->read && !w->woken)
            return true;
    return false;
}

void replay_signal(struct edm_replay *r) {
    uint64_t x = 1;
    if (r->readable < 0)
        return;
    if (any_unread(r->faults) || any_unread(r->events))
        (void)!write(r->readable, &x, sizeof x);  // EAGAIN: it is readable already
    else
        (void)!read(r->readable, &x, sizeof x);  // EAGAIN: it was not
}

void replay_append(struct edm_replay *r, struct waiter **list, struct waiter *w) {
    while (*list)
        list = &(*list)->next;
    *list = w;
    w->next = NULL;
    w->read = w->woken = false;
    pthread_cond_init(&w->wake, NULL);
    replay_signal(r);
}

// edm_engine_stop knows nothing of replay, and a userfaultfd would let its threads wait for ever: so look now and then.
int replay_wait(struct edm_replay *r, struct waiter **list, struct waiter *w, bool event) {
    int result = 0;
    while (!(event ? w->read : w->woken) && !result) {
        uint64_t until = now_ns() + LOOK_FOR_STOP_NS;
        struct timespec t = {.tv_sec = (time_t)(until / 1000000000u), .tv_nsec = (long)(until % 1000000000u)};
        pthread_cond_clockwait(&w->wake, &r->mu, CLOCK_MONOTONIC, &t);
        if (r->gone)
            result = -ESRCH;
        else if (atomic_load(&r->engine->stop))
            result = -ESHUTDOWN;
    }
    while (*list != w)
        list = &(*list)->next;
    *list = w->next;
    pthread_cond_destroy(&w->wake);
    return result;
}

static void wake_pages(struct edm_replay *r, uint64_t page, uint64_t count) {
    for (struct waiter *w = r->faults; w; w = w->next) {
        uint64_t at = w->msg.arg.pagefault.address >> PAGE_SHIFT;
        if (at < page || at - page >= count)
            continue;
        w->woken = true;
        pthread_cond_signal(&w->wake);
    }
}

// Pages of the program that are no longer there; their mapping too, if unmapped.
void replay_drop(struct edm_replay *r, uint64_t a, uint64_t n, bool unmap) {
    for (uint64_t p = a; p < a + n; p++) {
        r->present -= r->bits[p] & RP_PRESENT;
        r->bits[p] &= unmap ? RP_PINNED : RP_PINNED | RP_REGISTERED;
    }
}

// ---- source_ops

// Not applied to wake: it works at all times.
static int begin(struct edm_replay *r, int call, uint64_t page) {
    pthread_mutex_lock(&r->mu);
    if (r->gone)
        return -ESRCH;
    if (r->changing)
        return -EAGAIN;
    if (page >= r->pages || !(r->bits[page] & RP_REGISTERED))
        return -ENOENT;
    if (r->fail[call].after) {
        r->fail[call].after--;
    } else if (r->fail[call].count) {
        r->fail[call].count--;
        return -r->fail[call].error;
    }
    return 0;
}

static int end(struct edm_replay *r, uint64_t page, int result) {
    if (result == 0)
        wake_pages(r, page, 1);
    pthread_mutex_unlock(&r->mu);
    return result;
}

static int install(struct space *s, int call, uint64_t page, const void *data, uint8_t bits) {
    struct edm_replay *r = s->replay;
    int result = begin(r, call, page);
    // Only a copy may replace a poisoned page: mfill_atomic_install_pte in mm/userfaultfd.c.
    if (!result && r->bits[page] & (call == EDM_REPLAY_COPY ? RP_PRESENT : RP_PRESENT | RP_POISONED))
        result = -EEXIST;
    if (!result) {
        if (data)
            memcpy(r->arena + page * PAGE_SIZE_, data, PAGE_SIZE_);
        else
            memset(r->arena + page * PAGE_SIZE_, 0, PAGE_SIZE_);
        r->bits[page] = (r->bits[page] & RP_PINNED) | RP_REGISTERED | bits;
        r->present += bits & RP_PRESENT;
    }
    return end(r, page, result);
}

static int install_run(struct space *s, int call, uint64_t page, uint32_t count, const uint8_t *data, uint8_t bits) {
    for (uint32_t i = 0; i < count; i++) {
        int r = install(s, call, page + i, data ? data + i * PAGE_SIZE_ : NULL, bits);
        if (r)
            return i ? (int)i : r;
    }
    return (int)count;
}

static int zero(struct space *s, uint64_t page, uint32_t count) {
    return install_run(s, EDM_REPLAY_ZERO, page, count, NULL, RP_PRESENT);
}

static int copy(struct space *s, uint64_t page, uint32_t count, const void *data, bool protect) {
    return install_run(s, EDM_REPLAY_COPY, page, count, data, RP_PRESENT | (protect ? RP_PROTECTED : 0));
}

static int poison(struct space *s, uint64_t page) { return install(s, EDM_REPLAY_POISON, page, NULL, RP_POISONED); }

static int unprotect(struct space *s, uint64_t page) {
    struct edm_replay *r = s->replay;
    int result = begin(r, EDM_REPLAY_UNPROTECT, page);
    if (!result)
        r->bits[page] &= (uint8_t)~RP_PROTECTED;
    return end(r, page, result);
}

static int wake(struct space *s, uint64_t page, uint64_t count) {
    struct edm_replay *r = s->replay;
    pthread_mutex_lock(&r->mu);
    wake_pages(r, page, count);
    pthread_mutex_unlock(&r->mu);
    return 0;
}

static int take_messages(struct waiter *w, struct uffd_msg *m, int max, bool wake_it) {
    int n = 0;
    for (; w && n < max; w = w->next) {
        if (w->read || w->woken)
            continue;
        w->read = true;
        m[n++] = w->msg;
        if (wake_it)
            pthread_cond_signal(&w->wake);
    }
    return n;
}

static int read_messages(struct space *s, struct uffd_msg *m, int max) {
    struct edm_replay *r = s->replay;
    pthread_mutex_lock(&r->mu);
    int faults = take_messages(r->faults, m, max, false);
    int events = take_messages(r->events, m + faults, max - faults, true);
    s->generation += (uint32_t)events;
    replay_signal(r);
    pthread_mutex_unlock(&r->mu);
    return faults + events ? faults + events : -EAGAIN;
}

// One page on its way out; false when an address-space change stands in the way.
static bool move_page(struct edm_replay *r, const struct move_batch *b, struct move_window *w, int i, uint8_t *data) {
    uint64_t page = w->base + (uint64_t)i, bit = 1ull << i;
    if (r->changing || r->gone || b->generation != r->space->generation)
        return false;
    if (page >= r->pages || !(r->bits[page] & RP_PRESENT))
        return true;
    bool keep = w->clean & bit;
    // A page shared since a fork must be written to before it can move, and a protected one must not be.
    if (r->bits[page] & RP_PINNED || (keep && r->bits[page] & RP_SHARED)) {
        w->busy |= bit;
        return true;
    }
    if (!keep)
        memcpy(data, r->arena + page * PAGE_SIZE_, PAGE_SIZE_);
    // Whoever still looks at the arena there must see that the page is gone.
    memset(r->arena + page * PAGE_SIZE_, 0xdb, PAGE_SIZE_);
    r->bits[page] = RP_REGISTERED;
    r->present--;
    w->moved |= bit;
    return true;
}

static uint8_t *staging_at(struct edm_replay *r, uint32_t window, int page) {
    return r->staging + ((size_t)window * LEAF_PAGES + (size_t)page) * PAGE_SIZE_;
}

static int move_out(struct space *s, struct move_batch *b) {
    struct edm_replay *r = s->replay;
    for (uint32_t k = 0; k < b->n; k++) {
        struct move_window *w = &b->w[k];
        w->moved = w->busy = 0;
        // As the kernel's move does: across what is not there, and whatever has come there meanwhile goes along.
        uint64_t highest = w->mask ? 1ull << (63 - __builtin_clzll(w->mask)) : 0, lowest = w->mask & -w->mask;
        uint64_t between = (highest - lowest) | highest;
        for (uint64_t m = (w->mask | w->pass) & between; m; m &= m - 1) {
            int i = __builtin_ctzll(m);
            pthread_mutex_lock(&r->mu);
            bool on = move_page(r, b, w, i, staging_at(r, k, i));
            pthread_mutex_unlock(&r->mu);
            if (!on)
                return -EAGAIN;
        }
    }
    return 0;
}

static void read_out(struct space *s, struct move_batch *b) {
    uint32_t n = 0;
    for (uint32_t k = 0; k < b->n; k++)
        for (uint64_t m = move_to_read(&b->w[k]); m; m &= m - 1)
            memcpy(b->into[n++], staging_at(s->replay, k, __builtin_ctzll(m)), PAGE_SIZE_);
}

static void drop_out(struct space *s, uint32_t windows) {
    (void)s, (void)windows;  // what is in staging is never looked at again
}

// Which child a fork event means: its eventfd stands where the kernel puts the new userfaultfd.
static struct edm_replay *newborn_take(struct edm_replay *parent, uint32_t fd) {
    struct edm_replay **at = &parent->newborn, *child;
    pthread_mutex_lock(&parent->mu);
    while ((child = *at) && (uint32_t)child->readable != fd)
        at = &child->newborn;
    if (child) {
        *at = child->newborn;
        child->newborn = NULL;
    }
    pthread_mutex_unlock(&parent->mu);
    return child;
}

static void attach(struct edm_replay *r, struct space *s) {
    r->space = s;
    r->attached = true;
    s->replay = r;
    s->uffd = r->readable;
    s->ready = true;
    pthread_cond_broadcast(&r->attach);
}

// What its mappings were when the address space was copied, which an event read later may have changed in the parent.
static void look_at_mappings(struct edm_replay *r, struct space *s) {
    for (uint64_t a = 0, b; a < r->pages; a = b) {
        bool registered = r->bits[a] & RP_REGISTERED;
        for (b = a + 1; b < r->pages && !(r->bits[b] & RP_REGISTERED) == !registered;)
            b++;
        if (registered)
            ranges_add(&s->known, a, b);
        else
            space_forget(s, a, b);
    }
    for (uint64_t p = 0; p < r->pages; p++)
        if (r->bits[p] & RP_PRESENT && r->bits[p] & RP_REGISTERED) {
            struct leaf *l = lspt_leaf_make(&s->lspt, s, p);
            if (state_new((enum page_state)l->e[p % LEAF_PAGES].state))
                entry_resident(s, l, &l->e[p % LEAF_PAGES], p);
        }
}

static int forked(struct space *s, const struct uffd_msg *m) {
    struct edm_replay *r = newborn_take(s->parent->replay, m->arg.fork.ufd);
    if (!r)
        return -ESRCH;
    pthread_mutex_lock(&r->mu);
    attach(r, s);
    look_at_mappings(r, s);
    pthread_mutex_unlock(&r->mu);
    return uffd_watch(s);
}

static bool gone(struct space *s) {
    struct edm_replay *r = s->replay;
    pthread_mutex_lock(&r->mu);
    bool is = r->gone;
    pthread_mutex_unlock(&r->mu);
    return is;
}

static void leave(struct edm_replay *r) {
    r->gone = r->attached = true;
    r->space = NULL;
    wake_pages(r, 0, UINT64_MAX);
    for (struct waiter *w = r->events; w; w = w->next)
        pthread_cond_signal(&w->wake);
    pthread_cond_broadcast(&r->attach);
}

static void retire(struct space *s) {
    struct edm_replay *r = s->replay, *next;
    if (!r)
        return;
    epoll_ctl(s->engine->epoll, EPOLL_CTL_DEL, s->uffd, NULL);
    s->uffd = -1;
    s->replay = NULL;
    pthread_mutex_lock(&r->mu);
    leave(r);
    struct edm_replay *newborn = r->newborn;
    r->newborn = NULL;
    pthread_mutex_unlock(&r->mu);
    for (; newborn; newborn = next) {
        next = newborn->newborn;
        pthread_mutex_lock(&newborn->mu);
        leave(newborn);
        pthread_mutex_unlock(&newborn->mu);
        replay_unref(newborn);
    }
    replay_unref(r);
}

static const struct source_ops replay_ops = {.read = read_messages,
                                             .zero = zero,
                                             .copy = copy,
                                             .unprotect = unprotect,
                                             .wake = wake,
                                             .poison = poison,
                                             .move_out = move_out,
                                             .read_out = read_out,
                                             .drop_out = drop_out,
                                             .forked = forked,
                                             .gone = gone,
                                             .retire = retire};

struct edm_replay *edm_replay_open(struct edm_engine *g, uint32_t instance, uint64_t pages) {
    if (!pages || pages > LSPT_MAX_PAGE) {
        errno = EINVAL;
        return NULL;
    }
    struct edm_replay *r = replay_new(g, pages);
    if (!r)
        return NULL;
    memset(r->bits, RP_REGISTERED, pages);
    pthread_mutex_lock(&g->mu);
    g->instance = instance;
    struct space *s = space_new(g, &replay_ops);
    attach(r, s);
    ranges_add(&s->known, 0, pages);
    int e = -uffd_watch(s);
    if (e)
        space_retire(s);
    pthread_mutex_unlock(&g->mu);
    if (!e)
        return r;
    replay_unref(r);
    errno = e;
    return NULL;
}
