// The kernel touching pages that are evicted all the while: read, write and their vectored kin on files, pipes and
// sockets, O_DIRECT, vmsplice, futexes, other processes' process_vm_readv. Arguments: steps; files go to TMPDIR.
#include "steps.h"

#include <linux/futex.h>
#include <poll.h>
#include <sys/ioctl.h>
#include <sys/sendfile.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/uio.h>

#define PAGES 256ul
#define BYTES (PAGES * PAGE)
static char *from, *to;

static int file(int flags) {
    char path[300];
    snprintf(path, sizeof path, "%s/kernel-XXXXXX", getenv("TMPDIR") ? getenv("TMPDIR") : "/var/tmp");
    int fd = mkostemp(path, flags);
    if (fd >= 0)
        unlink(path);
    return fd;
}

static void new_contents(uint64_t seed) {
    fill(from, 0, PAGES, seed);
    fill(to, 0, PAGES, seed + 1);
    push_out();
}

static void read_write(void) {
    int fd = file(0);
    MUST(fd >= 0);
    new_contents(1);
    MUST(write(fd, from, BYTES) == (ssize_t)BYTES);
    push_out();
    MUST(lseek(fd, 0, SEEK_SET) == 0 && read(fd, to, BYTES) == (ssize_t)BYTES);
    push_out();
    look(to, 0, PAGES, 1, "read");
    look(from, 0, PAGES, 1, "written from");
    // Into new memory that has never been touched.
    char *fresh = area(PAGES);
    MUST(pread(fd, fresh, BYTES, 0) == (ssize_t)BYTES);
    look(fresh, 0, PAGES, 1, "read into new memory");
    munmap(fresh, BYTES);
    close(fd);
}

static void vectors(void) {
    int fd = file(0);
    struct iovec out[PAGES / 4], in[PAGES / 4];
    MUST(fd >= 0);
    new_contents(3);
    // Pieces that cross pages and lie far apart, backwards.
    for (uint64_t i = 0; i < PAGES / 4; i++) {
        uint64_t at = (PAGES / 4 - 1 - i) * 4 * PAGE;
        out[i] = (struct iovec){from + at, 4 * PAGE};
        in[i] = (struct iovec){to + at, 4 * PAGE};
    }
    MUST(writev(fd, out, PAGES / 4) == (ssize_t)BYTES);
    push_out();
    MUST(preadv(fd, in, PAGES / 4, 0) == (ssize_t)BYTES);
    look(to, 0, PAGES, 3, "read in vectors");
    push_out();
    MUST(lseek(fd, 0, SEEK_SET) == 0);
    fill(to, 0, PAGES, 4);
    push_out();
    MUST(readv(fd, in, PAGES / 4) == (ssize_t)BYTES);
    look(to, 0, PAGES, 3, "readv");
    close(fd);
}

static void direct(void) {
    int fd = file(O_DIRECT);
    if (fd < 0 && errno == EINVAL)
        return;  // a file system without it, the same for both runs
    MUST(fd >= 0);
    for (uint64_t round = 0; round < 3; round++) {
        new_contents(5 + round);
        for (uint64_t at = 0; at < BYTES; at += 32 * PAGE)
            MUST(pwrite(fd, from + at, 32 * PAGE, (off_t)at) == 32 * (ssize_t)PAGE);
        push_out();
        for (uint64_t at = 0; at < BYTES; at += 64 * PAGE)
            MUST(pread(fd, to + at, 64 * PAGE, (off_t)at) == 64 * (ssize_t)PAGE);
        push_out();
        look(to, 0, PAGES, 5 + round, "read past the page cache");
    }
    close(fd);
}

static void *send_all(void *argument) {
    int fd = *(int *)argument;
    for (uint64_t at = 0; at < BYTES;) {
        ssize_t n = write(fd, from + at, BYTES - at > 100000 ? 100000 : BYTES - at);
        MUST(n > 0);
        at += (uint64_t)n;
    }
    return NULL;
}

static void receive_all(int fd) {
    for (uint64_t at = 0; at < BYTES;) {
        ssize_t n = recv(fd, to + at, BYTES - at > 70001 ? 70001 : BYTES - at, 0);
        MUST(n > 0);
        at += (uint64_t)n;
    }
}

static void sockets(void) {
    int s[2];
    pthread_t t;
    MUST(!socketpair(AF_UNIX, SOCK_STREAM, 0, s));
    new_contents(8);
    MUST(!pthread_create(&t, NULL, send_all, &s[0]));
    receive_all(s[1]);
    pthread_join(t, NULL);
    push_out();
    look(to, 0, PAGES, 8, "received");
    // Messages whose parts, descriptors' room included, lie in memory that is away.
    for (uint64_t i = 0; i + 3 < PAGES; i += 4) {
        struct iovec *v = (struct iovec *)(from + i * PAGE);
        v[0] = (struct iovec){from + (i + 1) * PAGE + 4000, 200};
        struct msghdr *m = (struct msghdr *)(from + i * PAGE + 512);
        *m = (struct msghdr){.msg_iov = v, .msg_iovlen = 1};
        if (i % 64 == 0)
            push_out();
        MUST(sendmsg(s[0], m, 0) == 200);
        MUST(recv(s[1], to + (i + 1) * PAGE + 4000, 200, MSG_WAITALL) == 200);
        if (memcmp(to + (i + 1) * PAGE + 4000, from + (i + 1) * PAGE + 4000, 200))
            WRONG("message %lu is another", (unsigned long)i);
    }
    close(s[0]);
    close(s[1]);
}

#define PIPES 4
#define PIPE_PAGES 4ul

static void from_pipe(int fd, uint64_t *into, uint64_t bytes) {
    for (uint64_t got = 0; got < bytes;) {
        ssize_t n = read(fd, (char *)into + got, bytes - got);
        MUST(n > 0);
        got += (uint64_t)n;
    }
}

// Written to after they were given to a pipe, and before they are read there: what comes out is what was written last.
// The same pages again and again, and others in between.
static void written_in_a_pipe(void) {
    static uint64_t out[PIPE_PAGES * 512];
    char *mine = area(PIPES * PIPE_PAGES), *other = area(1024);
    int p[PIPES][2], q[2];
    MUST(!pipe(q));
    for (int i = 0; i < PIPES; i++)
        MUST(!pipe(p[i]));
    for (uint64_t seed = 1; seed < 7; seed += 2) {
        fill(mine, 0, PIPES * PIPE_PAGES, seed);
        push_out();
        for (uint64_t i = 0; i < PIPES; i++) {
            struct iovec v[2] = {{mine + i * PIPE_PAGES * PAGE, PAGE + 8}, {NULL, PIPE_PAGES * PAGE - PAGE - 8}};
            v[1].iov_base = (char *)v[0].iov_base + v[0].iov_len;
            MUST(vmsplice(p[i][1], v, 2, 0) == (ssize_t)(PIPE_PAGES * PAGE));
        }
        for (uint64_t i = 0; i < 30; i++) {
            struct iovec v = {other + (seed * 30 + i) % 1024 * PAGE, PAGE};
            MUST(vmsplice(q[1], &v, 1, 0) == (ssize_t)PAGE);
            from_pipe(q[0], out, PAGE);
        }
        leave();
        fill(mine, 0, PIPES * PIPE_PAGES, seed + 1);
        leave();
        for (uint64_t i = 0; i < PIPES; i++) {
            from_pipe(p[i][0], out, PIPE_PAGES * PAGE);
            for (uint64_t k = 0; k < PIPE_PAGES * 512; k++)
                if (out[k] != word_at(seed + 1, i * PIPE_PAGES * 512 + k))
                    WRONG("word %lu out of pipe %lu is not what was written last", (unsigned long)k, (unsigned long)i);
        }
        look(mine, 0, PIPES * PIPE_PAGES, seed + 1, "given to the pipes");
    }
    for (int i = 0; i < PIPES; i++) {
        close(p[i][0]);
        close(p[i][1]);
    }
    close(q[0]);
    close(q[1]);
    munmap(mine, PIPES * PIPE_PAGES * PAGE);
    munmap(other, 1024 * PAGE);
}

// Pages given to a pipe by reference: what comes out is what was in them.
static void vmsplice_pipe(void) {
    int p[2];
    MUST(!pipe(p));
    for (uint64_t round = 0; round < 2; round++) {
        new_contents(10 + round);
        for (uint64_t at = 0; at < BYTES; at += 8 * PAGE) {
            struct iovec v = {from + at, 8 * PAGE};
            MUST(vmsplice(p[1], &v, 1, 0) == 8 * (ssize_t)PAGE);
            if (at % (64 * PAGE) == 0)
                push_out();
            for (uint64_t got = 0; got < 8 * PAGE;) {
                ssize_t n = read(p[0], to + at + got, 8 * PAGE - got);
                MUST(n > 0);
                got += (uint64_t)n;
            }
        }
        push_out();
        look(to, 0, PAGES, 10 + round, "out of the pipe");
        look(from, 0, PAGES, 10 + round, "given to the pipe");
    }
    close(p[0]);
    close(p[1]);
}

// ---- futexes in memory that leaves while somebody sleeps on them -----------------------------------------------

#define ROUNDS 12
static long futex(void *word, int op, uint32_t value) { return syscall(SYS_futex, word, op, value, NULL, NULL, 0); }

static void *pong(void *argument) {
    _Atomic uint32_t *word = argument;
    for (uint32_t round = 0; round < ROUNDS; round++) {
        while (*word != 2 * round + 1)
            MUST(!futex(word, FUTEX_WAIT, 2 * round) || errno == EAGAIN || errno == EINTR);
        push_out();
        *word = 2 * round + 2;
        futex(word, FUTEX_WAKE, 1);
    }
    return NULL;
}

static void futexes(void) {
    pthread_t t;
    new_contents(12);
    _Atomic uint32_t *word = (_Atomic uint32_t *)(to + 77 * PAGE + 128);
    *word = 0;
    MUST(!pthread_create(&t, NULL, pong, (void *)(uintptr_t)word));
    for (uint32_t round = 0; round < ROUNDS; round++) {
        push_out();
        *word = 2 * round + 1;
        futex((void *)(uintptr_t)word, FUTEX_WAKE, 1);
        while (*word != 2 * round + 2)
            MUST(!futex((void *)(uintptr_t)word, FUTEX_WAIT, 2 * round + 1) || errno == EAGAIN || errno == EINTR);
    }
    pthread_join(t, NULL);
    look(from, 0, PAGES, 12, "beside them");
}

// Mutexes and conditions, many, one a page.
struct place {
    pthread_mutex_t mutex;
    pthread_cond_t changed;
    uint64_t turn;
};

static void *take_turns(void *argument) {
    uint64_t me = (uint64_t)(uintptr_t)argument;
    for (uint64_t i = 0; i < PAGES; i += 4) {
        struct place *p = (struct place *)(to + i * PAGE);
        pthread_mutex_lock(&p->mutex);
        while (p->turn % 2 != me)
            pthread_cond_wait(&p->changed, &p->mutex);
        p->turn++;
        pthread_cond_broadcast(&p->changed);
        pthread_mutex_unlock(&p->mutex);
    }
    return NULL;
}

static void conditions(void) {
    pthread_t t[2];
    new_contents(14);
    for (uint64_t i = 0; i < PAGES; i += 4) {
        struct place *p = (struct place *)(to + i * PAGE);
        *p = (struct place){.mutex = PTHREAD_MUTEX_INITIALIZER, .changed = PTHREAD_COND_INITIALIZER};
    }
    push_out();
    for (uint64_t i = 0; i < 2; i++)
        MUST(!pthread_create(&t[i], NULL, take_turns, (void *)(uintptr_t)i));
    for (int i = 0; i < 2; i++)
        pthread_join(t[i], NULL);
    for (uint64_t i = 0; i < PAGES; i += 4)
        if (((struct place *)(to + i * PAGE))->turn != 2)
            WRONG("page %lu: turn %lu", (unsigned long)i, (unsigned long)((struct place *)(to + i * PAGE))->turn);
    look(from, 0, PAGES, 14, "beside them");
}

// ---- from another process ----------------------------------------------------------------------------------------

static void other_process(void) {
    pid_t parent = getpid();
    int go[2], back[2];
    char c = 0;
    MUST(!pipe(go) && !pipe(back));
    new_contents(16);
    pid_t child = fork();
    if (child == 0) {
        fill(to, 0, PAGES, 0x77);
        struct iovec mine = {to, BYTES}, theirs = {from, BYTES};
        if (read(go[0], &c, 1) != 1)
            _exit(3);
        // The parent's contents of now, not of the fork.
        MUST(process_vm_readv(parent, &mine, 1, &theirs, 1, 0) == (ssize_t)BYTES);
        push_out();
        look(to, 0, PAGES, 18, "read from the parent");
        fill(to, 0, PAGES, 19);
        push_out();
        MUST(process_vm_writev(parent, &mine, 1, &theirs, 1, 0) == (ssize_t)BYTES);
        if (write(back[1], "b", 1) != 1)
            _exit(3);
        _exit(0);
    }
    fill(from, 0, PAGES, 18);
    push_out();
    MUST(child > 0 && !close(back[1]) && write(go[1], "g", 1) == 1);
    if (read(back[0], &c, 1) != 1)
        WRONG("the child has ended");
    push_out();
    look(from, 0, PAGES, 19, "written by the child");
    int status = -1;
    MUST(waitpid(child, &status, 0) == child);
    if (status)
        WRONG("child: status %#x", status);
}

// Small results that the kernel writes into pages that are away: one call a page.
static void small_results(void) {
    int p[2];
    MUST(!pipe(p));
    new_contents(20);
    for (uint64_t i = 0; i < PAGES; i++) {
        char *here = to + i * PAGE;
        struct stat *st = (struct stat *)here;
        struct timespec *now = (struct timespec *)(here + 1024);
        int *waiting = (int *)(here + 2048);
        struct pollfd *one = (struct pollfd *)(here + 3072);
        MUST(!fstat(p[0], st) && S_ISFIFO(st->st_mode));
        MUST(!syscall(SYS_clock_gettime, CLOCK_REALTIME, now) && now->tv_sec > 0);
        MUST(write(p[1], here, 3) == 3 && !ioctl(p[0], FIONREAD, waiting) && *waiting == 3);
        *one = (struct pollfd){p[0], POLLIN, 0};
        MUST(poll(one, 1, 0) == 1 && one->revents == POLLIN);
        MUST(getcwd(here, 512) && here[0] == '/');
        MUST(read(p[0], here + 4000, 96) == 3);
    }
    push_out();
    look(from, 0, PAGES, 20, "beside them");
    close(p[0]);
    close(p[1]);
}

int main(int argc, char **argv) {
    static const struct step steps[] = {
        {"read_write", read_write},
        {"vectors", vectors},
        {"direct", direct},
        {"sockets", sockets},
        {"vmsplice_pipe", vmsplice_pipe},
        {"written_in_a_pipe", written_in_a_pipe},
        {"futexes", futexes},
        {"conditions", conditions},
        {"other_process", other_process},
        {"small_results", small_results},
    };
    from = area(PAGES);
    to = area(PAGES);
    churn_start();
    int status = run_steps(steps, COUNT(steps), argc, argv);
    churn_stop();
    return status;
}
