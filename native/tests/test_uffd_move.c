// UFFDIO_MOVE, with which pages are evicted: what it takes, and what it refuses where a copy and a drop would lose
// data.
#include <linux/io_uring.h>

#include "uffd_facts.h"

#define MOVE_ANYWAY (UFFDIO_MOVE_MODE_DONTWAKE | UFFDIO_MOVE_MODE_ALLOW_SRC_HOLES)

static int fd;
static uint8_t *mem, *staging;

static void begin(void) {
    fd = uffd_new(EVENTS | UFFD_FEATURE_PAGEFAULT_FLAG_WP | UFFD_FEATURE_MOVE);
    mem = map(16);
    staging = map(16);
    add(fd, mem, 16);
    add(fd, staging, 16);
}

static void finish(void) {
    close(fd);
    munmap(mem, 16 * PG);
    munmap(staging, 16 * PG);
}

static void page_leaves_and_its_next_touch_faults(void) {
    struct task t;
    struct uffd_msg m;
    begin();
    CHECK(copy_page(fd, mem + PG, 11, UFFDIO_COPY_MODE_WP) == 0);
    CHECK(copy_page(fd, mem + 3 * PG, 13, 0) == 0);
    CHECK(move_pages_(fd, staging, mem, 4, 0) == -ENOENT);  // page 0 is a hole
    CHECK(move_pages_(fd, staging, mem, 4, MOVE_ANYWAY) == 0);
    CHECK(staging[PG] == 11 && staging[3 * PG] == 13);
    task_start(&t, do_write, mem + PG, 5);
    EXPECT_MESSAGE(fd, &m, UFFD_EVENT_PAGEFAULT);
    CHECK(!(m.arg.pagefault.flags & UFFD_PAGEFAULT_FLAG_WP));  // missing, though it was protected before
    CHECK(copy_page(fd, mem + PG, 11, 0) == 0);
    task_end(&t);
    CHECK(mem[PG] == 5);
    finish();
}

// The thread in munmap has unmapped page 4 and waits; another has mapped and filled it anew. Only the userfaultfd that
// has the event knows.
static void nothing_moves_while_an_event_is_unread(void) {
    struct task t;
    struct uffd_msg m;
    begin();
    CHECK(copy_page(fd, mem + 4 * PG, 1, 0) == 0 && copy_page(fd, mem, 2, 0) == 0);
    task_start(&t, do_unmap, mem + 4 * PG, 1);
    struct pollfd p = {fd, POLLIN, 0};
    CHECK(poll(&p, 1, 10000) == 1);
    uint8_t *fresh =
        mmap(mem + 4 * PG, PG, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0);
    CHECK(fresh == mem + 4 * PG);
    memset(fresh, 0x55, PG);
    CHECK(move_pages_(fd, staging, fresh, 1, MOVE_ANYWAY) == -EAGAIN);
    CHECK(move_pages_(fd, staging, mem, 1, MOVE_ANYWAY) == -EAGAIN);
    CHECK(fresh[0] == 0x55 && mem[0] == 2);
    // Through another userfaultfd nothing guards it.
    int other = uffd_new(UFFD_FEATURE_MOVE);
    uint8_t *elsewhere = map(1);
    add(other, elsewhere, 1);
    CHECK(move_pages_(other, elsewhere, fresh, 1, 0) == 0 && elsewhere[0] == 0x55);
    close(other);
    munmap(elsewhere, PG);
    EXPECT_MESSAGE(fd, &m, UFFD_EVENT_UNMAP);
    CHECK(task_end(&t) == 0);
    CHECK(move_pages_(fd, staging, mem, 1, MOVE_ANYWAY) == 0 && staging[0] == 2);
    finish();
}

static void pinned_page_does_not_move(void) {
    begin();
    struct io_uring_params params = {0};
    int ring = (int)syscall(SYS_io_uring_setup, 4, &params);
    if (ring < 0) {
        printf("io_uring: %s: pinned pages were not tested\n", strerror(errno));
        finish();
        return;
    }
    CHECK(copy_page(fd, mem, 1, 0) == 0 && copy_page(fd, mem + PG, 2, 0) == 0);
    struct iovec buffer = {mem, PG};
    CHECK(syscall(SYS_io_uring_register, ring, IORING_REGISTER_BUFFERS, &buffer, 1) == 0);
    CHECK(move_pages_(fd, staging, mem, 1, MOVE_ANYWAY) == -EBUSY);
    CHECK(mem[0] == 1);
    CHECK(move_pages_(fd, staging + PG, mem + PG, 1, MOVE_ANYWAY) == 0 && staging[PG] == 2);
    CHECK(syscall(SYS_io_uring_register, ring, IORING_UNREGISTER_BUFFERS, NULL, 0) == 0);
    close(ring);
    // The kernel lets go of the pin a little later.
    int result = -EBUSY;
    for (int i = 0; i < 1000 && result == -EBUSY; i++) {
        usleep(1000);
        result = move_pages_(fd, staging, mem, 1, MOVE_ANYWAY);
    }
    CHECK(result == 0 && staging[0] == 1);
    finish();
}

static void locked_page_does_not_move(void) {
    begin();
    CHECK(copy_page(fd, mem, 1, 0) == 0);
    if (syscall(SYS_mlock, mem, PG)) {  // the sanitizers have a mlock that does nothing
        printf("mlock: %s: locked pages were not tested\n", strerror(errno));
    } else {
        CHECK(move_pages_(fd, staging, mem, 1, MOVE_ANYWAY) == -EINVAL && mem[0] == 1);
        CHECK(syscall(SYS_munlock, mem, PG) == 0);
    }
    finish();
}

// A page that a fork has made common moves only after it was made this process's own again.
static void shared_page_moves_after_it_was_unshared(void) {
    fd = uffd_new(UFFD_FEATURE_MOVE);
    mem = map(16);
    staging = map(16);
    add(fd, staging, 16);
    memset(mem, 9, PG);
    int line[2];
    CHECK(pipe(line) == 0);
    pid_t child = fork();
    if (!child) {
        char c;
        close(line[1]);
        (void)!read(line[0], &c, 1);
        _exit(mem[0] != 9);
    }
    CHECK(move_pages_(fd, staging, mem, 1, MOVE_ANYWAY) == -EBUSY);
    CHECK(madvise(mem, PG, MADV_POPULATE_WRITE) == 0);
    CHECK(move_pages_(fd, staging, mem, 1, MOVE_ANYWAY) == 0 && staging[0] == 9);
    close(line[1]);
    int status;
    CHECK(waitpid(child, &status, 0) == child && status == 0);
    close(line[0]);
    finish();
}

int main(void) {
    skip_unless_permitted();
    page_leaves_and_its_next_touch_faults();
    nothing_moves_while_an_event_is_unread();
    pinned_page_does_not_move();
    locked_page_does_not_move();
    shared_page_moves_after_it_was_unshared();
    return 0;
}
