// libedm_app.so: what EDM puts into a program (LD_PRELOAD). It opens the uffd, hands it to the DM-Handler, and starts
// the sidecar, a task in the program's address space that moves pages to staging when the DM-Handler asks. It decides
// nothing, keeps no file descriptor in the program, and uses raw system calls: it runs before main and after fork, when
// little of libc may be used.
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "../sidecar.h"
#include "../uffd_abi.h"
#include "bring.h"
#include "calls.h"
#include "heap.h"
#include "hints.h"
#include "libc.h"
#include "own.h"
#include "own_uffd.h"
#include "reach.h"
#include "remap.h"
#include "stacks.h"
#include "talk.h"
#include "tie.h"
#include "tools.h"

#define PAGE 4096ul
#define SIDECAR_STACK (16 * 1024)
#define MID_STACK (16 * 1024)
#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23
#endif
#ifndef MADV_WIPEONFORK
#define MADV_WIPEONFORK 18
#endif

static bool captured, no_forks, free_to_call;
static struct edm_ctl *control;  // while captured
static pid_t (*real_fork)(void);
static uint64_t anchor_page;  // kept here: the control page is not copied to a forked child

#define LOOK_TRIES 65536  // of a lock that is held for a few microseconds

// ---- the sidecar: no libc, no thread-local storage, its own file table ----------------------------------------

static void side_look(struct edm_ctl *c);

static void side_lock(struct edm_ctl *c) {
    for (uint32_t tries = 1;; tries++) {
        uint32_t none = EDM_UNLOCKED;
        if (__atomic_compare_exchange_n(&c->lock, &none, EDM_LOCK_SIDECAR, false, __ATOMIC_SEQ_CST, __ATOMIC_RELAXED))
            return;
        CALL(SYS_sched_yield, 0, 0, 0);
        if (tries % LOOK_TRIES == 0)  // its holder may have been killed, and all who could start another
            side_look(c);
    }
}

static void side_unlock(struct edm_ctl *c) { __atomic_store_n(&c->lock, EDM_UNLOCKED, __ATOMIC_RELEASE); }

// Move one run; returns pages moved, *error the reason why not all.
static long side_move_run(struct edm_ctl *c, uint64_t dst, uint64_t src, long pages, long *error) {
    struct uffdio_move m = {.dst = dst,
                            .src = src,
                            .len = (uint64_t)pages * PAGE,
                            .mode = UFFDIO_MOVE_MODE_DONTWAKE | UFFDIO_MOVE_MODE_ALLOW_SRC_HOLES};
    side_lock(c);
    if (__atomic_load_n(&c->generation, __ATOMIC_ACQUIRE) != c->batch_generation ||
        __atomic_load_n(&c->stacks_told, __ATOMIC_SEQ_CST) != c->batch_stacks_told ||
        __atomic_load_n(&c->forking, __ATOMIC_ACQUIRE)) {
        side_unlock(c);
        *error = ESTALE;
        return 0;
    }
    long r = CALL(SYS_ioctl, c->uffd, UFFDIO_MOVE, &m);
    side_unlock(c);
    if (r == 0) {
        *error = 0;
        return pages;
    }
    *error = -r;
    return m.move > 0 ? (long)(m.move / (int64_t)PAGE) : 0;
}

// A page shared since a fork becomes this process's own by being written to. Not one that the engine knows to be
// write-protected: it drops that. What it does not know of may be so all the same: a page that was clean when the
// program gave it up with MADV_FREE stays, and joins again as any other. Written to, it would wait for the DM-Handler,
// which waits for this batch; so the protection is taken off. ENOENT: the mapping has none.
static bool side_unshare(struct edm_ctl *c, uint32_t k, int page) {
    uint64_t at = c->window[k].src + (uint64_t)page * PAGE;
    struct uffdio_writeprotect off = {.range = {at, PAGE}, .mode = UFFDIO_WRITEPROTECT_MODE_DONTWAKE};
    if (c->window[k].keep & 1ull << page)
        return false;
    side_lock(c);
    long r = -ESTALE;
    if (__atomic_load_n(&c->generation, __ATOMIC_ACQUIRE) == c->batch_generation)
        r = CALL(SYS_ioctl, c->uffd, UFFDIO_WRITEPROTECT, &off);
    if (!r || r == -ENOENT)
        r = CALL(SYS_madvise, at, PAGE, MADV_POPULATE_WRITE);
    side_unlock(c);
    return r == 0;
}

// Pages move between memory of like protection only. Where the program has memory that may be written to and executed,
// as many make theirs who compile as they run, staging becomes like it, and again like the rest.
static bool side_turn(struct edm_ctl *c) {
    int also = c->staging_executable ? 0 : PROT_EXEC;
    if (!c->executable || CALL(SYS_mprotect, c->staging, EDM_STAGING_PAGES * PAGE, PROT_READ | PROT_WRITE | also))
        return false;
    c->staging_executable = !c->staging_executable;
    return true;
}

// A run with a page in it that cannot move: go around it.
static long side_move(struct edm_ctl *c, uint32_t k, int from, int count) {
    uint64_t staging = c->staging + (uint64_t)k * 64 * PAGE;
    bool unshared = false, turned = false;
    int most = 64;
    while (count > 0) {
        long error;
        uint64_t src = c->window[k].src + (uint64_t)from * PAGE;
        int run = count < most ? count : most;
        long n = side_move_run(c, staging + (uint64_t)from * PAGE, src, run, &error);
        from += (int)n;
        count -= (int)n;
        if (n) {
            unshared = turned = false;
            most = 64;
        }
        if (!error)
            continue;
        if (error == EAGAIN && n)
            continue;
        if (error == EAGAIN || error == ESTALE || error == ENOMEM || error == ESRCH)
            return error;
        if (error == EINVAL && run > 1) {  // the end of a mapping lies in the run
            most = run / 2;
            continue;
        }
        if (error == EINVAL && !turned && side_turn(c)) {
            turned = true;
            continue;
        }
        if (error == EBUSY && !unshared && side_unshare(c, k, from)) {
            unshared = true;
            continue;
        }
        c->window[k].busy |= 1ull << from;
        unshared = turned = false;
        from++;
        count--;
    }
    return 0;
}

// The bits of one run of a mask that begins at `from`.
static uint64_t run_at(uint64_t mask, int from) {
    uint64_t rest = ~(mask >> from);
    int count = rest ? __builtin_ctzll(rest) : 64;
    return (count >= 64 ? ~0ull : (1ull << count) - 1) << from;
}

// In one call: each raises an event that a fault worker must read. mlockall(2) locks staging with all the rest.
// What stays there would be taken for the pages moved in next: if it cannot be emptied the program ends, and no batch
// is answered.
static bool side_drop(struct edm_ctl *c) {
    uint64_t bytes = (uint64_t)c->drop * 64 * PAGE;
    long error = CALL(SYS_madvise, c->staging, bytes, MADV_DONTNEED);
    if (error == -EINVAL && !CALL(SYS_munlock, c->staging, EDM_STAGING_PAGES * PAGE, 0))
        error = CALL(SYS_madvise, c->staging, bytes, MADV_DONTNEED);
    return !error;
}

static void side_batch(struct edm_ctl *c) {
    if (c->drop && !side_drop(c)) {
        CALL(SYS_kill, c->app_pid, SIGKILL, 0);
        CALL(SYS_exit_group, 1, 0, 0);
    }
    for (uint32_t k = 0; k < c->n && k < EDM_WINDOWS; k++) {
        uint64_t mask = c->window[k].mask;
        while (mask) {
            int from = __builtin_ctzll(mask);
            // Across holes as far as the last page asked for: one call and one TLB flush instead of one a stretch.
            uint64_t run = run_at(mask | c->window[k].pass, from) & mask;
            int last = 63 - __builtin_clzll(run);
            long error = side_move(c, k, from, last - from + 1);
            if (error) {
                c->window[k].error = error;
                return;
            }
            mask &= ~run;
        }
    }
}

// Dead, whether or not somebody has waited for it. Source: proc_pid_stat(5), field 3.
static bool gone(int32_t pid) {
    char path[32] = "/proc/", text[512], digits[12];
    int n = 0, at = 6;
    if (pid <= 0)
        return false;
    for (int32_t rest = pid; rest; rest /= 10)
        digits[n++] = (char)('0' + rest % 10);
    while (n)
        path[at++] = digits[--n];
    memcpy(path + at, "/stat", 6);
    long fd = CALL6(SYS_openat, AT_FDCWD, path, O_RDONLY | O_CLOEXEC, 0, 0, 0);
    if (fd < 0)
        return fd == -ENOENT || fd == -ESRCH;
    long got = CALL(SYS_read, fd, text, sizeof text);
    CALL(SYS_close, fd, 0, 0);
    while (got > 0 && text[got - 1] != ')')
        got--;
    return got > 0 && got + 1 < (long)sizeof text && (text[got + 1] == 'Z' || text[got + 1] == 'X');
}

// Without anything to do for a second. Our copy of the uffd keeps the program's faults waiting when nobody else has one
// any more; if nobody is left who could start a DM-Handler that takes over, it must end.
// Only of those that were seen here: in another namespace, or without /proc, everybody seems to be gone.
static void side_see(struct edm_ctl *c) {
    if (c->handler_pid != c->seen_handler && !gone(c->handler_pid))
        c->seen_handler = c->handler_pid;
    if (c->holder_pid != c->seen_holder && !gone(c->holder_pid))
        c->seen_holder = c->holder_pid;
}

static void side_look(struct edm_ctl *c) {
    side_see(c);
    if (c->holder_pid > 0 && c->handler_pid == c->seen_handler && c->holder_pid == c->seen_holder &&
        gone(c->handler_pid) && gone(c->holder_pid))
        CALL(SYS_kill, c->app_pid, SIGKILL, 0);
    if (CALL(SYS_kill, c->app_pid, 0, 0) == -ESRCH)
        CALL(SYS_exit_group, 0, 0, 0);
}

static int sidecar(void *arg) {
    struct edm_ctl *c = arg;
    CALL6(SYS_prctl, PR_SET_NAME, SIDECAR_NAME, 0, 0, 0, 0);
    CALL(SYS_setsid, 0, 0, 0);
    if (c->uffd > 0)
        CALL(SYS_close_range, 0, c->uffd - 1, 0);
    CALL(SYS_close_range, c->uffd + 1, ~0u, 0);
    uint32_t last = 0;
    bool tied = c->tie;
    side_see(c);
    for (;;) {
        uint32_t req;
        while ((req = __atomic_load_n(&c->req, __ATOMIC_ACQUIRE)) == last) {
            struct timespec second = {1, 0};
            long r = CALL6(SYS_futex, &c->req, FUTEX_WAIT, last, &second, 0, 0);
            if (r == -ETIMEDOUT)
                side_look(c);
        }
        last = req;
        if (c->op == EDM_OP_EXIT)
            CALL(SYS_exit_group, 0, 0, 0);
        if (!tied)
            c->tie = tie_uffd(c->uffd);  // before its first page leaves, and no earlier: short-lived ones are spared it
        tied = true;
        side_batch(c);
        if (c->handler_pid != c->seen_handler || c->holder_pid != c->seen_holder)
            side_see(c);
        __atomic_store_n(&c->done, last, __ATOMIC_RELEASE);
        CALL6(SYS_futex, &c->done, FUTEX_WAKE, 1, 0, 0, 0);
    }
    return 0;
}

// Between the program and its sidecar, so that the sidecar is not the program's child: a program that waits for all its
// children would wait for it.
static int sidecar_parent(void *arg) {
    struct edm_ctl *c = arg;
    long pid = clone_task(sidecar, (char *)c + EDM_CTL_BYTES - MID_STACK, CLONE_VM | CLONE_UNTRACED, c);
    __atomic_store_n(&c->sidecar_pid, (int32_t)pid, __ATOMIC_RELEASE);
    CALL(SYS_exit, 0, 0, 0);
    return 0;
}

static bool sidecar_start(struct edm_ctl *c) {
    uint64_t all = ~0ull, old = 0;
    CALL6(SYS_rt_sigprocmask, SIG_SETMASK, &all, &old, 8, 0, 0);
    int pid = clone_task(sidecar_parent, (char *)c + EDM_CTL_BYTES - 64, CLONE_VM | CLONE_VFORK | CLONE_UNTRACED, c);
    if (pid > 0)
        CALL6(SYS_wait4, pid, 0, __WALL, 0, 0, 0);
    CALL6(SYS_rt_sigprocmask, SIG_SETMASK, &old, 0, 8, 0, 0);
    return pid > 0 && __atomic_load_n(&c->sidecar_pid, __ATOMIC_ACQUIRE) > 0;
}

// A child finds zeros in the anchor (MADV_WIPEONFORK), whoever made it.
bool own_process(void) { return anchor_page && *(volatile char *)anchor_page; }

// ---- the hand-over --------------------------------------------------------------------------------------------

static void *map(size_t bytes, int prot, int flags, int fd) {
    long p = CALL6(SYS_mmap, 0, bytes, prot, flags, fd, 0);
    return p < 0 && p > -4096 ? NULL : (void *)p;
}

static uint32_t keep(struct edm_ctl *c, uint32_t n, const void *at) {
    uint64_t page = (uint64_t)at / PAGE * PAGE;
    for (uint32_t i = 0; i < n; i++)
        if (c->keep[i] == page)
            return n;
    if (page && n < EDM_KEEP)
        c->keep[n++] = page;
    return n;
}

// What the kernel writes to when nobody can wait for a page, and the list of loaded libraries: without it a debugger
// that attaches can name nothing it finds on the stacks.
static void keep_pages(struct edm_ctl *c) {
    const struct r_debug *libraries = loaded_libraries();
    uint32_t n = keep(c, 0, (void *)cleared_at_exit());
    if (libraries)
        n = keep(c, n, libraries);
    for (const struct link_map *m = libraries ? libraries->r_map : NULL; m && n < EDM_KEEP; m = m->l_next) {
        n = keep(c, n, m);
        n = keep(c, n, &m->l_prev);
        n = keep(c, n, m->l_name);
    }
}

// A memfd of the control page's size. Where the program may not make files so large, as little as trying would end it.
static int ctl_room(int s) {
    struct rlimit limit = {0, 0};
    if (!CALL6(SYS_prlimit64, 0, RLIMIT_FSIZE, 0, &limit, 0, 0) && limit.rlim_cur < EDM_CTL_BYTES) {
        struct edm_hello hello = {.magic = EDM_CTL_MAGIC, .kind = EDM_HELLO_ROOM};
        struct edm_reply r;
        int fd = -1;
        if (send_message(s, &hello, sizeof hello, NULL, 0) > 0)
            receive_reply(s, &r, &fd);
        return high_fd(fd);
    }
    int fd = high_fd((int)CALL(SYS_memfd_create, "edm-ctl", MFD_CLOEXEC, 0));
    if (fd >= 0 && CALL(SYS_ftruncate, fd, EDM_CTL_BYTES, 0) < 0) {
        close_fd(fd);
        return -1;
    }
    return fd;
}

// The control page, the staging area and the anchor: a page whose first touch in a forked child tells the DM-Handler
// which process the child's uffd belongs to.
static struct edm_ctl *make_ctl(int memfd, uint64_t anchor) {
    if (memfd < 0)
        return NULL;
    struct edm_ctl *c = map(EDM_CTL_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED, memfd);
    char *staging =
        map(EDM_STAGING_PAGES * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1);
    if (!anchor)
        anchor = (uint64_t)map(PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1);
    if (!c || !staging || !anchor)
        return NULL;
    CALL(SYS_madvise, c, EDM_CTL_BYTES, MADV_DONTFORK);
    CALL(SYS_madvise, c, EDM_CTL_BYTES, MADV_DONTDUMP);
    CALL(SYS_madvise, staging, EDM_STAGING_PAGES * PAGE, MADV_DONTFORK);
    CALL(SYS_madvise, staging, EDM_STAGING_PAGES * PAGE, MADV_NOHUGEPAGE);
    CALL(SYS_madvise, anchor, PAGE, MADV_WIPEONFORK);
    c->magic = EDM_CTL_MAGIC;
    c->size = EDM_CTL_BYTES;
    c->staging = (uint64_t)staging;
    c->anchor = anchor;
    c->self = (uint64_t)c;
    c->app_pid = (int32_t)CALL(SYS_getpid, 0, 0, 0);
    keep_pages(c);
    hints_begin(c);
    own_uffd_begin(c);
    return c;
}

static int open_uffd(int dev, bool user_mode) {
    long u = CALL(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK, 0, 0);
    if (u < 0 && dev >= 0)
        u = CALL(SYS_ioctl, dev, USERFAULTFD_IOC_NEW, O_CLOEXEC | O_NONBLOCK);
    if (u < 0 && user_mode)
        u = CALL(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK | UFFD_USER_MODE_ONLY, 0, 0);
    return high_fd((int)u);
}

static void drop_ctl(struct edm_ctl *c) {
    if (!c)
        return;
    untie_uffd(c->tie);
    CALL(SYS_munmap, c->staging, EDM_STAGING_PAGES * PAGE, 0);
    CALL(SYS_munmap, c, EDM_CTL_BYTES, 0);
}

#define COME_AGAIN 2
#define TRIES 5

// Returns 1 when the handler asks for a forked child to come as a new process, 0 when done, -1 when it cannot be, 2
// when it hung up on the way: another may listen there soon.
static int hand_over_once(enum edm_hello_kind kind, uint64_t anchor) {
    int s = connect_handler(), dev = -1, memfd = -1, uffd = -1, result = -1;
    struct edm_reply r;
    struct edm_ctl *c = NULL;
    if (s < 0)
        goto out;
    result = COME_AGAIN;
    if (!receive_reply(s, &r, &dev))
        goto out;
    result = -1;
    no_forks = r.status & EDM_GREET_NO_FORKS;
    memfd = ctl_room(s);
    c = make_ctl(memfd, anchor);
    if (kind == EDM_HELLO_NEW)
        uffd = open_uffd(dev, r.status & EDM_GREET_USER_MODE);
    if (!c || (kind == EDM_HELLO_NEW && uffd < 0))
        goto out;
    if (kind == EDM_HELLO_FORK)
        *(volatile char *)c->anchor;  // missing here: the fault tells whose uffd this is
    struct edm_hello hello = {.magic = EDM_CTL_MAGIC, .kind = kind};
    int fds[2] = {memfd, uffd}, got = -1;
    result = COME_AGAIN;
    if (send_message(s, &hello, sizeof hello, fds, kind == EDM_HELLO_NEW ? 2 : 1) < 0 || !receive_reply(s, &r, &got))
        goto out;
    result = -1;
    if (kind == EDM_HELLO_FORK)
        uffd = high_fd(got);
    if (r.status == EDM_AGAIN_AS_NEW)
        result = 1;
    if (r.status || uffd < 0)
        goto out;
    c->uffd = uffd;
    if (kind == EDM_HELLO_FORK)
        c->tie = tie_uffd(uffd);  // its parent's pages may be away
    if (!sidecar_start(c))
        goto out;
    // From here on the DM-Handler may evict: without its last word, another one goes on with what it knew of us.
    if (send_message(s, &hello, sizeof hello, NULL, 0) > 0 && receive_reply(s, &r, &got) && r.status)
        goto out;
    anchor_page = c->anchor;
    control = c;
    captured = true;
    hints_to(c);
    stacks_to(c);
    own_uffd_to(c);
    bring_to(c);
    remap_begin();
    *(volatile char *)c->anchor = 1;
    c = NULL;  // it stays, for the sidecar
    result = 0;
out:
    drop_ctl(c);
    close_fd(dev);
    close_fd(memfd);
    close_fd(uffd);
    close_fd(s);
    return result;
}

static int hand_over(enum edm_hello_kind kind, uint64_t anchor) {
    int result = COME_AGAIN;
    for (int i = 0; i < TRIES && result == COME_AGAIN; i++)
        result = hand_over_once(kind, anchor);
    return result;
}

// ---- forks ----------------------------------------------------------------------------------------------------

static bool forks_untold(void) { return captured && no_forks && own_process(); }

static bool filtered(void) { return CALL6(SYS_prctl, PR_GET_SECCOMP, 0, 0, 0, 0, 0) != 0; }

bool restricted(void) { return free_to_call && filtered(); }

// The same of one that has forbidden itself system calls since it was captured, which ends it for those of asking: a
// word in the control page, which the DM-Handler comes by with its next sweep.
static void ask_whole_silently(void) {
    uint32_t mine = __atomic_add_fetch(&control->whole_asked, 1, __ATOMIC_SEQ_CST);
    while ((int32_t)(__atomic_load_n(&control->whole_done, __ATOMIC_ACQUIRE) - mine) < 0)
        continue;
}

// Where no event tells the DM-Handler of a fork, what is absent would be zeros in the child: all of it comes back
// first, and stays until the fork is over. As with a fault, the program waits if the DM-Handler has just died.
static void before_fork(void) {
    if (!forks_untold())
        return;
    __atomic_fetch_add(&control->forking, 1, __ATOMIC_SEQ_CST);
    if (restricted()) {
        ask_whole_silently();
        return;
    }
    int asked;
    int32_t status;
    while ((asked = ask_handler(EDM_HELLO_BEFORE_FORK, NULL, 0, &status)) < 0) {
        struct timespec t = {0, 10000000};
        CALL(SYS_nanosleep, &t, 0, 0);
    }
    close_fd(asked);
}

static void after_fork_in_parent(void) {
    if (forks_untold())
        __atomic_fetch_sub(&control->forking, 1, __ATOMIC_SEQ_CST);
}

// A program that has forbidden itself system calls since it was captured would be killed for those of the hand-over:
// its children are served, as those of a raw clone(2) are, and nothing of theirs is evicted.
static void after_fork_in_child(void) {
    if (!captured)
        return;
    captured = false;
    if (restricted())
        return;
    heap_mine();
    if (no_forks || hand_over(EDM_HELLO_FORK, anchor_page) == 1)
        hand_over(EDM_HELLO_NEW, 0);
}

// The one fork of the C library that calls no handlers. Source: _Fork(3).
__attribute__((visibility("default"))) pid_t _Fork(void) {
    if (!real_fork)
        return errno = ENOSYS, -1;
    before_fork();
    pid_t pid = real_fork();
    int error = errno;
    if (pid)
        after_fork_in_parent();
    else
        after_fork_in_child();
    errno = error;
    return pid;
}

__attribute__((constructor)) static void edm_app_start(void) {
    void *found = dlsym(RTLD_NEXT, "_Fork");
    memcpy(&real_fork, &found, sizeof real_fork);
    own_uffd_find();
    reach_begin();
    const char *path = getenv(EDM_SOCK_ENV);
    if (!path || emulated() || !talk_to(path))
        return;
    CALL6(SYS_prctl, PR_SET_THP_DISABLE, 1, 0, 0, 0, 0);
    free_to_call = !filtered();
    if (hand_over(EDM_HELLO_NEW, 0))
        return;
    at_fork(before_fork, after_fork_in_parent, after_fork_in_child);
    heap_begin();
}
