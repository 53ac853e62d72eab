// How much memory can be had under a limit: `limited WAY [as|data MEBIBYTES]`, the way malloc, mmap or brk, and a limit
// that it sets itself. Each piece is written to, and looked at in the end. Prints the MiB had.
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <unistd.h>

#include "captured.h"

#define MOST (256ul << 20)  // where nothing limits it


static void *piece(const char *way, size_t bytes) {
    void *p = NULL;
    if (!strcmp(way, "malloc"))
        return malloc(bytes);
    p = !strcmp(way, "brk") ? sbrk((long)bytes)
                            : mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    return p == (void *)-1 ? NULL : p;
}

int main(int argc, char **argv) {
    if (argc < 2)
        return 2;
    const char *way = argv[1];
    size_t bytes = strcmp(way, "malloc") ? 65536 : 5000, n = 0;
    void *first = malloc(1000);
    if (argc > 3) {
        struct rlimit limit = {strtoul(argv[3], NULL, 10) << 20, RLIM_INFINITY};
        int kind = !strcmp(argv[2], "as") ? RLIMIT_AS : RLIMIT_DATA;
        struct rlimit before;
        if (getrlimit(kind, &before))
            return 2;
        limit.rlim_max = before.rlim_max;
        if (setrlimit(kind, &limit))
            return 2;
    }
    void **last = NULL, **p;
    for (; (p = piece(way, bytes)) && n * bytes < MOST; n++) {
        memset(p, (int)(n % 251), bytes);
        p[0] = last;
        p[1] = (void *)n;
        last = p;
        if (n * bytes >> 20 == 8 && (n - 1) * bytes >> 20 == 7)
            wait_until_captured(first);
    }
    for (size_t i = n; i-- > 0; last = last[0])
        if (last[1] != (void *)i || ((unsigned char *)last)[bytes - 1] != i % 251)
            return 1;
    char text[32];
    int length = snprintf(text, sizeof text, "%zu\n", n * bytes >> 20);
    return write(1, text, (size_t)length) != length;
}
