// Address-space events: which come, in what order, what they hold up, and what is refused until they are read.
#include "uffd_facts.h"

static int fd;
static uint8_t *mem;

static void begin(void) {
    fd = uffd_new(EVENTS | UFFD_FEATURE_PAGEFAULT_FLAG_WP);
    mem = map(32);
    add(fd, mem, 32);
}

static void finish(void) {
    close(fd);
    munmap(mem, 32 * PG);
}

static uint64_t page_in(uint64_t address) { return (address - (uintptr_t)mem) / PG; }

static void expect_range(struct uffd_msg *m, uint64_t a, uint64_t b) {
    CHECK(page_in(m->arg.remove.start) == a && page_in(m->arg.remove.end) == b);
}

static void event_waits(void) {
    struct pollfd p = {fd, POLLIN, 0};
    CHECK(poll(&p, 1, 10000) == 1);
}

static void nothing_is_filled_while_an_event_is_unread(void) {
    struct task t;
    struct uffd_msg m;
    begin();
    CHECK(copy_page(fd, mem + 5 * PG, 5, 0) == 0);
    task_start(&t, do_dontneed, mem + 2 * PG, 2);
    event_waits();
    CHECK(copy_page(fd, mem, 1, 0) == -EAGAIN);
    CHECK(zero_page(fd, mem) == -EAGAIN);
    CHECK(protect_page(fd, mem + 5 * PG, true) == -EAGAIN);
    CHECK(wake_page(fd, mem) == 0);
    CHECK(still_waiting(&t));
    EXPECT_MESSAGE(fd, &m, UFFD_EVENT_REMOVE);
    expect_range(&m, 2, 4);
    CHECK(task_end(&t) == 0);
    CHECK(copy_page(fd, mem, 1, 0) == 0 && mem[0] == 1);
    finish();
}

// In one read, though the event was there first: the engine therefore sorts.
static void faults_are_read_before_events(void) {
    struct task remover, reader;
    struct uffd_msg m[4];
    begin();
    task_start(&remover, do_dontneed, mem, 1);
    event_waits();
    task_start(&reader, do_read, mem + 9 * PG, 0);
    usleep(LONG_ENOUGH);
    CHECK(read(fd, m, sizeof m) == 2 * sizeof *m);
    CHECK(m[0].event == UFFD_EVENT_PAGEFAULT && m[1].event == UFFD_EVENT_REMOVE);
    CHECK(task_end(&remover) == 0);
    CHECK(zero_page(fd, mem + 9 * PG) == 0);
    CHECK(task_end(&reader) == 0);
    finish();
}

static void remove_is_told_before_the_pages_go(void) {
    struct task t;
    struct uffd_msg m;
    begin();
    CHECK(copy_page(fd, mem, 7, 0) == 0);
    task_start(&t, do_dontneed, mem, 1);
    event_waits();
    CHECK(mem[0] == 7);
    EXPECT_MESSAGE(fd, &m, UFFD_EVENT_REMOVE);
    CHECK(task_end(&t) == 0);
    task_start(&t, do_read, mem, 0);
    EXPECT_MESSAGE(fd, &m, UFFD_EVENT_PAGEFAULT);
    CHECK(zero_page(fd, mem) == 0);
    CHECK(task_end(&t) == 0);
    finish();
}

// Another thread may have mapped something else there by the time the event is read.
static void unmap_is_told_after_the_pages_went(void) {
    struct task t;
    struct uffd_msg m;
    begin();
    CHECK(copy_page(fd, mem + 3 * PG, 7, 0) == 0);
    task_start(&t, do_unmap, mem + 3 * PG, 1);
    event_waits();
    void *fresh =
        mmap(mem + 3 * PG, PG, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0);
    CHECK(fresh == mem + 3 * PG);
    CHECK(mem[3 * PG] == 0);  // not registered: no fault is told
    EXPECT_MESSAGE(fd, &m, UFFD_EVENT_UNMAP);
    expect_range(&m, 3, 4);
    CHECK(task_end(&t) == 0);
    CHECK(!next_message(fd, &m, 0));
    finish();
}

static long do_remap(uint8_t *at, uint64_t to) {
    return mremap(at, 2 * PG, 2 * PG, MREMAP_MAYMOVE | MREMAP_FIXED, (void *)to) == (void *)to ? 0 : -errno;
}

static void remap_is_told_as_unmap_remap_unmap(void) {
    struct task t;
    struct uffd_msg m;
    begin();
    CHECK(copy_page(fd, mem + 4 * PG, 44, UFFDIO_COPY_MODE_WP) == 0);
    CHECK(copy_page(fd, mem + 20 * PG, 99, 0) == 0);
    task_start(&t, do_remap, mem + 4 * PG, (uintptr_t)mem + 20 * PG);
    EXPECT_MESSAGE(fd, &m, UFFD_EVENT_UNMAP);
    expect_range(&m, 20, 22);
    CHECK(copy_page(fd, mem, 1, 0) == -EAGAIN);  // the other two are still to come
    EXPECT_MESSAGE(fd, &m, UFFD_EVENT_REMAP);
    CHECK(page_in(m.arg.remap.from) == 4 && page_in(m.arg.remap.to) == 20 && m.arg.remap.len == 2 * PG);
    EXPECT_MESSAGE(fd, &m, UFFD_EVENT_UNMAP);
    expect_range(&m, 4, 6);
    CHECK(task_end(&t) == 0);
    CHECK(mem[20 * PG] == 44);
    // The page that was absent is absent at its new place, and registered there.
    task_start(&t, do_read, mem + 21 * PG, 0);
    EXPECT_MESSAGE(fd, &m, UFFD_EVENT_PAGEFAULT);
    CHECK(copy_page(fd, mem + 21 * PG, 45, 0) == 0);
    CHECK(task_end(&t) == 45);
    // Write protection went along.
    task_start(&t, do_write, mem + 20 * PG, 50);
    EXPECT_MESSAGE(fd, &m, UFFD_EVENT_PAGEFAULT);
    CHECK(m.arg.pagefault.flags & UFFD_PAGEFAULT_FLAG_WP);
    CHECK(protect_page(fd, mem + 20 * PG, false) == 0);
    task_end(&t);
    finish();
}

static long do_fork(uint8_t *at, uint64_t write_to) {
    pid_t child = fork();
    if (child)
        return child;
    uint8_t byte = *(volatile uint8_t *)at;
    (void)!write((int)write_to, &byte, 1);
    _exit(0);
}

static void forked_child_has_a_userfaultfd_of_its_own(void) {
    struct task t;
    struct uffd_msg m;
    int line[2];
    uint8_t byte = 0;
    begin();
    CHECK(pipe(line) == 0);
    task_start(&t, do_fork, mem + PG, (uint64_t)line[1]);
    event_waits();
    CHECK(still_waiting(&t));  // fork has not returned
    CHECK(zero_page(fd, mem) == -EAGAIN);
    EXPECT_MESSAGE(fd, &m, UFFD_EVENT_FORK);
    int child_fd = (int)m.arg.fork.ufd;
    pid_t child = (pid_t)task_end(&t);
    CHECK(child > 0);
    CHECK(fcntl(child_fd, F_SETFL, O_NONBLOCK) == 0);
    EXPECT_MESSAGE(child_fd, &m, UFFD_EVENT_PAGEFAULT);
    CHECK(page_in(m.arg.pagefault.address) == 1);
    CHECK(copy_page(child_fd, mem + PG, 77, 0) == 0);  // the child's page: the parent's stays absent
    CHECK(read(line[0], &byte, 1) == 1 && byte == 77);
    int status;
    CHECK(waitpid(child, &status, 0) == child && status == 0);
    CHECK(zero_page(child_fd, mem) == -ESRCH);
    CHECK(zero_page(fd, mem + PG) == 0);
    close(child_fd);
    close(line[0]);
    close(line[1]);
    finish();
}

int main(void) {
    skip_unless_permitted();
    nothing_is_filled_while_an_event_is_unread();
    faults_are_read_before_events();
    remove_is_told_before_the_pages_go();
    unmap_is_told_after_the_pages_went();
    remap_is_told_as_unmap_remap_unmap();
    forked_child_has_a_userfaultfd_of_its_own();
    return 0;
}
