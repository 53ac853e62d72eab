// Memory reached past the page tables of whoever looks at it: by /proc/PID/mem and ptrace(2), the program's own and that of
// others, where the kernel waits for no page.
#include "steps.h"

#include <sys/ptrace.h>
#include <sys/uio.h>

#include "captured.h"

#define PAGES 128ul
#define BYTES (PAGES * PAGE)

static char *seen;  // what was read

static off_t offset(const void *p) { return (off_t)(uintptr_t)p; }

static int open_memory(const char *whose) {
    char path[64];
    snprintf(path, sizeof path, "/proc/%s/mem", whose);
    int fd = open(path, O_RDWR);
    MUST(fd >= 0);
    return fd;
}

static int open_memory_of(pid_t pid) {
    char number[16];
    snprintf(number, sizeof number, "%d", (int)pid);
    return open_memory(number);
}

// Of a new area half is filled, and has left.
static char *half_filled(uint64_t seed) {
    char *p = area(PAGES);
    fill(p, 0, PAGES / 2, seed);
    wait_until_captured(p);
    leave();
    return p;
}

static void look_at_half(uint64_t seed, const char *where) {
    look(seen, 0, PAGES / 2, seed, where);
    look(seen, PAGES / 2, PAGES / 2, 0, where);
    memset(seen, 0xee, BYTES);
}

static void own_read(void) {
    char *p = half_filled(1);
    int fd = open_memory("self");
    MUST(pread(fd, seen, BYTES, offset(p)) == (ssize_t)BYTES);
    look_at_half(1, "pread");
    leave();
    MUST(lseek(fd, offset(p), SEEK_SET) == offset(p) && read(fd, seen, BYTES) == (ssize_t)BYTES);
    MUST(lseek(fd, 0, SEEK_CUR) == offset(p) + (off_t)BYTES);
    look_at_half(1, "read");
    leave();
    struct iovec pieces[] = {{seen, 100}, {seen + 100, 5 * PAGE}, {NULL, 0}, {seen + 100 + 5 * PAGE, BYTES}};
    pieces[3].iov_len = BYTES - 100 - 5 * PAGE;
    MUST(preadv(fd, pieces, 4, offset(p)) == (ssize_t)BYTES);
    look_at_half(1, "preadv");
    leave();
    MUST(lseek(fd, offset(p), SEEK_SET) == offset(p) && readv(fd, pieces, 4) == (ssize_t)BYTES);
    look_at_half(1, "readv");
    close(fd);
    MUST(!mprotect(p, BYTES, PROT_NONE));
    fd = open_memory("thread-self");
    leave();
    MUST(pread(fd, seen, BYTES, offset(p)) == (ssize_t)BYTES);
    look_at_half(1, "of memory that nobody may read");
    MUST(!munmap(p + BYTES / 2, BYTES / 2));
    MUST(pread(fd, seen, BYTES, offset(p)) == (ssize_t)BYTES / 2);
    MUST(pread(fd, seen, BYTES, offset(p) + (off_t)BYTES / 2) == -1 && errno == EIO);
    close(fd);
    munmap(p, BYTES / 2);
}

static void own_written(void) {
    char *p = half_filled(1);
    int fd = open_memory("self");
    fill(seen, 0, PAGES, 2);
    MUST(pwrite(fd, seen, BYTES, offset(p)) == (ssize_t)BYTES);
    leave();
    look(p, 0, PAGES, 2, "pwrite");
    leave();
    look(p, 0, PAGES, 2, "pwrite, brought by being read");  // and clean from now on
    fill(seen, 0, PAGES, 3);
    MUST(lseek(fd, offset(p), SEEK_SET) == offset(p) && write(fd, seen, BYTES) == (ssize_t)BYTES);
    leave();
    look(p, 0, PAGES, 3, "write");
    MUST(!mprotect(p, BYTES, PROT_READ));
    for (uint64_t i = 0; i < PAGES; i += 8)
        MUST(pwrite(fd, &i, sizeof i, offset(p) + (off_t)(i * PAGE)) == sizeof i);
    leave();
    for (uint64_t i = 0; i < PAGES; i++)
        if (*(volatile uint64_t *)(p + i * PAGE) != (i % 8 ? word_at(3, i * 512) : i))
            WRONG("page %lu of memory that may only be read", (unsigned long)i);
    close(fd);
    munmap(p, BYTES);
}

// What another thread does with other words of the same pages meanwhile is not lost, nor what is written here.
static atomic_bool counting;
static char *counted;
static uint64_t rounds;

static void *count(void *unused) {
    for (rounds = 0; counting; rounds++)
        for (uint64_t i = 0; i < PAGES; i++)
            ((volatile uint64_t *)(counted + i * PAGE))[1]++;
    return unused;
}

static void written_from_two_sides(void) {
    pthread_t counter;
    counted = area(PAGES);
    memset(counted, 0, BYTES);
    wait_until_captured(counted);
    int fd = open_memory("self");
    counting = true;
    MUST(!pthread_create(&counter, NULL, count, NULL));
    for (uint64_t n = 1; n <= 20; n++) {
        push_out();
        for (uint64_t i = 0; i < PAGES; i++)
            MUST(pwrite(fd, &n, sizeof n, offset(counted) + (off_t)(i * PAGE)) == sizeof n);
    }
    counting = false;
    pthread_join(counter, NULL);
    leave();
    if (atomic_exchange(&spoil, false))
        ((volatile uint64_t *)counted)[0]++;
    for (uint64_t i = 0; i < PAGES; i++) {
        volatile uint64_t *words = (volatile uint64_t *)(counted + i * PAGE);
        if (words[0] != 20 || words[1] != rounds)
            WRONG("page %lu: %lu and %lu, not 20 and %lu", (unsigned long)i, (unsigned long)words[0],
                  (unsigned long)words[1], (unsigned long)rounds);
    }
    close(fd);
    munmap(counted, BYTES);
}

// A child has its parent's memory by a descriptor from before the fork, and its own by one that it opens.
static void of_the_other(void) {
    char *p = half_filled(1);
    int fd = open_memory("self"), ready[2], end[2];
    MUST(!pipe(ready) && !pipe(end));
    pid_t pid = fork();
    if (pid == 0) {
        char c;
        fill(p, 0, PAGES / 2, 2);
        leave();
        MUST(pread(fd, seen, BYTES, offset(p)) == (ssize_t)BYTES);
        look_at_half(1, "the parent's");
        int own = open_memory_of(getpid());
        MUST(pread(own, seen, BYTES, offset(p)) == (ssize_t)BYTES);
        look_at_half(2, "the child's");
        leave();
        MUST(write(ready[1], "r", 1) == 1 && read(end[0], &c, 1) == 1);
        look(p, 0, PAGES, 3, "what the parent has written");
        _exit(0);
    }
    char c;
    close(ready[1]);
    if (read(ready[0], &c, 1) == 1) {
        int theirs = open_memory_of(pid);
        MUST(pread(theirs, seen, BYTES, offset(p)) == (ssize_t)BYTES);
        look_at_half(2, "the child's, by its parent");
        fill(seen, 0, PAGES, 3);
        MUST(pwrite(theirs, seen, BYTES, offset(p)) == (ssize_t)BYTES);
        MUST(write(end[1], "e", 1) == 1);
        close(theirs);
    }
    ended_well(pid, "child");
    look(p, 0, PAGES / 2, 1, "the parent's, at the end");
    for (int i = 0; i < 2; i++)
        close(end[i]);
    close(ready[0]);
    close(fd);
    munmap(p, BYTES);
}

// Another program finds it among its descriptors. Its own end, behind which there is nothing, is one.
static const char *self;

static void by_another_program(void) {
    char *p = half_filled(1), place[32], file[16];
    int fd = open_memory("self");
    if (atomic_exchange(&spoil, false))
        p[0] ^= 1;
    snprintf(place, sizeof place, "%lx", (unsigned long)(uintptr_t)p);
    snprintf(file, sizeof file, "%d", fd);
    pid_t pid = fork();
    if (pid == 0) {
        execl(self, self, "as another", file, place, NULL);
        _exit(3);
    }
    ended_well(pid, "the other");
    close(fd);
    munmap(p, BYTES);
}

static int as_another(int fd, uint64_t place) {
    step_name = "by_another_program";
    MUST(lseek(fd, (off_t)place, SEEK_SET) == (off_t)place && read(fd, seen, BYTES) == (ssize_t)BYTES);
    look_at_half(1, "read by another program");
    return 0;
}

static void traced(void) {
    char *p = half_filled(1);
    pid_t pid = fork();
    if (pid == 0) {
        fill(p, 0, PAGES / 2, 2);
        leave();
        MUST(!ptrace(PTRACE_TRACEME, 0, 0, 0));
        raise(SIGSTOP);
        for (uint64_t i = 0; i < PAGES; i++)
            if (*(volatile uint64_t *)(p + i * PAGE) != i + 5)
                WRONG("page %lu is not what was poked", (unsigned long)i);
        _exit(0);
    }
    int status = 0;
    MUST(waitpid(pid, &status, 0) == pid && WIFSTOPPED(status));
    leave();
    bool spoilt = atomic_exchange(&spoil, false);
    for (uint64_t i = 0; i < PAGES; i++) {
        errno = 0;
        uint64_t word = (uint64_t)ptrace(PTRACE_PEEKDATA, pid, p + i * PAGE, 0);
        MUST(!errno);
        if (word != (i < PAGES / 2 ? word_at(2, i * 512) : 0) + (spoilt && !i))
            WRONG("page %lu: peeked %lx", (unsigned long)i, (unsigned long)word);
    }
    leave();
    for (uint64_t i = 0; i < PAGES; i++)
        MUST(!ptrace(PTRACE_POKEDATA, pid, p + i * PAGE, i + 5));
    errno = 0;
    MUST(ptrace(PTRACE_PEEKDATA, pid, 0x1000, 0) == -1 && errno == EIO);
    MUST(!ptrace(PTRACE_DETACH, pid, 0, 0));
    ended_well(pid, "child");
    munmap(p, BYTES);
}

int main(int argc, char **argv) {
    static const struct step steps[] = {
        {"own_read", own_read},
        {"own_written", own_written},
        {"written_from_two_sides", written_from_two_sides},
        {"of_the_other", of_the_other},
        {"by_another_program", by_another_program},
        {"traced", traced},
    };
    seen = area(PAGES);
    self = argv[0];
    if (argc == 4 && !strcmp(argv[1], "as another"))
        return as_another(atoi(argv[2]), strtoull(argv[3], NULL, 16));
    churn_start();
    int status = run_steps(steps, COUNT(steps), argc, argv);
    churn_stop();
    return status;
}
