// A program that has userfaultfds of its own, over memory that it has used before, and that EDM has captured and
// evicted meanwhile: what they tell of, and what is there, is what it is without EDM.
#include "steps.h"

#include <poll.h>
#include <sys/ioctl.h>

#include "../../../native/uffd_abi.h"
#include "captured.h"

#define PAGES 128ul
#define MISSING UFFDIO_REGISTER_MODE_MISSING
#define PROTECTED UFFDIO_REGISTER_MODE_WP

static uint64_t place(const void *p) { return (uint64_t)(uintptr_t)p; }

static int open_uffd(uint64_t features) {
    int fd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK);
    MUST(fd >= 0);
    struct uffdio_api api = {.api = UFFD_API, .features = features};
    MUST(!ioctl(fd, UFFDIO_API, &api));
    return fd;
}

static int try_to_add(int fd, const void *p, uint64_t pages, uint64_t mode) {
    struct uffdio_register r = {.range = {place(p), pages * PAGE}, .mode = mode};
    return ioctl(fd, UFFDIO_REGISTER, &r);
}

static void add(int fd, const void *p, uint64_t pages, uint64_t mode) { MUST(!try_to_add(fd, p, pages, mode)); }

static void take_out(int fd, const void *p, uint64_t pages) {
    struct uffdio_range r = {place(p), pages * PAGE};
    MUST(!ioctl(fd, UFFDIO_UNREGISTER, &r));
}

static void protect(int fd, const void *p, uint64_t pages, bool on) {
    struct uffdio_writeprotect w = {{place(p), pages * PAGE}, on ? UFFDIO_WRITEPROTECT_MODE_WP : 0};
    MUST(!ioctl(fd, UFFDIO_WRITEPROTECT, &w));
}

// ---- a thread that answers: a missing page with that of `seed`, a protected one by letting it be written to

struct server {
    int fd;
    const char *area;
    uint64_t seed;
    pthread_t thread;
    atomic_bool end;
    _Atomic uint64_t missing, written, removed, moved, unmapped;
    _Atomic int child;  // the uffd of one
};

static void answer_missing(struct server *s, uint64_t address) {
    static _Thread_local uint64_t page[512];
    s->missing++;  // before its thread goes on
    uint64_t first = (address / PAGE * PAGE - place(s->area)) / 8;
    for (uint64_t i = 0; i < 512; i++)
        page[i] = word_at(s->seed, first + i);
    struct uffdio_copy c = {.dst = address / PAGE * PAGE, .src = place(page), .len = PAGE};
    while (ioctl(s->fd, UFFDIO_COPY, &c)) {
        MUST(errno == EAGAIN);
        c.copy = 0;
    }
}

static void *serve(void *server) {
    struct server *s = server;
    struct pollfd p = {s->fd, POLLIN, 0};
    struct uffd_msg m;
    while (!s->end) {
        if (poll(&p, 1, 5) != 1 || read(s->fd, &m, sizeof m) != sizeof m)
            continue;
        if (m.event == UFFD_EVENT_REMOVE)
            s->removed++;
        else if (m.event == UFFD_EVENT_REMAP)
            s->moved++;
        else if (m.event == UFFD_EVENT_UNMAP)
            s->unmapped++;
        else if (m.event == UFFD_EVENT_FORK)
            s->child = (int)m.arg.fork.ufd;
        else if (!(m.arg.pagefault.flags & UFFD_PAGEFAULT_FLAG_WP))
            answer_missing(s, m.arg.pagefault.address);
        else {
            struct uffdio_writeprotect w = {{m.arg.pagefault.address / PAGE * PAGE, PAGE}, 0};
            s->written++;
            MUST(!ioctl(s->fd, UFFDIO_WRITEPROTECT, &w) || errno == ENOENT);  // taken out meanwhile
        }
    }
    return NULL;
}

static void serve_start(struct server *s) { MUST(!pthread_create(&s->thread, NULL, serve, s)); }

static void serve_stop(struct server *s) {
    s->end = true;
    pthread_join(s->thread, NULL);
    close(s->fd);
}

static void told(const char *of, uint64_t is, uint64_t should) {
    if (is != should)
        WRONG("told of %lu %s, not %lu", (unsigned long)is, of, (unsigned long)should);
}

// An event is counted when it has been read, and its system call may return before that.
static void told_soon(const char *of, const _Atomic uint64_t *count, uint64_t should) {
    for (int ms = 0; *count < should && ms < 60000; ms++)
        usleep(1000);
    told(of, *count, should);
}

// ---- steps

// What was there is there; what was not is asked of the program.
static void missing(void) {
    struct server s = {.fd = open_uffd(0), .seed = 2};
    char *p = area(PAGES);
    fill(p, 0, PAGES / 2, 1);
    wait_until_captured(p);
    leave();
    s.area = p;
    serve_start(&s);
    add(s.fd, p, PAGES, MISSING);
    look(p, 0, PAGES / 2, 1, "there before");
    told("missing pages", s.missing, 0);
    leave();
    look(p, PAGES / 2, PAGES / 2, 2, "missing");
    told("missing pages", s.missing, PAGES / 2);
    leave();
    look(p, 0, PAGES / 2, 1, "there before, once more");
    fill(p, 0, PAGES, 3);
    leave();
    look(p, 0, PAGES, 3, "written since");
    told("missing pages", s.missing, PAGES / 2);
    serve_stop(&s);
    munmap(p, PAGES * PAGE);
}

// Touched in order, so that what comes next could be expected, before there is any userfaultfd; then one page is left
// out, and one is only looked at.
static void not_touched(void) {
    for (int write = 0; write < 2; write++) {
        char *p = area(PAGES);
        struct server s = {.area = p, .seed = 2};
        leave();
        if (write)
            fill(p, 0, 70, 1);
        else
            look(p, 0, 70, 0, "new");
        s.fd = open_uffd(0);
        serve_start(&s);
        add(s.fd, p, PAGES, MISSING);
        if (write)
            look(p, 0, 70, 1, "touched");
        look(p, 70, PAGES - 70, 2, "not touched");
        told("missing pages", s.missing, PAGES - 70);
        serve_stop(&s);
        munmap(p, PAGES * PAGE);
    }
}

// Zeros that the program has written are there, though there was nothing to keep of them while they were away.
static void zeros(void) {
    struct server s = {.fd = open_uffd(0), .seed = 2};
    char *p = area(PAGES);
    s.area = p;
    memset(p, 0, PAGES / 2 * PAGE);
    leave();
    leave();
    serve_start(&s);
    add(s.fd, p, PAGES, MISSING);
    look(p, 0, PAGES / 2, 0, "zeros");
    told("missing pages", s.missing, 0);
    look(p, PAGES / 2, PAGES / 2, 2, "missing");
    serve_stop(&s);
    munmap(p, PAGES * PAGE);
}

static void write_protected(void) {
    struct server s = {.fd = open_uffd(UFFD_FEATURE_PAGEFAULT_FLAG_WP)};
    char *p = area(PAGES);
    fill(p, 0, PAGES, 1);
    leave();
    look(p, 0, PAGES / 2, 1, "before");  // some come back by being read, and are clean
    add(s.fd, p, PAGES, PROTECTED);
    protect(s.fd, p, PAGES, true);
    serve_start(&s);
    look(p, 0, PAGES, 1, "protected");
    leave();
    fill(p, PAGES / 4, PAGES / 2, 2);
    told("writes", s.written, PAGES / 2);
    look(p, 0, PAGES / 4, 1, "protected still");
    look(p, PAGES / 4, PAGES / 2, 2, "written");
    serve_stop(&s);
    fill(p, 0, PAGES / 4, 3);
    leave();
    look(p, 0, PAGES / 4, 3, "protected no more");
    look(p, PAGES / 4, PAGES / 2, 2, "written, once more");
    munmap(p, PAGES * PAGE);
}

static void events(void) {
    uint64_t features = UFFD_FEATURE_EVENT_REMOVE | UFFD_FEATURE_EVENT_REMAP | UFFD_FEATURE_EVENT_UNMAP;
    struct server s = {.fd = open_uffd(features), .seed = 2};
    char *p = area(PAGES), *to = area(PAGES);
    s.area = p;
    fill(p, 0, PAGES, 1);
    fill(to, 0, PAGES, 4);
    leave();
    add(s.fd, p, PAGES, MISSING);
    serve_start(&s);
    MUST(!madvise(p, PAGES / 2 * PAGE, MADV_DONTNEED));
    told_soon("removals", &s.removed, 1);
    look(p, 0, PAGES / 2, 2, "given up");
    look(p, PAGES / 2, PAGES / 2, 1, "kept");
    s.area = to;  // what is missing there from now on
    MUST(mremap(p, PAGES * PAGE, PAGES * PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, to) == to);
    told_soon("moves", &s.moved, 1);
    leave();
    look(to, 0, PAGES / 2, 2, "given up, moved");
    look(to, PAGES / 2, PAGES / 2, 1, "kept, moved");
    MUST(!munmap(to, PAGES / 2 * PAGE));
    told_soon("unmaps", &s.unmapped, 2);  // the first was of where it had been
    told("missing pages", s.missing, PAGES / 2);
    serve_stop(&s);
    munmap(to + PAGES / 2 * PAGE, PAGES / 2 * PAGE);
}

// A child's memory is its parent's userfaultfd's business only where the program wants it so.
static void forked(void) {
    for (int told_of = 0; told_of < 2; told_of++) {
        struct server s = {.fd = open_uffd(told_of ? UFFD_FEATURE_EVENT_FORK : 0), .seed = 2};
        char *p = area(PAGES);
        s.area = p;
        fill(p, 0, PAGES / 2, 1);
        leave();
        add(s.fd, p, PAGES, MISSING);
        serve_start(&s);
        int through[2];
        MUST(!pipe(through));
        pid_t pid = fork();
        if (pid == 0) {
            char go;
            MUST(read(through[0], &go, 1) == 1);
            look(p, 0, PAGES / 2, 1, "child, there before");
            look(p, PAGES / 2, PAGES / 2, told_of ? 3 : 0, "child, missing");
            fill(p, 0, PAGES / 4, 5);
            leave();
            look(p, 0, PAGES / 4, 5, "child, written");
            look(p, PAGES / 4, PAGES / 4, 1, "child, once more");
            _exit(0);
        }
        MUST(pid > 0);
        struct server c = {.area = p, .seed = 3};
        if (told_of) {
            while (!s.child)
                usleep(1000);
            c.fd = s.child;
            serve_start(&c);
        }
        MUST(write(through[1], "g", 1) == 1);
        leave();
        look(p, 0, PAGES / 2, 1, "there before");
        look(p, PAGES / 2, PAGES / 2, 2, "missing");
        told("missing pages", s.missing, PAGES / 2);
        ended_well(pid, "child");
        if (told_of) {
            told("missing pages of the child", c.missing, PAGES / 2);
            serve_stop(&c);
        }
        serve_stop(&s);
        close(through[0]);
        close(through[1]);
        munmap(p, PAGES * PAGE);
    }
}

// Given up by the program's userfaultfd, taken again, by it or another; one is refused what another has.
static void taken_in_turns(void) {
    char *p = area(PAGES);
    int one = open_uffd(0), other = open_uffd(0);
    fill(p, 0, PAGES, 1);
    leave();
    take_out(one, p, PAGES);  // which it never had
    leave();
    for (uint64_t seed = 1; seed < 5; seed++) {
        add(one, p, PAGES / 2, MISSING);
        if (!try_to_add(other, p, PAGES, MISSING) || errno != EBUSY)
            WRONG("two userfaultfds have one page");
        add(other, p + PAGES / 2 * PAGE, PAGES / 2, MISSING);
        look(p, 0, PAGES, seed, "theirs");
        take_out(one, p, PAGES / 2);
        take_out(other, p + PAGES / 2 * PAGE, PAGES / 2);
        wait_until_captured(p);
        wait_until_captured(p + (PAGES - 1) * PAGE);
        leave();
        look(p, 0, PAGES, seed, "nobody's");
        fill(p, 0, PAGES, seed + 1);
        leave();
        look(p, 0, PAGES, seed + 1, "nobody's, written");
    }
    add(one, p, PAGES, MISSING);
    close(one);
    wait_until_captured(p);
    leave();
    look(p, 0, PAGES, 5, "closed");
    close(other);
    munmap(p, PAGES * PAGE);
}

// Pages that another thread writes to all the while; each has its own count.
static atomic_bool writing;
static char *written_to;
static uint64_t rounds;

static void *keep_writing(void *unused) {
    for (rounds = 0; writing; rounds++)
        for (uint64_t i = 0; i < PAGES; i++)
            ((volatile uint64_t *)written_to)[i * 512]++;
    return unused;
}

static void written_meanwhile(void) {
    pthread_t writer;
    written_to = area(PAGES);
    struct server s = {.fd = open_uffd(UFFD_FEATURE_PAGEFAULT_FLAG_WP), .area = written_to, .seed = 2};
    writing = true;
    serve_start(&s);
    fill(written_to, 0, PAGES, 7);
    for (uint64_t i = 0; i < PAGES; i++)
        ((volatile uint64_t *)written_to)[i * 512] = 0;
    MUST(!pthread_create(&writer, NULL, keep_writing, NULL));
    for (int i = 0; i < 20; i++) {
        push_out();
        add(s.fd, written_to, PAGES, i % 2 ? MISSING : MISSING | PROTECTED);
        if (i % 2 == 0)
            protect(s.fd, written_to, PAGES, true);
        usleep(1000);
        take_out(s.fd, written_to, PAGES);
        usleep(i % 3 * 3000);
    }
    writing = false;
    pthread_join(writer, NULL);
    serve_stop(&s);
    told("missing pages", s.missing, 0);
    if (atomic_exchange(&spoil, false))
        ((volatile uint64_t *)written_to)[0]++;
    for (uint64_t i = 0; i < PAGES; i++)
        if (((volatile uint64_t *)written_to)[i * 512] != rounds)
            WRONG("page %lu was written %lu times, not %lu", (unsigned long)i,
                  (unsigned long)((volatile uint64_t *)written_to)[i * 512], (unsigned long)rounds);
    munmap(written_to, PAGES * PAGE);
}

// By the program's userfaultfd from memory that it does not have.
static void moved(void) {
    struct server s = {.fd = open_uffd(0), .seed = 2};
    char *p = area(PAGES), *to = area(PAGES);
    s.area = to;
    add(s.fd, to, PAGES, MISSING);
    fill(p, 0, PAGES / 2, 1);
    leave();
    serve_start(&s);
    for (int half = 0; half < 2; half++) {
        uint64_t at = (uint64_t)half * PAGES / 4 * PAGE;
        struct uffdio_move m = {.dst = place(to) + at, .src = place(p) + at, .len = PAGES / 4 * PAGE};
        if (half) {
            m.mode = UFFDIO_MOVE_MODE_ALLOW_SRC_HOLES;
            m.len = PAGES * PAGE - at;
        }
        if (ioctl(s.fd, UFFDIO_MOVE, &m)) {
            MUST(errno == EINVAL || errno == ENOTTY);  // not before Linux 6.8
            look(p, 0, PAGES / 2, 1, "not moved");
            serve_stop(&s);
            return;
        }
    }
    leave();
    look(to, 0, PAGES / 2, 1, "moved");
    look(to, PAGES / 2, PAGES / 2, 2, "missing");
    told("missing pages", s.missing, PAGES / 2);
    look(p, 0, PAGES, 0, "where it was");
    fill(p, 0, PAGES, 3);
    leave();
    look(p, 0, PAGES, 3, "where it was, written");
    serve_stop(&s);
    munmap(p, PAGES * PAGE);
    munmap(to, PAGES * PAGE);
}

// Nothing can be put where no userfaultfd of the program has the memory, or has it no more.
static uint64_t put_to(int fd, const char *p) {
    static uint64_t page[512] = {1};
    struct uffdio_copy copy = {.dst = place(p), .src = place(page), .len = PAGE};
    struct uffdio_zeropage zero = {.range = {place(p), PAGE}};
    struct uffdio_writeprotect protect = {{place(p), PAGE}, UFFDIO_WRITEPROTECT_MODE_WP};
    struct {
        unsigned long request;
        void *argument;
    } way[] = {{UFFDIO_WRITEPROTECT, &protect}, {UFFDIO_ZEROPAGE, &zero}, {UFFDIO_COPY, &copy}};
    uint64_t done = 0;
    for (int i = 0; i < COUNT(way); i++)
        if (!ioctl(fd, way[i].request, way[i].argument))
            done++;
        else
            MUST(errno == ENOENT || errno == EEXIST);
    return done;
}

static void not_registered(void) {
    char *p = area(PAGES), *other = area(PAGES);
    int fd = open_uffd(0);
    fill(other, 0, PAGES / 2, 1);
    wait_until_captured(other);
    add(fd, p, PAGES, MISSING);
    for (uint64_t i = 0; i < 2; i++)
        told("pages put elsewhere", put_to(fd, other + (PAGES - 1) * PAGE), 0);
    told("pages put to its own", put_to(fd, p + 5 * PAGE), 1);
    take_out(fd, p, PAGES);
    wait_until_captured(p);
    told("pages put to what was its own", put_to(fd, p + (PAGES - 1) * PAGE), 0);
    leave();
    look(other, 0, PAGES / 2, 1, "there");
    look(other, PAGES / 2, PAGES / 2, 0, "not there");
    look(p, PAGES - 1, 1, 0, "not there any more");
    close(fd);
    munmap(p, PAGES * PAGE);
    munmap(other, PAGES * PAGE);
}

int main(int argc, char **argv) {
    static const struct step steps[] = {
        {"not_touched", not_touched},  // first: before any userfaultfd
        {"missing", missing},
        {"zeros", zeros},
        {"write_protected", write_protected},
        {"events", events},
        {"forked", forked},
        {"taken_in_turns", taken_in_turns},
        {"written_meanwhile", written_meanwhile},
        {"moved", moved},
        {"not_registered", not_registered},
    };
    churn_start();
    int status = run_steps(steps, COUNT(steps), argc, argv);
    churn_stop();
    return status;
}
