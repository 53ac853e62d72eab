// What newer kernels let a program do with its memory, while what it does not touch is evicted: guard pages, sealed,
// droppable and secret memory, advice in vectors, pages merged by KSM. Where a kernel has none of it, both runs do
// without.
#include "steps.h"

#include <setjmp.h>
#include <sys/prctl.h>
#include <sys/uio.h>

#define PAGES 128ul
#ifndef MADV_DONTNEED_LOCKED
#define MADV_DONTNEED_LOCKED 24
#endif
#ifndef MADV_GUARD_INSTALL
#define MADV_GUARD_INSTALL 102
#define MADV_GUARD_REMOVE 103
#endif
#ifndef SYS_memfd_secret
#define SYS_memfd_secret 447
#endif
#ifndef SYS_mseal
#define SYS_mseal 462
#endif
#ifndef MAP_DROPPABLE
#define MAP_DROPPABLE 8
#endif

static sigjmp_buf back;

static void on_segv(int number) { siglongjmp(back, number); }

static bool is_guard(char *page, bool write) {
    struct sigaction act = {.sa_handler = on_segv}, old;
    volatile bool faulted = true;
    MUST(!sigaction(SIGSEGV, &act, &old));
    if (!sigsetjmp(back, 1)) {
        if (write)
            *(volatile char *)page = 1;
        else
            (void)*(volatile char *)page;
        faulted = false;
    }
    MUST(!sigaction(SIGSEGV, &old, NULL));
    return faulted;
}

static void all_guards(char *p, uint64_t from, uint64_t to, const char *when) {
    for (uint64_t i = from; i < to; i += 5)
        if (!is_guard(p + i * PAGE, i % 2))
            WRONG("%s: guard page %lu could be touched", when, (unsigned long)i);
}

// What had been in the pages is gone, whether or not they were here; the guards stay until they are removed.
static void guards(void) {
    char *p = area(PAGES);
    fill(p, 0, PAGES, 1);
    leave();
    if (madvise(p + 32 * PAGE, 32 * PAGE, MADV_GUARD_INSTALL)) {
        MUST(errno == EINVAL);
        look(p, 0, PAGES, 1, "without guards");
        return;
    }
    for (int round = 0; round < 2; round++) {
        leave();
        look(p, 0, 32, 1, "before the guards");
        look(p, 64, PAGES - 64, 1, "behind the guards");
        all_guards(p, 32, 64, "evicted all the while");
    }
    pid_t child = fork();
    if (child == 0) {
        all_guards(p, 32, 64, "child");
        look(p, 0, 32, 1, "child, before the guards");
        _exit(0);
    }
    ended_well(child, "child");
    MUST(!madvise(p + 32 * PAGE, 32 * PAGE, MADV_GUARD_REMOVE));
    look(p, 32, 32, 0, "where the guards were");
    fill(p, 32, 32, 2);
    leave();
    look(p, 32, 32, 2, "where the guards were, written");
    look(p, 0, 32, 1, "before them");
    munmap(p, PAGES * PAGE);
}

// Pages touched in order, towards a guard in memory that is new: it is not filled ahead of them.
static void guards_ahead(void) {
    for (int write = 0; write < 2; write++) {
        char *p = area(PAGES);
        leave();
        if (madvise(p + 96 * PAGE, PAGE, MADV_GUARD_INSTALL)) {
            look(p, 0, 1, 0, "without guards");
            continue;
        }
        look(p, 0, 1, 0, "new");
        for (int i = 0; i < 96; i++)
            if (write)
                p[(uint64_t)i * PAGE] = 1;
            else
                (void)*(volatile char *)(p + (uint64_t)i * PAGE);
        if (!is_guard(p + 96 * PAGE, write))
            WRONG("the guard could be %s", write ? "written" : "read");
        munmap(p, PAGES * PAGE);
    }
}

static void sealed(void) {
    char *p = area(PAGES);
    fill(p, 0, PAGES, 1);
    bool sealed = !syscall(SYS_mseal, p, PAGES * PAGE, 0);
    leave();
    look(p, 0, PAGES, 1, "sealed");
    if (sealed && (munmap(p, PAGE) != -1 || errno != EPERM || mprotect(p, PAGE, PROT_READ) != -1 || errno != EPERM))
        WRONG("sealed memory could be changed");
    pid_t child = fork();
    if (child == 0) {
        fill(p, 0, PAGES / 2, 2);
        leave();
        look(p, 0, PAGES / 2, 2, "child, its own");
        look(p, PAGES / 2, PAGES / 2, 1, "child, from before");
        _exit(0);
    }
    fill(p, PAGES / 2, PAGES / 2, 3);
    leave();
    look(p, 0, PAGES / 2, 1, "parent, from before");
    look(p, PAGES / 2, PAGES / 2, 3, "parent, its own");
    ended_well(child, "child");
}

// The kernel may drop it where memory is short, which it is not; a child finds it empty.
static void droppable(void) {
    char *p = mmap(NULL, PAGES * PAGE, PROT_READ | PROT_WRITE, MAP_DROPPABLE | MAP_ANONYMOUS, -1, 0);
    bool offered = p != MAP_FAILED;
    if (!offered)
        p = area(PAGES);
    fill(p, 0, PAGES, 1);
    leave();
    look(p, 0, PAGES, 1, "droppable");
    pid_t child = fork();
    if (child == 0) {
        look(p, 0, PAGES, offered ? 0 : 1, "child");
        _exit(0);
    }
    ended_well(child, "child");
    munmap(p, PAGES * PAGE);
}

static void secret(void) {
    int fd = (int)syscall(SYS_memfd_secret, 0);
    MUST(fd >= 0 ? !ftruncate(fd, 32 * PAGE) : errno == ENOSYS);
    char *p = fd >= 0 ? mmap(NULL, 32 * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0) : area(32);
    MUST(p != MAP_FAILED);
    fill(p, 0, 32, 1);
    leave();
    look(p, 0, 32, 1, "secret");
    munmap(p, 32 * PAGE);
    close(fd);
}

static void dropped_while_locked(void) {
    char *p = area(PAGES);
    fill(p, 0, PAGES, 1);
    leave();
    MUST(!mlock(p, PAGES * PAGE));
    if (!madvise(p, PAGE, MADV_DONTNEED) || errno != EINVAL)
        WRONG("MADV_DONTNEED of locked memory");
    MUST(!madvise(p, 16 * PAGE, MADV_DONTNEED_LOCKED));
    look(p, 0, 16, 0, "dropped");
    MUST(!munlock(p, PAGES * PAGE));
    leave();
    look(p, 0, 16, 0, "dropped, later");
    look(p, 16, PAGES - 16, 1, "not dropped");
    munmap(p, PAGES * PAGE);
}

// By itself, and by a child of it.
static void advised_in_vectors(void) {
    char *p = area(PAGES);
    int self = (int)syscall(SYS_pidfd_open, getpid(), 0);
    struct iovec v[3] = {{p, 8 * PAGE}, {p + 16 * PAGE, 8 * PAGE}, {p + 64 * PAGE, 32 * PAGE}};
    fill(p, 0, PAGES, 1);
    leave();
    pid_t child = fork();
    if (child == 0) {
        if (syscall(SYS_process_madvise, self, v, 3, MADV_PAGEOUT, 0) != 48 * (ssize_t)PAGE)
            _exit(1);
        _exit(syscall(SYS_process_madvise, self, v, 3, MADV_DONTNEED, 0) != -1);
    }
    ended_well(child, "child");
    look(p, 0, PAGES, 1, "advised by a child");
    ssize_t done = syscall(SYS_process_madvise, self, v, 3, MADV_DONTNEED, 0);
    MUST(done == 48 * (ssize_t)PAGE || (done < 0 && errno == EINVAL));
    for (int round = 0; done > 0 && round < 2; round++) {
        look(p, 0, 8, 0, "dropped");
        look(p, 8, 8, 1, "kept");
        look(p, 16, 8, 0, "dropped");
        look(p, 24, 40, 1, "kept");
        look(p, 64, 32, 0, "dropped");
        look(p, 96, PAGES - 96, 1, "kept");
        leave();
    }
    close(self);
    munmap(p, PAGES * PAGE);
}

static void bytes_are(const char *p, char is, uint64_t round) {
    for (uint64_t i = 0; i < PAGES; i++)
        for (uint64_t at = 0; at < PAGE; at += 511)
            if (p[i * PAGE + at] != is)
                WRONG("round %lu, page %lu: %d instead of %d", (unsigned long)round, (unsigned long)i, p[i * PAGE + at],
                      is);
}

// Pages of the same bytes, as KSM merges them where it runs: read while they are away, merged, and then written.
static void merged(bool past_libc) {
    char *p = area(PAGES), *q = area(PAGES);
    for (char *area_ = p; area_; area_ = area_ == p ? q : NULL) {
        fill(area_, 0, PAGES, 1);
        leave();
        look(area_, 0, PAGES, 1, "before");
        long r = past_libc ? syscall(SYS_madvise, area_, PAGES * PAGE, MADV_MERGEABLE)
                           : madvise(area_, PAGES * PAGE, MADV_MERGEABLE);
        MUST(!r || errno == EINVAL);
    }
    uint64_t rounds = getenv("ROUNDS") ? strtoul(getenv("ROUNDS"), NULL, 10) : 2;
    for (uint64_t round = 0; round < rounds; round++) {
        memset(p, (char)(round + 1), PAGES * PAGE);
        memset(q, (char)(round + 1), PAGES * PAGE);
        leave();
        bytes_are(p, (char)(round + 1), round);
        bytes_are(q, (char)(round + 1), round);
        if (rounds > 2)
            usleep(60000);
    }
    munmap(p, PAGES * PAGE);
    munmap(q, PAGES * PAGE);
}

static void merged_pages(void) { merged(false); }

static void merged_past_libc(void) { merged(true); }

int main(int argc, char **argv) {
    static const struct step steps[] = {
        {"guards", guards},
        {"guards_ahead", guards_ahead},
        {"sealed", sealed},
        {"droppable", droppable},
        {"secret", secret},
        {"dropped_while_locked", dropped_while_locked},
        {"advised_in_vectors", advised_in_vectors},
        {"merged_pages", merged_pages},
        {"merged_past_libc", merged_past_libc},
    };
    churn_start();
    int status = run_steps(steps, COUNT(steps), argc, argv);
    churn_stop();
    return status;
}
