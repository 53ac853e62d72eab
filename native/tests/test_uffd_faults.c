// The kernel's side of a fault: who is woken by what, which results calls give, what write protection tells.
#include "uffd_facts.h"

static int fd;
static uint8_t *mem;

static void begin(void) {
    fd = uffd_new(EVENTS | UFFD_FEATURE_PAGEFAULT_FLAG_WP);
    mem = map(16);
    add(fd, mem, 16);
}

static void finish(void) {
    close(fd);
    munmap(mem, 16 * PG);
}

static void eexist_wakes_nobody(void) {
    struct task t;
    struct uffd_msg m;
    begin();
    task_start(&t, do_read, mem, 0);
    EXPECT_MESSAGE(fd, &m, UFFD_EVENT_PAGEFAULT);
    CHECK(copy_page(fd, mem, 7, UFFDIO_COPY_MODE_DONTWAKE) == 0);
    CHECK(copy_page(fd, mem, 8, 0) == -EEXIST);
    CHECK(zero_page(fd, mem) == -EEXIST);
    CHECK(still_waiting(&t));
    CHECK(wake_page(fd, mem) == 0);
    CHECK(task_end(&t) == 7);
    finish();
}

static void a_fault_is_told_once_until_it_is_woken(void) {
    struct task t;
    struct uffd_msg m;
    begin();
    task_start(&t, do_read, mem + PG, 0);
    EXPECT_MESSAGE(fd, &m, UFFD_EVENT_PAGEFAULT);
    CHECK(m.arg.pagefault.address / PG == (uintptr_t)mem / PG + 1);
    CHECK(!(m.arg.pagefault.flags & UFFD_PAGEFAULT_FLAG_WRITE));
    CHECK(!next_message(fd, &m, 100));
    CHECK(wake_page(fd, mem + PG) == 0);
    EXPECT_MESSAGE(fd, &m, UFFD_EVENT_PAGEFAULT);
    CHECK(zero_page(fd, mem + PG) == 0);
    CHECK(task_end(&t) == 0);
    finish();
}

static void two_threads_on_a_page_are_two_messages_and_one_copy(void) {
    struct task t[2];
    struct uffd_msg m;
    begin();
    for (int i = 0; i < 2; i++) {
        task_start(&t[i], i ? do_write : do_read, mem, 0);
        EXPECT_MESSAGE(fd, &m, UFFD_EVENT_PAGEFAULT);
        CHECK(!(m.arg.pagefault.flags & UFFD_PAGEFAULT_FLAG_WRITE) == !i);
    }
    CHECK(copy_page(fd, mem, 3, 0) == 0);
    task_end(&t[0]);
    task_end(&t[1]);
    finish();
}

// The engine therefore takes a zero-filled page for dirty.
static void zero_filled_page_tells_of_no_write(void) {
    struct task t;
    struct uffd_msg m;
    begin();
    CHECK(zero_page(fd, mem) == 0);
    task_start(&t, do_write, mem, 5);
    CHECK(task_end(&t) == 0 && mem[0] == 5);
    CHECK(!next_message(fd, &m, 0));
    finish();
}

static void protected_page_tells_of_its_first_write(void) {
    struct task t;
    struct uffd_msg m;
    begin();
    CHECK(copy_page(fd, mem, 6, UFFDIO_COPY_MODE_WP) == 0);
    CHECK(mem[0] == 6);
    task_start(&t, do_write, mem, 9);
    EXPECT_MESSAGE(fd, &m, UFFD_EVENT_PAGEFAULT);
    CHECK(m.arg.pagefault.flags & UFFD_PAGEFAULT_FLAG_WP);
    CHECK(mem[0] == 6 && still_waiting(&t));
    CHECK(protect_page(fd, mem, false) == 0);  // wakes too
    task_end(&t);
    CHECK(mem[0] == 9);
    task_start(&t, do_write, mem, 10);
    task_end(&t);
    CHECK(!next_message(fd, &m, 0));
    finish();
}

static void protecting_an_absent_page_does_nothing(void) {
    struct task t;
    struct uffd_msg m;
    begin();
    CHECK(protect_page(fd, mem, true) == 0);
    task_start(&t, do_write, mem, 4);
    EXPECT_MESSAGE(fd, &m, UFFD_EVENT_PAGEFAULT);
    CHECK(!(m.arg.pagefault.flags & UFFD_PAGEFAULT_FLAG_WP));
    CHECK(zero_page(fd, mem) == 0);
    task_end(&t);
    CHECK(mem[0] == 4);
    finish();
}

static void results_of_a_copy(void) {
    static uint8_t source[4 * PG] __attribute__((aligned(4096)));
    begin();
    struct uffdio_copy c = {.dst = (uintptr_t)mem, .src = (uintptr_t)source, .len = 4 * PG};
    CHECK(zero_page(fd, mem + 2 * PG) == 0);
    CHECK(ioctl(fd, UFFDIO_COPY, &c) == -1 && errno == EAGAIN && c.copy == 2 * (int64_t)PG);
    c.dst += 2 * PG;
    CHECK(ioctl(fd, UFFDIO_COPY, &c) == -1 && errno == EEXIST && c.copy == -EEXIST);
    uint8_t *elsewhere = map(1);
    CHECK(copy_page(fd, elsewhere, 1, 0) == -ENOENT);  // mapped, not registered
    CHECK(munmap(elsewhere, PG) == 0);
    CHECK(copy_page(fd, elsewhere, 1, 0) == -ENOENT);
    CHECK(zero_page(fd, elsewhere) == -ENOENT);
    CHECK(wake_page(fd, elsewhere) == 0);
    finish();
}

static void poisoned_page_kills_whoever_touches_it(void) {
    begin();
    int result = poison_page(fd, mem);
    if (result == -EINVAL || result == -ENOTTY) {
        printf("this kernel has no UFFDIO_POISON: it was not tested\n");
        finish();
        return;
    }
    CHECK(result == 0);
    CHECK(zero_page(fd, mem) == -EEXIST && poison_page(fd, mem) == -EEXIST);
    CHECK(poison_page(fd, mem + PG) == 0);
    CHECK(copy_page(fd, mem + PG, 1, 0) == 0 && mem[PG] == 1);  // a page that turns up after all heals it
    close(fd);                                                  // with its fork events, fork would wait for a reader
    pid_t child = fork();
    if (!child) {
        signal(SIGBUS, SIG_DFL);  // sanitizers take it
        _exit((int)do_read(mem, 0));
    }
    int status;
    CHECK(waitpid(child, &status, 0) == child);
    // Closing the last userfaultfd ends the watch, not the poison.
    CHECK(WIFSIGNALED(status) && WTERMSIG(status) == SIGBUS);
    munmap(mem, 16 * PG);
}

int main(void) {
    skip_unless_permitted();
    eexist_wakes_nobody();
    a_fault_is_told_once_until_it_is_woken();
    two_threads_on_a_page_are_two_messages_and_one_copy();
    zero_filled_page_tells_of_no_write();
    protected_page_tells_of_its_first_write();
    protecting_an_absent_page_does_nothing();
    results_of_a_copy();
    poisoned_page_kills_whoever_touches_it();
    return 0;
}
