// Going on where another DM-Handler was killed. The holder has its descriptors and the segment of state.h; the kernel
// knows which pages the programs have, the DMS what it has acknowledged, and the segment has the rest.
//
// The LSPT is made anew: what is in the outbox is staged, what the pagemap shows is resident, and of a page that is
// neither the DMS is asked (space.asks). Threads that wait for a fault are woken, and raise it again.
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

#include "crc32c.h"
#include "engine.h"

#define FIRST_PAGE 16        // none lower may be mapped
#define REST_NS 5000000000u  // a sidecar still busy after this is ended
#define END_MS 10000         // for a process that was killed

static int copy_fd(int holder, int fd) { return fd < 0 ? -1 : (int)syscall(SYS_pidfd_getfd, holder, fd, 0); }

static bool state_valid(const struct edm_engine *g, const struct state_space *t) {
    return t->used && t->born <= g->state->committed;
}

// Whether the process still holds this very segment: a pid may be another's by now.
static bool holds_segment(const struct edm_engine *g, int holder, uint32_t turn) {
    struct stat ours, theirs;
    int fd = copy_fd(holder, g->state->segment[turn]);
    bool same = fd >= 0 && !fstat(fd, &theirs) && !fstat(g->state_fd, &ours) && ours.st_ino == theirs.st_ino;
    if (fd >= 0)
        close(fd);
    return same;
}

// All descriptors that matter into this process's table, their numbers into the other half of each pair.
static int descriptors_take(struct edm_engine *g, int holder, uint32_t old) {
    uint32_t now = 1 - old;
    g->turn = old;
    g->state->segment[now] = g->state_fd;
    g->state->listen[now] = g->listen_fd = copy_fd(holder, g->state->listen[old]);
    g->state->dev[now] = g->dev_fd = copy_fd(holder, g->state->dev[old]);
    for (uint32_t i = 0; i < g->state->spaces; i++) {
        struct state_space *t = &g->state_space[i];
        if (!state_valid(g, t))
            continue;
        t->uffd[now] = copy_fd(holder, t->uffd[old]);
        t->ctl[now] = copy_fd(holder, t->ctl[old]);
        if (t->uffd[old] >= 0 && t->uffd[now] < 0)
            return -errno;
        for (uint32_t k = 0; k < STATE_EVENTS && t->event[k].event; k++)
            if (t->event[k].event == UFFD_EVENT_FORK) {
                int child = copy_fd(holder, event_uffd(g, &t->event[k]));
                if (child < 0)
                    return -errno;
                event_uffd_again(g, &t->event[k], child);
            }
    }
    g->turn = now;
    return point_fails(POINT_adopt_taken, NULL) ? -EMFILE : 0;
}

// A DM-Handler that died while it adopted may have come as far as a holder of its own: then that one is up to date.
static int descriptors_find(struct edm_engine *g, int32_t holder_pid, int32_t segment) {
    int holder = g->former[0] = (int)syscall(SYS_pidfd_open, holder_pid, 0);
    int fd = holder >= 0 ? copy_fd(holder, segment) : -1;
    int r = fd < 0 ? -errno : state_take_over(g, fd);
    if (r)
        return r;
    uint32_t turn = g->state->turn;
    if (g->state->holder[turn] == holder_pid)
        return descriptors_take(g, holder, turn);
    int last = g->former[1] = (int)syscall(SYS_pidfd_open, g->state->holder[turn], 0);
    if (last >= 0 && holds_segment(g, last, turn))
        return descriptors_take(g, last, turn);
    if (last >= 0)  // another's pid by now
        close(last);
    g->former[1] = -1;
    return descriptors_take(g, holder, 1 - turn);
}

struct edm_engine *edm_engine_adopt(const struct edm_engine_config *config, int32_t holder, int32_t segment) {
    struct edm_engine *g = engine_alloc(config);
    int r = g ? descriptors_find(g, holder, segment) : -errno;
    if (!r) {
        g->adopted = true;
        r = engine_make(g);
    }
    return engine_or_errno(g, r);
}

void edm_engine_release(struct edm_engine *g) {
    for (int i = 0; i < 2; i++)
        if (g->former[i] >= 0) {
            syscall(SYS_pidfd_send_signal, g->former[i], SIGKILL, NULL, 0);
            // Until its copies are closed, the locks of the stores among them.
            struct pollfd p = {g->former[i], POLLIN, 0};
            poll(&p, 1, END_MS);
            close(g->former[i]);
            g->former[i] = -1;
        }
    point(POINT_adopt_released);
}

int32_t edm_engine_segment(struct edm_engine *g) { return g->state_fd; }

// To the sidecars of programs that have not been taken over yet: they end a program that nobody serves.
static void sidecars_tell(struct edm_engine *g, int32_t holder) {
    for (uint32_t i = 0; i < g->state->spaces; i++) {
        struct state_space *t = &g->state_space[i];
        struct edm_ctl *c = state_valid(g, t) && t->ctl[g->turn] >= 0 ? ctl_map(t->ctl[g->turn]) : NULL;
        if (!c)
            continue;
        c->handler_pid = getpid();
        c->holder_pid = holder;
        munmap(c, EDM_CTL_BYTES);
    }
}

void edm_engine_holder(struct edm_engine *g, int32_t pid) {
    pthread_mutex_lock(&g->mu);
    g->state->holder[g->turn] = pid;
    __atomic_store_n(&g->state->turn, g->turn, __ATOMIC_RELEASE);
    sidecars_tell(g, pid);
    holder_note(g);
    if (g->adopted)
        point(POINT_adopt_held);
    pthread_mutex_unlock(&g->mu);
}

// ---- one space

// Until the sidecar has ended what it was asked for. It may be waiting for an event of its own to be read.
static void sidecar_rest(struct space *s) {
    struct edm_ctl *c = s->ctl;
    uint64_t start = now_ns();
    uint32_t held = EDM_LOCK_ENGINE, n = 0;
    // Events count before the sidecar can move another page.
    s->generation = c->generation + STATE_EVENTS;
    __atomic_store_n(&c->generation, s->generation, __ATOMIC_RELEASE);
    __atomic_compare_exchange_n(&c->lock, &held, EDM_UNLOCKED, false, __ATOMIC_ACQ_REL, __ATOMIC_RELAXED);
    s->request = __atomic_load_n(&c->req, __ATOMIC_ACQUIRE);
    while (__atomic_load_n(&c->done, __ATOMIC_ACQUIRE) != s->request && !pidfd_dead(s->sidecar_fd)) {
        while (n < STATE_EVENTS && s->state->event[n].event)
            n++;
        if (n + 32 <= STATE_EVENTS)
            s->ops->read(s, s->state->event + n, 32);
        if (now_ns() - start > REST_NS)
            syscall(SYS_pidfd_send_signal, s->sidecar_fd, SIGKILL, NULL, 0);
        struct timespec t = {0, 100000};
        nanosleep(&t, NULL);
    }
    s->ready = !pidfd_dead(s->sidecar_fd);
}

static bool present(struct space *s, uint64_t page) {
    uint64_t entry = 0;
    return pread(s->pagemap_fd, &entry, sizeof entry, (off_t)(page * sizeof entry)) == sizeof entry && entry >> 62;
}

static bool read_page(struct space *s, uint64_t address, uint8_t *into) {
    struct iovec to = {into, PAGE_SIZE_}, from = {(void *)(uintptr_t)address, PAGE_SIZE_};
    return process_vm_readv(s->pid, &to, 1, &from, 1, 0) == (ssize_t)PAGE_SIZE_ ||
           (s->sidecar_pid > 0 && process_vm_readv(s->sidecar_pid, &to, 1, &from, 1, 0) == (ssize_t)PAGE_SIZE_);
}

static void stage_again(struct edm_engine *g, struct space *s, uint64_t page, uint32_t slot) {
    uint32_t id = outbox_push(g, EDM_OUT_EVICT, s);
    struct outbox_item *o = outbox_item_at(g, id);
    o->page = o->a = page;
    o->version = ++g->state->page_version;
    o->checksum = edm_crc32c(write_slot_data(g, slot), PAGE_SIZE_);
    o->slot = slot;
    struct lspt_entry *e = lspt_entry_make(&s->lspt, s, page);
    e->state = PS_STAGED;
    e->where = id;
    e->flags = PF_STORED;
}

// A batch was under way: its pages are in staging, and nowhere else.
static bool batch_again(struct edm_engine *g, struct space *s) {
    struct state_space *t = s->state;
    if (!t->moving)
        return true;
    t->moved_from = g->seq;
    STATE_BARRIER();
    for (uint32_t k = 0; k < t->windows && k < EDM_WINDOWS; k++)
        for (int i = 0; i < LEAF_PAGES; i++) {
            uint64_t at = s->staging + ((uint64_t)k * LEAF_PAGES + (uint64_t)i) * PAGE_SIZE_;
            if (t->window[k].clean & 1ull << i || !present(s, at >> PAGE_SHIFT))
                continue;
            int slot = write_slot_spare(g);
            if (slot < 0 || !read_page(s, at, write_slot_data(g, (uint32_t)slot)))
                return false;
            stage_again(g, s, t->window[k].base + (uint64_t)i, (uint32_t)slot);
        }
    state_commit(g);
    STATE_BARRIER();
    t->moving = 0;
    return true;
}

// What the outbox says of the space's pages, in its order: staged, or renamed since.
static void staged_again(struct edm_engine *g, struct space *s) {
    for (uint32_t id = g->head; id; id = outbox_item_at(g, id)->next) {
        struct outbox_item *o = outbox_item_at(g, id);
        if (o->region != s->region || o->space)
            continue;
        o->space = s;
        s->refs++;
        if (o->kind == EDM_OUT_MOVE) {
            space_rename(s, o->a, o->b, o->c);
        } else if (o->kind == EDM_OUT_EVICT) {
            struct lspt_entry *e = lspt_entry_make(&s->lspt, s, o->a);
            if (e->state == PS_STAGED)
                outbox_cancel(g, e->where);
            e->state = PS_STAGED;
            e->where = id;
            e->flags = PF_STORED;
        }
    }
}

// Of pages that were being copied back, those that came are the program's.
static void rescued_again(struct edm_engine *g, struct space *s) {
    for (uint32_t id = g->head; id; id = outbox_item_at(g, id)->next) {
        struct outbox_item *o = outbox_item_at(g, id);
        if (o->space != s || !o->rescuing || o->kind != EDM_OUT_EVICT || o->state != OB_QUEUED)
            continue;
        struct lspt_entry *e = lspt_entry(&s->lspt, o->page);
        o->rescuing = false;
        if (!e || e->state != PS_STAGED || e->where != id || !present(s, o->page))
            continue;
        outbox_cancel(g, id);
        e->state = PS_NEW;
        e->where = 0;
    }
}

static void stop(struct space *s, const char *why) {
    engine_error(s->engine, "process %d is stopped: %s", s->pid, why);
    if (s->pidfd >= 0)
        syscall(SYS_pidfd_send_signal, s->pidfd, SIGKILL, NULL, 0);
    else if (s->pid > 0)
        kill(s->pid, SIGKILL);
}

// Its sidecar, if there is one: by its name, as the number may be another's by now.
static void sidecar_again(struct space *s, const struct edm_ctl *c) {
    char path[32], name[16] = {0};
    s->sidecar_pid = __atomic_load_n(&c->sidecar_pid, __ATOMIC_ACQUIRE);
    s->sidecar_fd = s->sidecar_pid > 0 ? (int)syscall(SYS_pidfd_open, s->sidecar_pid, 0) : -1;
    snprintf(path, sizeof path, "/proc/%d/comm", s->sidecar_pid);
    int fd = s->sidecar_fd >= 0 ? open(path, O_RDONLY | O_CLOEXEC) : -1;
    if (fd < 0)
        return;
    bool known = read(fd, name, sizeof name - 1) > 0 && !strcmp(name, SIDECAR_NAME "\n");
    close(fd);
    if (!known) {
        close(s->sidecar_fd);
        s->sidecar_fd = -1;
    }
}

// False when the program has gone, or had to be stopped.
static bool attach_again(struct space *s) {
    s->pidfd = s->pid > 0 ? (int)syscall(SYS_pidfd_open, s->pid, 0) : -1;
    struct edm_ctl *c = s->ctl_fd >= 0 ? ctl_map(s->ctl_fd) : NULL;
    if (s->uffd < 0 || (s->pid > 0 && s->pidfd < 0) || pidfd_dead(s->pidfd) || s->ops->gone(s)) {
        // Its sidecar may wait in the kernel for an event to be read, and does not look whether the program lives.
        if (c)
            sidecar_again(s, c);
        s->ctl = c;
        return false;
    }
    // One that was handing over when the DM-Handler died: it comes again, and where it does not it is served all the
    // same.
    if (c && __atomic_load_n(&c->sidecar_pid, __ATOMIC_ACQUIRE) <= 0) {
        munmap(c, EDM_CTL_BYTES);
        c = NULL;
    }
    if (!c) {
        if (s->ctl_fd >= 0)
            close(s->ctl_fd);
        s->ctl_fd = s->state->ctl[s->engine->turn] = -1;
        return true;
    }
    if (space_attach(s, c, s->ctl_fd, s->pid)) {
        stop(s, "the new DM-Handler cannot look at it");
        return false;
    }
    sidecar_again(s, c);
    if (s->sidecar_fd >= 0)
        sidecar_rest(s);
    return true;
}

// Of a program that has gone: what it forked is served all the same, by the events that were read and not yet applied.
static void forks_again(struct edm_engine *g, struct space *s) {
    const struct state_space *t = s->state;
    if (s->uffd < 0 || !events_fork_left(s))
        return;
    staged_again(g, s);
    // What was in its staging area went with it.
    s->lacks = t->moving;
    s->adopting = true;
    events_again(g, s);
    s->adopting = false;
}

// True when the space is served again.
static bool adopt_space(struct edm_engine *g, struct space *s) {
    if (!attach_again(s)) {
        forks_again(g, s);
        return false;
    }
    staged_again(g, s);
    if (s->ctl && !batch_again(g, s)) {
        stop(s, "its staging area cannot be read after the DM-Handler's death");
        return false;
    }
    point(POINT_adopt_batch);
    s->adopting = true;
    events_again(g, s);
    s->adopting = false;
    point(POINT_adopt_events);
    // What the DMS still has to be told of it comes before any question.
    s->barrier = g->tail ? outbox_item_at(g, g->tail)->seq : 0;
    if (s->dead)
        return true;
    if (s->ctl) {
        rescued_again(g, s);
        removed_unknown(s);
        s->sweep_soon = true;
        space_sweep(s);
        point(POINT_adopt_swept);
        if (s->dead)
            return true;
        if (s->ready)
            s->ops->drop_out(s, EDM_WINDOWS);
    }
    if (uffd_watch(s)) {
        stop(s, "the new DM-Handler cannot watch it");
        return false;
    }
    s->ops->wake(s, FIRST_PAGE, LSPT_MAX_PAGE - 1 - FIRST_PAGE);
    point(POINT_adopt_served);
    return true;
}

void adopt_spaces(struct edm_engine *g) {
    for (uint32_t i = 0; i < g->state->spaces; i++) {
        struct state_space *t = &g->state_space[i];
        if (!t->used)
            continue;
        // Events of it may make more of these, behind or before: those are served already.
        bool known = false;
        for (uint32_t k = 0; k < g->nspaces && !known; k++)
            known = g->space[k]->state == t;
        if (known)
            continue;
        struct space *s = space_again(g, &uffd_ops, t);
        s->refs++;
        if (!adopt_space(g, s) && !s->dead)
            space_retire(s);
        space_unref(s);
    }
    // What is left of programs that were gone already: told to the DMS, without a table to keep.
    for (uint32_t id = g->head; id; id = outbox_item_at(g, id)->next) {
        struct outbox_item *o = outbox_item_at(g, id);
        if (!o->space && o->kind == EDM_OUT_EVICT && o->state == OB_QUEUED)
            outbox_cancel(g, id);
    }
    holder_note(g);
}
