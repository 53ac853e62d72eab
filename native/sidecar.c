// The engine's end of the sidecar: the task in a program's address space that moves pages to staging on request.
// What it says is a hint; which pages left is read from the kernel's pagemap of staging.
#include "engine.h"

#include <errno.h>
#include <linux/futex.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

#define GIVE_UP_NS 5000000000u      // a sidecar that does not answer this long is ended
#define STOOD_STILL_NS 1000000000u  // between two looks a few milliseconds apart

bool pidfd_dead(int pidfd) {
    struct pollfd p = {pidfd, POLLIN, 0};
    return pidfd >= 0 && poll(&p, 1, 0) == 1;
}

// Time that has gone by since *start, seen at *last: without what the machine, or this process, stood still for. The
// sidecar then may have stood still as well, and is not to be judged by it.
static uint64_t awake_ns(uint64_t *start, uint64_t *last) {
    uint64_t now = now_ns();
    if (now - *last > STOOD_STILL_NS)
        *start += now - *last;
    *last = now;
    return now - *start;
}

void sidecar_kill(struct space *s) {
    if (s->sidecar_fd >= 0)
        syscall(SYS_pidfd_send_signal, s->sidecar_fd, SIGKILL, NULL, 0);
}

// Waits at most for one run of 32 pages to move. A sidecar that has died cannot be moving.
void sidecar_lock(struct space *s) {
    if (!s->ctl || s->sidecar_fd < 0)
        return;
    uint64_t start = 0, last = 0;
    for (int i = 0;; i++) {
        uint32_t free_ = EDM_UNLOCKED;
        if (__atomic_compare_exchange_n(&s->ctl->lock, &free_, EDM_LOCK_ENGINE, false, __ATOMIC_ACQUIRE,
                                        __ATOMIC_RELAXED))
            return;
        if (i < 200) {
            __builtin_ia32_pause();
            continue;
        }
        struct timespec t = {0, 10000};
        nanosleep(&t, NULL);
        if (!start)
            start = last = now_ns();
        if (pidfd_dead(s->sidecar_fd)) {
            __atomic_store_n(&s->ctl->lock, EDM_LOCK_ENGINE, __ATOMIC_RELEASE);
            return;
        }
        if (awake_ns(&start, &last) > GIVE_UP_NS)
            sidecar_kill(s);
    }
}

void sidecar_unlock(struct space *s) {
    if (s->ctl && s->sidecar_fd >= 0)
        __atomic_store_n(&s->ctl->lock, EDM_UNLOCKED, __ATOMIC_RELEASE);
}

static void post(struct space *s, uint32_t op) {
    s->ctl->op = op;
    __atomic_store_n(&s->ctl->req, ++s->request, __ATOMIC_RELEASE);
    syscall(SYS_futex, &s->ctl->req, FUTEX_WAKE, 1, NULL, NULL, 0);
}

bool sidecar_idle(const struct space *s) {
    return !s->ctl || s->sidecar_fd < 0 || __atomic_load_n(&s->ctl->done, __ATOMIC_ACQUIRE) == s->request ||
           pidfd_dead(s->sidecar_fd);
}

// False when the sidecar has died: whatever it had moved by then is in staging. A move that takes seconds has gone
// wrong, and the sidecar is ended; a drop may take as long as the fault workers are busy.
static bool answered(struct space *s, bool moving) {
    uint64_t start = now_ns(), last = start;
    for (int i = 0;; i++) {
        uint32_t done = __atomic_load_n(&s->ctl->done, __ATOMIC_ACQUIRE);
        if (done == s->request)
            return true;
        if (i < 100) {
            __builtin_ia32_pause();
            continue;
        }
        struct timespec t = {0, 5000000};
        syscall(SYS_futex, &s->ctl->done, FUTEX_WAIT, done, &t, NULL, 0);
        if (pidfd_dead(s->sidecar_fd))
            return __atomic_load_n(&s->ctl->done, __ATOMIC_ACQUIRE) == s->request;
        if (!moving && atomic_load(&s->engine->stop))
            return false;
        if (moving && awake_ns(&start, &last) > GIVE_UP_NS)
            sidecar_kill(s);
    }
}

static uint64_t staging_of(const struct space *s, uint32_t window) {
    return s->staging + (uint64_t)window * LEAF_PAGES * PAGE_SIZE_;
}

static bool staging_present(struct space *s, uint32_t window, uint64_t *present) {
    uint64_t map[LEAF_PAGES];
    off_t at = (off_t)(staging_of(s, window) / PAGE_SIZE_ * sizeof map[0]);
    if (pread(s->pagemap_fd, map, sizeof map, at) != (ssize_t)sizeof map)
        return false;
    *present = 0;
    for (int i = 0; i < LEAF_PAGES; i++)
        if (map[i] >> 62)  // present, or swapped out by the kernel
            *present |= 1ull << i;
    return true;
}

// Pages have left the program and cannot be read: stopping it is the only way it never sees other bytes.
static void stop_program(struct space *s, const char *why) {
    if (s->ops->gone(s))  // killed together with its sidecar
        return;
    engine_error(s->engine, "process %d is stopped: %s", s->pid, why);
    if (s->pidfd >= 0)
        syscall(SYS_pidfd_send_signal, s->pidfd, SIGKILL, NULL, 0);
}

int sidecar_move_out(struct space *s, struct move_batch *b) {
    struct edm_ctl *c = s->ctl;
    if (!c || pidfd_dead(s->sidecar_fd) || __atomic_load_n(&c->done, __ATOMIC_ACQUIRE) != s->request) {
        s->ready = false;  // it has died, or staging is not empty
        return -ESRCH;
    }
    sidecar_home(s);
    for (uint32_t k = 0; k < b->n; k++) {
        c->window[k].src = b->w[k].base << PAGE_SHIFT;
        c->window[k].mask = b->w[k].mask;
        c->window[k].pass = b->w[k].pass;
        c->window[k].keep = b->w[k].clean;
        c->window[k].busy = 0;
        c->window[k].error = 0;
    }
    c->n = b->n;
    c->drop = 0;
    c->batch_generation = b->generation;
    c->batch_stacks_told = s->stacks_told;
    post(s, EDM_OP_MOVE);
    bool alive = answered(s, true);
    if (!alive)
        s->ready = false;
    int result = alive ? 0 : -ESRCH;
    for (uint32_t k = 0; k < b->n; k++) {
        struct move_window *w = &b->w[k];
        uint64_t present = 0;
        if (!staging_present(s, k, &present)) {
            if (!pidfd_dead(s->pidfd))
                stop_program(s, "its staging area cannot be looked at");
            continue;
        }
        w->moved = present;
        w->busy = c->window[k].busy & w->mask & ~w->moved;
        if (c->window[k].error && !result)
            result = c->window[k].error == ESTALE ? -EAGAIN : -(int)c->window[k].error;
    }
    return result;
}

// What moved, as runs of pages in staging.
static unsigned long staging_runs(const struct space *s, const struct move_batch *b, struct iovec *run) {
    unsigned long n = 0;
    for (uint32_t k = 0; k < b->n; k++)
        for (uint64_t m = move_to_read(&b->w[k]); m;) {
            int from = __builtin_ctzll(m);
            uint64_t rest = ~(m >> from);
            int length = rest ? __builtin_ctzll(rest) : LEAF_PAGES - from;
            run[n++] = (struct iovec){(void *)(uintptr_t)(staging_of(s, k) + (size_t)from * PAGE_SIZE_),
                                      (size_t)length * PAGE_SIZE_};
            m = length + from >= LEAF_PAGES ? 0 : m >> (from + length) << (from + length);
        }
    return n;
}

// A program that has forbidden it since (PR_SET_DUMPABLE) may still be read by what was opened before.
static bool read_as_file(struct space *s, struct iovec *to, struct iovec *from, unsigned long m) {
    for (unsigned long i = 0; i < m; i++) {
        int pages = (int)(from[i].iov_len / PAGE_SIZE_);
        if (s->mem_fd < 0 ||
            preadv(s->mem_fd, to, pages, (off_t)(uintptr_t)from[i].iov_base) != (ssize_t)from[i].iov_len)
            return false;
        to += pages;
    }
    return true;
}

// The sidecar has the same memory as the program and outlives its threads; either will do.
static bool read_from_either(struct space *s, struct iovec *to, unsigned long n, struct iovec *from, unsigned long m) {
    ssize_t bytes = (ssize_t)n * (ssize_t)PAGE_SIZE_;
    return process_vm_readv(s->sidecar_pid, to, n, from, m, 0) == bytes ||
           process_vm_readv(s->pid, to, n, from, m, 0) == bytes || read_as_file(s, to, from, m);
}

#define READ_PAGES 512  // in one call; the kernel takes 1024 pieces

void sidecar_read_out(struct space *s, struct move_batch *b) {
    struct iovec run[EDM_WINDOWS * LEAF_PAGES / 2], to[READ_PAGES];
    unsigned long runs = staging_runs(s, b, run), at = 0;
    for (uint32_t done = 0; done < b->nread;) {
        // As many pages as one call takes: the last run may be cut.
        unsigned long first = at;
        uint32_t n = 0;
        size_t cut = 0;
        while (at < runs && n < READ_PAGES) {
            uint32_t pages = (uint32_t)(run[at].iov_len / PAGE_SIZE_);
            if (n + pages > READ_PAGES) {
                cut = (size_t)(READ_PAGES - n) * PAGE_SIZE_;
                n = READ_PAGES;
                break;
            }
            n += pages;
            at++;
        }
        for (uint32_t i = 0; i < n; i++)
            to[i] = (struct iovec){b->into[done + i], PAGE_SIZE_};
        struct iovec rest = {0};
        if (cut) {
            rest = (struct iovec){(char *)run[at].iov_base + cut, run[at].iov_len - cut};
            run[at].iov_len = cut;
        }
        bool read =
            !point_fails(POINT_batch_reading, NULL) && read_from_either(s, to, n, run + first, at - first + (cut > 0));
        if (!read && !pidfd_dead(s->pidfd))
            stop_program(s, "its staging area cannot be read");
        if (cut)
            run[at] = rest;
        done += n;
    }
}

// Empty staging. The kernel reports the drop as an event that a fault worker must read, and a worker may be waiting for
// the batch to end: so this does not wait, and sidecar_settle is called when no batch is under way.
void sidecar_drop_out(struct space *s, uint32_t windows) {
    if (!s->ctl || s->dead || s->sidecar_fd < 0)
        return;
    s->ctl->n = 0;
    s->ctl->drop = windows;
    s->dropping = true;
    post(s, EDM_OP_MOVE);
}

void sidecar_settle(struct space *s) {
    if (!answered(s, false))
        s->ready = false;
}

void sidecar_end(struct space *s) {
    if (s->ctl && s->sidecar_fd >= 0)
        post(s, EDM_OP_EXIT);
    sidecar_kill(s);
    if (s->sidecar_fd >= 0)
        close(s->sidecar_fd);
    s->sidecar_fd = -1;
}
