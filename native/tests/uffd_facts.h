// What the tests of the kernel's own behaviour share: a userfaultfd over fresh memory, and threads that touch it. What
// is found here is what the engine and native/replay.c are built on.
#pragma once
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/wait.h>

#include "../uffd_abi.h"
#include "check.h"

#define PG 4096ul
#define SKIP 77

#define EVENTS \
    (UFFD_FEATURE_EVENT_FORK | UFFD_FEATURE_EVENT_REMAP | UFFD_FEATURE_EVENT_REMOVE | UFFD_FEATURE_EVENT_UNMAP)

static inline int uffd_new(uint64_t features) {
    int fd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK);
    if (fd < 0) {
        int dev = open("/dev/userfaultfd", O_RDWR | O_CLOEXEC);
        fd = dev < 0 ? -1 : ioctl(dev, USERFAULTFD_IOC_NEW, O_CLOEXEC | O_NONBLOCK);
        close(dev);
    }
    struct uffdio_api api = {.api = UFFD_API, .features = features};
    if (fd < 0 || ioctl(fd, UFFDIO_API, &api))
        FAIL("userfaultfd: %s", strerror(errno));
    return fd;
}

// Call first in main: ends the test as skipped where userfaultfd cannot be had.
static inline void skip_unless_permitted(void) {
#ifdef __SANITIZE_THREAD__
    // TSan holds its locks across fork, and fork returns only after another thread, which needs them, has read its
    // event.
    printf("skipped: these test the kernel, not code of ours that TSan could judge\n");
    exit(SKIP);
#endif
    int result = edm_uffd_check();
    if (result) {
        printf("skipped: userfaultfd: %s\n", strerror(-result));
        exit(SKIP);
    }
    alarm(60);
}

static inline uint8_t *map(uint64_t pages) {
    void *p = mmap(NULL, pages * PG, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    CHECK(p != MAP_FAILED);
    CHECK(madvise(p, pages * PG, MADV_NOHUGEPAGE) == 0 || errno == EINVAL);
    return p;
}

static inline void add(int fd, void *at, uint64_t pages) {
    struct uffdio_register r = {.range = {(uintptr_t)at, pages * PG},
                                .mode = UFFDIO_REGISTER_MODE_MISSING | UFFDIO_REGISTER_MODE_WP};
    CHECK(ioctl(fd, UFFDIO_REGISTER, &r) == 0);
}

static inline int copy_page(int fd, void *to, int byte, uint64_t mode) {
    static _Thread_local uint8_t page[PG] __attribute__((aligned(4096)));
    memset(page, byte, PG);
    struct uffdio_copy c = {.dst = (uintptr_t)to, .src = (uintptr_t)page, .len = PG, .mode = mode};
    return ioctl(fd, UFFDIO_COPY, &c) ? -errno : 0;
}

static inline int zero_page(int fd, void *at) {
    struct uffdio_zeropage z = {.range = {(uintptr_t)at, PG}};
    return ioctl(fd, UFFDIO_ZEROPAGE, &z) ? -errno : 0;
}

static inline int protect_page(int fd, void *at, bool on) {
    struct uffdio_writeprotect w = {.range = {(uintptr_t)at, PG}, .mode = on ? UFFDIO_WRITEPROTECT_MODE_WP : 0};
    return ioctl(fd, UFFDIO_WRITEPROTECT, &w) ? -errno : 0;
}

static inline int wake_page(int fd, void *at) {
    struct uffdio_range r = {(uintptr_t)at, PG};
    return ioctl(fd, UFFDIO_WAKE, &r) ? -errno : 0;
}

static inline int poison_page(int fd, void *at) {
    struct uffdio_poison p = {.range = {(uintptr_t)at, PG}};
    return ioctl(fd, UFFDIO_POISON, &p) ? -errno : 0;
}

static inline int move_pages_(int fd, void *to, void *from, uint64_t pages, uint64_t mode) {
    struct uffdio_move m = {.dst = (uintptr_t)to, .src = (uintptr_t)from, .len = pages * PG, .mode = mode};
    return ioctl(fd, UFFDIO_MOVE, &m) ? -errno : 0;
}

// The next message, waiting for it at most two seconds; false if there is none.
static inline bool next_message(int fd, struct uffd_msg *m, int ms) {
    struct pollfd p = {fd, POLLIN, 0};
    return poll(&p, 1, ms) == 1 && read(fd, m, sizeof *m) == sizeof *m;
}

#define EXPECT_MESSAGE(fd, m, what)                       \
    do {                                                  \
        if (!next_message(fd, m, 10000))                  \
            FAIL("no message, but a %s was due", #what);  \
        if ((m)->event != (what))                         \
            FAIL("event %#x, not %s", (m)->event, #what); \
    } while (0)

#define LONG_ENOUGH 100000  // µs after which something that could have happened would have

// One thing done on a thread of its own.
struct task {
    pthread_t thread;
    long (*run)(uint8_t *at, uint64_t argument);
    uint8_t *at;
    uint64_t argument;
    long result;
    _Atomic bool done;
};

static void *task_thread(void *task) {
    struct task *t = task;
    t->result = t->run(t->at, t->argument);
    atomic_store(&t->done, true);
    return NULL;
}

static inline void task_start(struct task *t, long (*run)(uint8_t *, uint64_t), uint8_t *at, uint64_t argument) {
    *t = (struct task){.run = run, .at = at, .argument = argument};
    CHECK(pthread_create(&t->thread, NULL, task_thread, t) == 0);
}

static inline long task_end(struct task *t) {
    pthread_join(t->thread, NULL);
    return t->result;
}

static inline bool still_waiting(struct task *t) {
    usleep(LONG_ENOUGH);
    return !atomic_load(&t->done);
}

static inline long do_read(uint8_t *at, uint64_t unused) {
    (void)unused;
    return *(volatile uint8_t *)at;
}

static inline long do_write(uint8_t *at, uint64_t byte) {
    *(volatile uint8_t *)at = (uint8_t)byte;
    return 0;
}

static inline long do_dontneed(uint8_t *at, uint64_t pages) { return madvise(at, pages * PG, MADV_DONTNEED); }
static inline long do_unmap(uint8_t *at, uint64_t pages) { return munmap(at, pages * PG); }
