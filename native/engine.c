// The engine as a whole: making it, stopping it, its counters; and the small pieces every file uses.
#include "engine.h"

#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#define BARE_NS 1000000000u  // a sidecar ends with its program, a moment before that is seen

uint64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

// Running out of memory for the tables leaves no way to keep the programs' pages right: end, and let the holder and
// the launcher do their part (the programs wait; they never read wrong bytes).
static void *checked(void *p) {
    if (!p) {
        static const char text[] = "edm: out of memory for the page tables\n";
        (void)!write(2, text, sizeof text - 1);
        abort();
    }
    return p;
}

void *xcalloc(size_t n, size_t size) { return checked(calloc(n, size)); }
void *xrealloc(void *p, size_t size) { return checked(realloc(p, size)); }

void engine_error(struct edm_engine *g, const char *format, ...) {
    g->count.internal_errors++;
    if (g->error[0])
        return;
    va_list ap;
    va_start(ap, format);
    vsnprintf(g->error, sizeof g->error, format, ap);
    va_end(ap);
}

void engine_kick(struct edm_engine *g) {
    uint64_t one = 1;
    (void)!write(g->kick, &one, sizeof one);  // EAGAIN: it is readable already
}

void queue_push(struct fault_queue *q, struct space *s, uint64_t page, uint32_t flags) {
    queue_fault(q, (struct fault){s, page, flags, 0});
}

void queue_fault(struct fault_queue *q, struct fault f) {
    if (q->n == q->cap) {
        uint32_t cap = q->cap ? q->cap * 2 : 64;
        struct fault *v = xcalloc(cap, sizeof *v);
        for (uint32_t i = 0; i < q->n; i++)
            v[i] = q->v[(q->head + i) % q->cap];
        free(q->v);
        q->v = v;
        q->cap = cap;
        q->head = 0;
    }
    q->v[(q->head + q->n++) % q->cap] = f;
    f.space->refs++;
}

// The caller takes over the queue's reference to the space.
bool queue_pop(struct fault_queue *q, struct fault *out) {
    if (!q->n)
        return false;
    *out = q->v[q->head];
    q->head = (q->head + 1) % q->cap;
    q->n--;
    return true;
}

static void *map_pages(uint64_t pages) {
    void *p =
        mmap(NULL, pages * PAGE_SIZE_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    return p == MAP_FAILED ? NULL : p;
}

struct edm_engine *engine_alloc(const struct edm_engine_config *config) {
    struct edm_engine *g = calloc(1, sizeof *g);
    if (!g)
        return NULL;
    g->cfg = *config;
    g->former[0] = g->former[1] = -1;
    g->epoll = g->kick = g->listen_fd = g->dev_fd = g->state_fd = g->idle_fd = g->latency_fd = -1;
    g->home = g->lpet_cpu = g->out_cpu = -1;
    sched_getaffinity(0, sizeof g->cpus, &g->cpus);
    return g;
}

int lpet_start(struct edm_engine *g) {
    if (pthread_create(&g->lpet, NULL, lpet_thread, g))
        return -EAGAIN;
    g->lpet_running = true;
    return 0;
}

// Tables over the segment, and the threads' buffers; no thread yet where spaces are to be adopted first.
int engine_make(struct edm_engine *g) {
    g->epoll = epoll_create1(EPOLL_CLOEXEC);
    g->kick = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    struct epoll_event ev = {.events = EPOLLIN, .data.ptr = NULL};
    if (g->epoll < 0 || g->kick < 0 || epoll_ctl(g->epoll, EPOLL_CTL_ADD, g->kick, &ev))
        goto fail;
    pthread_condattr_t mono;
    pthread_condattr_init(&mono);
    pthread_condattr_setclock(&mono, CLOCK_MONOTONIC);
    pthread_mutex_init(&g->mu, NULL);
    pthread_cond_init(&g->lpet_wake, &mono);
    pthread_cond_init(&g->outbox_wake, &mono);
    pthread_cond_init(&g->handshake_done, &mono);
    pthread_condattr_destroy(&mono);
    budget_set(g);

    g->nslots = g->spare_slot = g->state->slots;
    g->slot = calloc(g->nslots_all + 1, sizeof *g->slot);
    g->out_pages = map_pages(EDM_OUTBOX_BATCH);
    g->out_refs = calloc(EDM_OUTBOX_BATCH, sizeof *g->out_refs);
    g->batch = batch_new();
    g->own_policy = edm_policy_scan(75);
    g->policy = (const struct edm_policy_ops *)g->own_policy;
    g->zeros = map_pages(MAX_FETCH);
    g->nfetch = MAX_WORKERS * MAX_FETCH;
    g->fetch = calloc(g->nfetch + 1, sizeof *g->fetch);
    if (!g->slot || !g->out_pages || !g->out_refs || !g->batch || !g->own_policy || !g->zeros || !g->fetch)
        goto fail;
    outbox_again(g);
    acknowledged_again(g);
    for (uint32_t i = g->nslots; i-- > 0;)
        if (!g->slot[i].refs) {
            g->slot[i].next_free = g->free_slot;
            g->free_slot = i + 1;
        }
    for (uint32_t i = 0; i < g->nfetch; i++)
        g->fetch[i].next_free = i + 2 <= g->nfetch ? i + 2 : 0;
    g->free_fetch = 1;
    for (int i = 0; i < MAX_WORKERS; i++) {
        g->worker[i].refs = calloc(MAX_FETCH, sizeof *g->worker[i].refs);
        g->worker[i].pages = map_pages(MAX_FETCH);
        g->worker[i].cpu = g->worker[i].seen_cpu = -1;
        if (!g->worker[i].refs || !g->worker[i].pages)
            goto fail;
    }
    return g->adopted ? 0 : lpet_start(g);
fail:
    return errno ? -errno : -ENOMEM;
}

static uint32_t buffer_slots(const struct edm_engine_config *config) {
    return (uint32_t)(config->write_back_pages ? config->write_back_pages : EDM_BATCH_PAGES);
}

struct edm_engine *edm_engine_new(const struct edm_engine_config *config) {
    struct edm_engine *g = engine_alloc(config);
    int r = g ? state_create(g, buffer_slots(config)) : -errno;
    if (!r)
        r = engine_make(g);
    return engine_or_errno(g, r);
}

struct edm_engine *engine_or_errno(struct edm_engine *g, int r) {
    if (!r)
        return g;
    edm_engine_free(g);
    errno = -r;
    return NULL;
}

void edm_engine_stop(struct edm_engine *g) {
    atomic_store(&g->stop, 1);
    engine_kick(g);
    pthread_mutex_lock(&g->mu);
    pthread_cond_broadcast(&g->lpet_wake);
    pthread_cond_broadcast(&g->outbox_wake);
    for (uint32_t i = 0; i < g->nspaces; i++)
        pthread_cond_broadcast(&g->space[i]->idle);
    pthread_mutex_unlock(&g->mu);
}

static void unmap_pages(void *p, uint64_t pages) {
    if (p)
        munmap(p, pages * PAGE_SIZE_);
}

// Call after edm_engine_stop, when no other thread is inside an engine call.
void edm_engine_free(struct edm_engine *g) {
    if (!g)
        return;
    if (g->lpet_running || g->capture_running) {
        edm_engine_stop(g);
        idle_stop(g);
        if (g->capture_running)
            pthread_join(g->capture, NULL);
        if (g->lpet_running)
            pthread_join(g->lpet, NULL);
        pthread_mutex_lock(&g->mu);
        while (g->handshakes)
            pthread_cond_wait(&g->handshake_done, &g->mu);
        struct fault f;
        struct fault_queue *q[] = {&g->waiting, &g->retry, &g->ready};
        for (int i = 0; i < 3; i++)
            while (queue_pop(q[i], &f))
                space_unref(f.space);
        for (uint32_t i = 0; i < g->nspaces; i++)
            g->space[i]->refs++;
        uint32_t n = g->nspaces;
        struct space **all = g->space;
        for (uint32_t i = 0; i < n; i++)
            if (!all[i]->dead)
                space_retire(all[i]);
        for (uint32_t i = 0; i < g->nfetch; i++)
            if (g->fetch[i].used)
                space_unref(g->fetch[i].space);
        for (uint32_t i = 0; i < g->nitems; i++)
            if (g->item[i].state != OB_FREE && g->item[i].space)
                space_unref(g->item[i].space);
        while (g->nspaces) {
            g->space[0]->refs = 1;
            space_unref(g->space[0]);
        }
        pthread_mutex_unlock(&g->mu);
    }
    free(g->space);
    for (int i = 0; i < MAX_WORKERS; i++) {
        worker_forget_thread(&g->worker[i]);
        free(g->worker[i].refs);
        unmap_pages(g->worker[i].pages, MAX_FETCH);
    }
    free(g->waiting.v);
    free(g->retry.v);
    free(g->ready.v);
    free(g->fetch);
    free(g->slot);
    free(g->out_refs);
    state_close(g);
    unmap_pages(g->out_pages, EDM_OUTBOX_BATCH);
    batch_free(g->batch);
    edm_policy_free(g->own_policy);
    unmap_pages(g->zeros, MAX_FETCH);
    trace_free(g);
    int fds[] = {g->epoll, g->kick, g->listen_fd, g->dev_fd, g->idle_fd, g->former[0], g->former[1]};
    for (int i = 0; i < 7; i++)
        if (fds[i] >= 0)
            close(fds[i]);
    free(g);
}

void edm_engine_counters(struct edm_engine *g, struct edm_counters *out) {
    pthread_mutex_lock(&g->mu);
    *out = g->count;
    out->resident = g->resident;
    out->staged = g->slots_used;
    out->asked = g->inbound;
    out->limit_pages = g->limit;
    out->high_pages = g->high;
    out->low_pages = g->low;
    uint64_t now = now_ns();
    for (uint32_t i = 0; i < g->nspaces; i++) {
        out->spaces += !g->space[i]->dead;
        out->bare += !g->space[i]->dead && g->space[i]->bare_ns && now - g->space[i]->bare_ns > BARE_NS;
        out->lspt_bytes += g->space[i]->lspt.leaves * sizeof(struct leaf);
    }
    pthread_mutex_unlock(&g->mu);
}

const char *edm_engine_error(struct edm_engine *g) { return g->error; }

int edm_engine_pids(struct edm_engine *g, int32_t *out, int max) {
    int n = 0;
    pthread_mutex_lock(&g->mu);
    for (uint32_t i = 0; i < g->nspaces && n < max; i++)
        if (!g->space[i]->dead && g->space[i]->pid > 0)
            out[n++] = g->space[i]->pid;
    pthread_mutex_unlock(&g->mu);
    return n;
}

struct edm_page_ref *edm_worker_refs(struct edm_engine *g, int worker) {
    return worker >= 0 && worker < MAX_WORKERS ? g->worker[worker].refs : NULL;
}

uint8_t *edm_worker_pages(struct edm_engine *g, int worker) {
    return worker >= 0 && worker < MAX_WORKERS ? g->worker[worker].pages : NULL;
}
