// Writes MiB of memory, gives advice of it, waits, and looks at every page again: advised ADVICE MiB MILLISECONDS.
// Advice, and what is read afterwards: none, willneed, pageout, posix, fork, wrong: all in order; strided, random:
// every 97th page, round and round; chunks, sequential: 64 pages in order here and there; warm, cold: an eighth more is
// written, and then all is read but the eighth that was advised.
#include <errno.h>
#include <fcntl.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#define PAGE 4096ul

static uint64_t *at(char *memory, size_t page) { return (uint64_t *)(memory + page * PAGE); }

static void advise(char *memory, size_t bytes, int advice) {
    if (madvise(memory, bytes, advice)) {
        perror("madvise");
        exit(1);
    }
}

static size_t present(const char *memory, size_t pages) {
    static uint64_t entry[16384];
    int fd = open("/proc/self/pagemap", O_RDONLY);
    ssize_t got = pread(fd, entry, pages * 8, (off_t)((uintptr_t)memory / PAGE * 8));
    close(fd);
    size_t n = 0;
    for (ssize_t i = 0; i < got / 8; i++)
        n += entry[i] >> 63;
    return n;
}

// Until so many pages are there, at least or at most; not for ever: what was read afterwards then tells.
static void await(const char *memory, size_t pages, size_t least, size_t most) {
    for (int i = 0; i < 1000; i++) {
        size_t n = present(memory, pages);
        if (n >= least && n <= most)
            return;
        usleep(10000);
    }
}

int main(int argc, char **argv) {
    const char *advice = argc > 2 ? argv[1] : "none";
    size_t bytes = strtoul(argc > 2 ? argv[2] : "16", NULL, 10) << 20, pages = bytes / PAGE;
    unsigned wait_us = argc > 3 ? (unsigned)atoi(argv[3]) * 1000 : 0;
    char *memory = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED)
        return 1;
    for (size_t i = 0; i < pages; i++)
        *at(memory, i) = i + 1;
    size_t part = bytes / 8;
    if (!strcmp(advice, "willneed"))
        advise(memory, part, MADV_WILLNEED);
    else if (!strcmp(advice, "sequential"))
        advise(memory, bytes, MADV_SEQUENTIAL);
    else if (!strcmp(advice, "random"))
        advise(memory, bytes, MADV_RANDOM);
    else if (!strcmp(advice, "cold"))
        advise(memory + bytes - part, part, MADV_COLD);
    else if (!strcmp(advice, "pageout"))
        advise(memory, bytes, MADV_PAGEOUT);
    else if (!strcmp(advice, "posix") &&
             (posix_madvise(memory, bytes, POSIX_MADV_DONTNEED) || posix_madvise(memory, part, POSIX_MADV_WILLNEED)))
        return 1;
    if (!strcmp(advice, "wrong")) {  // what the kernel refuses stays refused, with its errno
        errno = 0;
        if (madvise(memory + 1, PAGE, MADV_WILLNEED) != -1 || errno != EINVAL || madvise(memory, PAGE, 12345) != -1 ||
            errno != EINVAL || posix_madvise(memory + 1, PAGE, POSIX_MADV_WILLNEED) != EINVAL)
            return 1;
    }
    if (!strcmp(advice, "fork")) {
        advise(memory, bytes, MADV_RANDOM);
        pid_t child = fork();
        int status = 0;
        if (child == 0) {
            advise(memory, part, MADV_PAGEOUT);
            for (size_t i = 0; i < pages; i++)
                if (*at(memory, i) != i + 1)
                    _exit(1);
            _exit(0);
        }
        if (waitpid(child, &status, 0) != child || status)
            return 1;
    }
    usleep(wait_us);
    if (!strcmp(advice, "pageout"))
        await(memory, pages, 0, pages / 20);
    if (!strcmp(advice, "willneed") || !strcmp(advice, "posix"))
        await(memory, pages / 8, pages / 16, pages);
    bool strided = !strcmp(advice, "strided") || !strcmp(advice, "random");
    bool chunks = !strcmp(advice, "chunks") || !strcmp(advice, "sequential");
    size_t wrong = 0, read = pages;
    if (!strcmp(advice, "cold") || !strcmp(advice, "warm")) {
        char *more = mmap(NULL, part, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (more == MAP_FAILED)
            return 1;
        for (size_t i = 0; i < part / PAGE; i++)
            *at(more, i) = i;
        await(memory, pages, 0, pages - pages / 32);  // until that is captured, and room is made for it
        read -= part / PAGE;
    }
    for (size_t i = 0; i < read; i++) {  // pages and chunks are powers of two: each is read once
        size_t page = strided ? i * 97 % pages : chunks ? (i / 64 * 37 % (pages / 64)) * 64 + i % 64 : i;
        wrong += *at(memory, page) != page + 1;
    }
    printf("%zu pages, %zu wrong\n", read, wrong);
    return wrong != 0;
}
