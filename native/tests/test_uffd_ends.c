// What becomes of a program when its userfaultfd is closed or its handler dies, and of a thread whose last page is
// away.
#include <linux/futex.h>

#include "uffd_facts.h"

static uint8_t *mem;

static int begin(void) {
    int fd = uffd_new(UFFD_FEATURE_MISSING_SHMEM);  // no events: fork here must not wait for a reader
    mem = map(4);
    add(fd, mem, 4);
    return fd;
}

// The reason for the holder: whoever closes the last descriptor hands out zeros in place of the pages.
static void absent_pages_read_zeros_when_the_last_descriptor_closes(void) {
    struct task t;
    struct uffd_msg m;
    int fd = begin();
    task_start(&t, do_read, mem, 0);
    EXPECT_MESSAGE(fd, &m, UFFD_EVENT_PAGEFAULT);
    CHECK(still_waiting(&t));
    close(fd);
    CHECK(task_end(&t) == 0);
    CHECK(mem[PG] == 0);
    munmap(mem, 4 * PG);
}

static pid_t hold(int fd) {
    pid_t pid = fork();
    if (!pid) {
        (void)fd;
        for (;;)
            pause();
    }
    CHECK(pid > 0);
    return pid;
}

static void holder_keeps_a_fault_waiting_until_somebody_serves_it(void) {
    struct task t;
    struct uffd_msg m;
    int fd = begin();
    pid_t holder = hold(fd);
    int number = fd;
    close(fd);
    task_start(&t, do_read, mem, 0);
    CHECK(still_waiting(&t));
    int pidfd = (int)syscall(SYS_pidfd_open, holder, 0);
    fd = (int)syscall(SYS_pidfd_getfd, pidfd, number, 0);
    CHECK(fd >= 0);
    EXPECT_MESSAGE(fd, &m, UFFD_EVENT_PAGEFAULT);
    CHECK(copy_page(fd, mem, 42, 0) == 0);
    CHECK(task_end(&t) == 42);
    CHECK(kill(holder, SIGKILL) == 0 && waitpid(holder, NULL, 0) == holder);
    close(pidfd);
    close(fd);
    munmap(mem, 4 * PG);
}

// A fault that a handler had read before it died is told again once it is woken.
static void fault_read_by_a_dead_handler_is_told_again_after_a_wake(void) {
    struct task t;
    struct uffd_msg m;
    int fd = begin();
    task_start(&t, do_read, mem, 0);
    pid_t handler = fork();
    if (!handler)
        _exit(!next_message(fd, &m, 10000));
    int status;
    CHECK(waitpid(handler, &status, 0) == handler && status == 0);
    CHECK(!next_message(fd, &m, 100));
    CHECK(wake_page(fd, mem) == 0);
    EXPECT_MESSAGE(fd, &m, UFFD_EVENT_PAGEFAULT);
    CHECK(copy_page(fd, mem, 43, 0) == 0);
    CHECK(task_end(&t) == 43);
    close(fd);
    munmap(mem, 4 * PG);
}

static _Atomic bool gate;

static int waiting_thread(void *unused) {
    (void)unused;
    while (!atomic_load(&gate))
        sched_yield();
    syscall(SYS_exit, 0);
    return 0;
}

// How pthread_join learns of an exit: the kernel clears a word and wakes who waits for it. Returns whether it did.
static bool exit_is_noticed(int fd, bool evicted) {
    static uint8_t stack[64 * 1024] __attribute__((aligned(64)));
    uint8_t page[PG];
    int *tid = (int *)mem;
    CHECK(copy_page(fd, mem, 1, 0) == 0);
    atomic_store(&gate, false);
    int flags = CLONE_VM | CLONE_FS | CLONE_FILES | CLONE_SIGHAND | CLONE_THREAD | CLONE_SYSVSEM | CLONE_PARENT_SETTID |
                CLONE_CHILD_CLEARTID;
    int thread = clone(waiting_thread, stack + sizeof stack, flags, NULL, tid, NULL, tid);
    CHECK(thread > 0 && *tid == thread);
    memcpy(page, mem, PG);
    if (evicted)
        CHECK(madvise(mem, PG, MADV_DONTNEED) == 0);
    atomic_store(&gate, true);
    while (syscall(SYS_tgkill, getpid(), thread, 0) == 0)
        usleep(1000);
    if (evicted) {
        struct uffdio_copy c = {.dst = (uintptr_t)mem, .src = (uintptr_t)page, .len = PG};
        static uint8_t aligned[PG] __attribute__((aligned(4096)));
        memcpy(aligned, page, PG);
        c.src = (uintptr_t)aligned;
        CHECK(ioctl(fd, UFFDIO_COPY, &c) == 0);
    }
    bool noticed = *(volatile int *)tid == 0;
    CHECK(madvise(mem, PG, MADV_DONTNEED) == 0);
    return noticed;
}

// A thread that exits can no longer wait for a fault: its struct pthread must be there. See exits.c.
static void exit_goes_unnoticed_when_its_page_is_away(void) {
    int fd = begin();
    CHECK(exit_is_noticed(fd, false));
    CHECK(!exit_is_noticed(fd, true));
    close(fd);
    munmap(mem, 4 * PG);
}

static void *sleeper(void *line) {
    char c;
    (void)!read(*(int *)line, &c, 1);
    return NULL;
}

static void excluded_pages_hold_every_threads_struct(void) {
    struct ranges excluded = {0};
    struct edm_engine engine = {0};
    struct space self = {.engine = &engine, .pid = getpid(), .mem_fd = -1};
    pthread_t thread;
    int line[2];
    CHECK(pipe(line) == 0);
    CHECK(pthread_create(&thread, NULL, sleeper, &line[0]) == 0);
    usleep(LONG_ENOUGH);  // until it has set its robust list
    exits_look(&self, &excluded);
    CHECK(ranges_has(&excluded, (uintptr_t)thread / PG));
    CHECK(ranges_has(&excluded, (uintptr_t)pthread_self() / PG));
    close(line[1]);
    pthread_join(thread, NULL);
    close(line[0]);
    CHECK(ranges_has(&self.exits, (uintptr_t)thread / PG));  // for the next thread on this stack
    exits_forget(&self, (uintptr_t)thread / PG, (uintptr_t)thread / PG + 1);
    CHECK(!ranges_has(&self.exits, (uintptr_t)thread / PG));
    ranges_free(&excluded);
    ranges_free(&self.exits);
}

int main(void) {
    skip_unless_permitted();
    absent_pages_read_zeros_when_the_last_descriptor_closes();
    holder_keeps_a_fault_waiting_until_somebody_serves_it();
    fault_read_by_a_dead_handler_is_told_again_after_a_wake();
    exit_goes_unnoticed_when_its_page_is_away();
    excluded_pages_hold_every_threads_struct();
    return 0;
}
