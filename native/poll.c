// A fault worker's round: what was put off, what there is to be read, and the fetching of what both need.
#include <errno.h>
#include <sched.h>
#include <sys/epoll.h>
#include <unistd.h>

#include "engine.h"

#define SPIN_WORTH 4     // spinning is given up when no fault came for so many times its length
#define YIELDS 16        // tries in a row of what was put off, before sleeping between them
#define MISSES 8         // reads in a row that found nothing, until it is tried
#define MISSED_TRIES 32  // … every so many times only
#define LOOK_ROUND 16    // reads of one space in a row, before the others are looked at
#define PAUSES 8
#define YIELD_EVERY 4
#define CROWDED_NS 10000        // an offer of the CPU that takes so long let somebody else run
#define CROWDED_WAITS 64        // … and up to so many waits sleep at once
#define TURN_NS 500000          // a whole turn of somebody else's: what EDM's own threads do at once takes less
#define TURNS_NEAR_NS 50000000  // two so close to each other: all CPUs are wanted

static bool live(const struct edm_engine *g, const struct space *s) {
    for (uint32_t k = 0; k < g->nspaces; k++)
        if (g->space[k] == s)
            return !s->dead;
    return false;
}

static void take_queue(struct edm_engine *g, struct fault_queue *q, int worker) {
    struct fault f;
    for (uint32_t n = q->n; n > 0 && g->worker[worker].n < MAX_FETCH && queue_pop(q, &f); n--) {
        if (f.space->applying && !f.space->dead)
            queue_fault(&g->retry, f);
        else
            fault_take(g, worker, f);
        space_unref(f.space);
    }
}

// Look for the next fault without sleeping; what epoll_wait returned. Where faults come one after the other from
// another CPU, this is cheaper than being woken for each. Not where the program is on this CPU: it can go on only
// when this thread gives the CPU up. Nor where others want the CPU, to whom each offer of it would give a whole turn.
static int spin(struct edm_engine *g, struct worker *w, struct epoll_event *ev, int max) {
    uint64_t now = now_ns(), spin_ns = (uint64_t)g->cfg.spin_us * 1000u, end = now + spin_ns;
    if (w->beside || now - w->served_ns >= SPIN_WORTH * spin_ns)
        return 0;
    if (w->crowded) {
        w->crowded--;
        return 0;
    }
    bool elsewhere = g->cfg.idle == EDM_IDLE_AWAKE && !cpus_crowded(g);
    for (uint32_t tries = 0; now < end && !atomic_load(&g->stop);) {
        int n = epoll_wait(g->epoll, ev, max, 0);
        if (n > 0) {
            w->crowd = 0;
            return n;
        }
        // Where no CPU sleeps, the program is on another than this one.
        for (int i = 0; i < PAUSES && elsewhere; i++)
            __builtin_ia32_pause();
        uint64_t then = now;
        if (!elsewhere || ++tries % YIELD_EVERY == 0)
            sched_yield();
        now = now_ns();
        if (now - then > CROWDED_NS) {
            w->crowd = w->crowd < CROWDED_WAITS / 2 ? w->crowd * 2 + 1 : CROWDED_WAITS;
            w->crowded = w->crowd;
            if (elsewhere && now - then > TURN_NS) {
                if (now - w->turn_ns < TURNS_NEAR_NS)
                    cpus_found_crowded(g);
                w->turn_ns = now;
            }
            return 0;
        }
    }
    return 0;
}

// Sleep until a uffd is readable, the engine is kicked, or a fault that was put off is due.
static int wait_readable(struct edm_engine *g, struct worker *w, struct epoll_event *ev, int max, int timeout_us,
                         bool soon) {
    int n = soon || !timeout_us ? 0 : spin(g, w, ev, max);
    if (n)
        return n;
    // A fault is put off while a system call that changes the address space goes on: its thread needs a CPU, not time.
    if (!soon)
        w->yields = 0;
    else if (w->yields++ < YIELDS) {
        sched_yield();
        return epoll_wait(g->epoll, ev, max, 0);
    }
    int us = soon ? 50 : timeout_us;
    struct timespec t = {.tv_sec = us / 1000000, .tv_nsec = (long)(us % 1000000) * 1000};
    return epoll_pwait2(g->epoll, ev, max, &t, NULL);
}

// Where faults come one after the other, the next is most often there already, and of the same space: the program may
// have been let go on, and have faulted again, before UFFDIO_COPY came back. It is read without asking first what is to
// be read, as long as that mostly succeeds. Not while the sidecar moves pages, which keeps others from reading.
static bool read_again(struct edm_engine *g, struct worker *w, int worker) {
    if (!w->last || (w->misses >= MISSES && ++w->misses % MISSED_TRIES))
        return false;
    if (++w->in_a_row >= LOOK_ROUND || pthread_mutex_trylock(&g->mu)) {
        w->in_a_row = 0;
        return false;
    }
    struct space *s = w->last;
    bool found = false;
    if (live(g, s) && !s->batch_busy && !s->dropping) {
        found = space_read(g, s, worker) > 0;
        w->misses = found ? 0 : w->misses + 1;
    }
    pthread_mutex_unlock(&g->mu);
    return found;
}

void edm_worker_channel(struct edm_engine *g, int worker, const void *ops) {
    if (worker >= 0 && worker < MAX_WORKERS)
        g->worker[worker].channel = ops;
}

// The whole batch through the worker's own channel; false: Python is to do it.
static bool fetch_here(struct edm_engine *g, int worker) {
    struct worker *w = &g->worker[worker];
    if (!w->channel || w->channel->fetch(w->channel->self, w->refs, w->n, w->pages))
        return false;
    edm_resolve(g, worker, (int)w->n);
    return true;
}

int edm_poll(struct edm_engine *g, int worker, int timeout_us) {
    if (worker < 0 || worker >= MAX_WORKERS)
        return -EINVAL;
    struct worker *w = &g->worker[worker];
    struct epoll_event ev[16];
    uint64_t end = now_ns() + (uint64_t)timeout_us * 1000u;
    for (;;) {
        if (atomic_load(&g->stop))
            return -ESHUTDOWN;
        pthread_mutex_lock(&g->mu);
        take_queue(g, &g->ready, worker);
        take_queue(g, &g->retry, worker);
        bool soon = g->retry.n || g->ready.n;
        uint32_t have = w->n;
        pthread_mutex_unlock(&g->mu);
        bool again = !have && !soon && read_again(g, w, worker);
        int n = again ? 0 : wait_readable(g, w, ev, 16, have ? 0 : timeout_us, soon);
        if (n < 0 && errno != EINTR)
            return -errno;
        pthread_mutex_lock(&g->mu);
        for (int i = 0; i < n; i++) {
            struct space *s = ev[i].data.ptr;
            if (!s) {
                uint64_t x;
                (void)!read(g->kick, &x, sizeof x);  // EAGAIN: another worker took it
                if (atomic_load(&g->stop))
                    engine_kick(g);
                continue;
            }
            if (live(g, s)) {  // it may have been retired since epoll_wait returned
                space_read(g, s, worker);
                w->last = s;
            }
        }
        have = w->n;
        pthread_mutex_unlock(&g->mu);
        if ((again || n > 0) && g->cfg.spin_us)
            w->served_ns = now_ns();
        if (have)
            point(POINT_fetch_asked);
        if (have && !fetch_here(g, worker))
            return (int)have;
        if (now_ns() >= end)
            return 0;
    }
}
