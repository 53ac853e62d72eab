// io_uring by raw system calls: reads and writes of plain and of registered (pinned) buffers, also by the kernel's own
// thread (SQPOLL), and buffers that the kernel takes as data comes, while everything else is evicted. A pinned page that
// was evicted and came back would be another page than the kernel's. Exit 77: no io_uring.
#include "steps.h"

#include <linux/io_uring.h>
#include <sys/socket.h>
#include <sys/uio.h>

#define PAGES 128ul
#define BYTES (PAGES * PAGE)
#define ENTRIES 16
static struct ring {
    int fd;
    bool polled;
    _Atomic uint32_t *sq_flags, *sq_tail, *cq_head, *cq_tail;
    uint32_t *sq_mask, *cq_mask, *sq_array;
    struct io_uring_sqe *sqes;
    struct io_uring_cqe *cqes;
} ring;
static int file_fd;

static void *ring_map(uint64_t bytes, uint64_t offset) {
    void *p = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, ring.fd, (off_t)offset);
    MUST(p != MAP_FAILED);
    return p;
}

static bool ring_open(uint32_t flags) {
    struct io_uring_params p = {.flags = flags, .sq_thread_idle = 20};
    ring.polled = flags & IORING_SETUP_SQPOLL;
    ring.fd = (int)syscall(SYS_io_uring_setup, ENTRIES, &p);
    if (ring.fd < 0)
        return false;
    char *sq = ring_map(p.sq_off.array + p.sq_entries * 4, IORING_OFF_SQ_RING);
    char *cq = ring_map(p.cq_off.cqes + p.cq_entries * sizeof *ring.cqes, IORING_OFF_CQ_RING);
    ring.sqes = ring_map(p.sq_entries * sizeof *ring.sqes, IORING_OFF_SQES);
    ring.sq_flags = (void *)(sq + p.sq_off.flags);
    ring.sq_tail = (void *)(sq + p.sq_off.tail);
    ring.sq_mask = (void *)(sq + p.sq_off.ring_mask);
    ring.sq_array = (void *)(sq + p.sq_off.array);
    ring.cq_head = (void *)(cq + p.cq_off.head);
    ring.cq_tail = (void *)(cq + p.cq_off.tail);
    ring.cq_mask = (void *)(cq + p.cq_off.ring_mask);
    ring.cqes = (void *)(cq + p.cq_off.cqes);
    return true;
}

static void submit_this(struct io_uring_sqe what) {
    uint32_t tail = *ring.sq_tail, slot = tail & *ring.sq_mask;
    ring.sqes[slot] = what;
    ring.sq_array[slot] = slot;
    *ring.sq_tail = tail + 1;
    if (!ring.polled)
        MUST(syscall(SYS_io_uring_enter, ring.fd, 1, 0, 0, NULL, 0) == 1);
    else if (*ring.sq_flags & IORING_SQ_NEED_WAKEUP)
        MUST(syscall(SYS_io_uring_enter, ring.fd, 0, 0, IORING_ENTER_SQ_WAKEUP, NULL, 0) >= 0);
}

static void submit(int op, int index, char *at, uint64_t bytes, uint64_t offset) {
    submit_this((struct io_uring_sqe){.opcode = (uint8_t)op,
                               .fd = file_fd,
                               .off = offset,
                               .addr = (uint64_t)(uintptr_t)at,
                               .len = (uint32_t)bytes,
                               .buf_index = (uint16_t)index,
                               .user_data = bytes});
}

static struct io_uring_cqe *next(void) {
    while (*ring.cq_head == *ring.cq_tail)
        MUST(syscall(SYS_io_uring_enter, ring.fd, 0, 1, IORING_ENTER_GETEVENTS, NULL, 0) >= 0 || errno == EINTR);
    return &ring.cqes[*ring.cq_head & *ring.cq_mask];
}

static void reap(int count) {
    while (count) {
        struct io_uring_cqe *c = next();
        if (c->res < 0)
            WRONG("a request failed: %s", strerror(-c->res));
        if ((uint64_t)c->res != c->user_data)
            WRONG("a request did %d bytes of %lu", c->res, (unsigned long)c->user_data);
        ++*ring.cq_head;
        count--;
    }
}

// The whole area in ENTRIES requests, all on their way at once.
static void transfer(int op, int index, char *area_) {
    uint64_t piece = BYTES / ENTRIES;
    for (uint64_t i = 0; i < ENTRIES; i++)
        submit(op, index, area_ + i * piece, piece, i * piece);
    reap(ENTRIES);
}

static void plain_buffers(void) {
    char *from = area(PAGES), *to = area(PAGES);
    for (uint64_t round = 0; round < 2; round++) {
        fill(from, 0, PAGES, 1 + round);
        push_out();
        transfer(IORING_OP_WRITE, 0, from);
        push_out();
        transfer(IORING_OP_READ, 0, to);
        push_out();
        look(to, 0, PAGES, 1 + round, "read");
    }
    munmap(from, BYTES);
    munmap(to, BYTES);
}

// Pinned for long: the program and the kernel must go on seeing the same pages.
static void registered_buffers(void) {
    char *from = area(PAGES), *to = area(PAGES);
    struct iovec v[2] = {{from, BYTES}, {to, BYTES}};
    fill(from, 0, PAGES, 5);
    push_out();  // registering brings back what has left
    MUST(!syscall(SYS_io_uring_register, ring.fd, IORING_REGISTER_BUFFERS, v, 2));
    for (uint64_t round = 0; round < 4; round++) {
        push_out();
        fill(from, 0, PAGES, 6 + round);
        push_out();
        transfer(IORING_OP_WRITE_FIXED, 0, from);
        fill(to, 0, PAGES, 90);
        push_out();
        transfer(IORING_OP_READ_FIXED, 1, to);
        look(to, 0, PAGES, 6 + round, "read into a registered buffer");
        push_out();
        look(to, 0, PAGES, 6 + round, "read into a registered buffer, later");
        look(from, 0, PAGES, 6 + round, "a registered buffer");
    }
    MUST(!syscall(SYS_io_uring_register, ring.fd, IORING_UNREGISTER_BUFFERS, NULL, 0));
    push_out();
    look(from, 0, PAGES, 9, "no longer registered");
    munmap(from, BYTES);
    munmap(to, BYTES);
}

// By the kernel's thread, which has the program's memory and waits for its pages as the program does.
static void polled_buffers(void) {
    struct ring before = ring;
    MUST(ring_open(IORING_SETUP_SQPOLL));
    plain_buffers();
    registered_buffers();
    close(ring.fd);
    ring = before;
}

#define PIECE (4 * PAGE)
#define GROUP 1

static void receive(int from) {
    submit_this((struct io_uring_sqe){.opcode = IORING_OP_RECV,
                                      .fd = from,
                                      .flags = IOSQE_BUFFER_SELECT,
                                      .ioprio = IORING_RECV_MULTISHOT,
                                      .buf_group = GROUP});
}

// Of a ring of buffers that the kernel chooses from when data has come, by which time they have left.
static void chosen_buffers(void) {
    int ends[2];
    char *buffers = area(PAGES), *from = area(PAGES), *to = area(PAGES);
    struct io_uring_buf_ring *list = (struct io_uring_buf_ring *)area(1);
    struct io_uring_buf_reg offer = {.ring_addr = (uint64_t)(uintptr_t)list, .ring_entries = PAGES / 4, .bgid = GROUP};
    uint64_t got = 0;
    MUST(!socketpair(AF_UNIX, SOCK_STREAM, 0, ends));
    if (syscall(SYS_io_uring_register, ring.fd, IORING_REGISTER_PBUF_RING, &offer, 1)) {
        MUST(errno == EINVAL);  // before Linux 5.19
        fill(to, 0, PAGES, 1);
        look(to, 0, PAGES, 1, "without them");
        return;
    }
    for (uint64_t i = 0; i < PAGES / 4; i++)
        list->bufs[i] = (struct io_uring_buf){(uint64_t)(uintptr_t)(buffers + i * PIECE), PIECE, (uint16_t)i, 0};
    __atomic_store_n(&list->tail, PAGES / 4, __ATOMIC_RELEASE);
    fill(buffers, 0, PAGES, 2);
    fill(from, 0, PAGES, 1);
    receive(ends[1]);
    for (uint64_t sent = 0; sent < BYTES; sent += PIECE) {
        leave();
        MUST(send(ends[0], from + sent, PIECE, 0) == (ssize_t)PIECE);
        while (got < sent + PIECE) {
            struct io_uring_cqe *c = next();
            if (c->res <= 0 || !(c->flags & IORING_CQE_F_BUFFER))
                WRONG("nothing was received: %d", c->res);
            memcpy(to + got, buffers + (c->flags >> IORING_CQE_BUFFER_SHIFT) * PIECE, (size_t)c->res);
            got += (uint64_t)c->res;
            bool more = c->flags & IORING_CQE_F_MORE;
            ++*ring.cq_head;
            if (!more && got < BYTES)
                receive(ends[1]);
        }
    }
    look(to, 0, PAGES, 1, "received");
    close(ends[0]);
    close(ends[1]);
    munmap(from, BYTES);
    munmap(to, BYTES);
}

int main(int argc, char **argv) {
    static const struct step steps[] = {{"plain_buffers", plain_buffers},
                                        {"registered_buffers", registered_buffers},
                                        {"polled_buffers", polled_buffers},
                                        {"chosen_buffers", chosen_buffers}};
    char path[300];
    snprintf(path, sizeof path, "%s/uring-XXXXXX", getenv("TMPDIR") ? getenv("TMPDIR") : "/var/tmp");
    file_fd = mkstemp(path);
    MUST(file_fd >= 0 && !unlink(path));
    if (!ring_open(0)) {
        puts("no io_uring here");
        return 77;
    }
    churn_start();
    int status = run_steps(steps, COUNT(steps), argc, argv);
    churn_stop();
    return status;
}
