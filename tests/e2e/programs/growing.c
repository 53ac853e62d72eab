// Memory that grows in steps: blocks of 128 KiB or more side by side, by mmap(2) or brk(2), each filled at once. Plain,
// the kernel merges them into few mappings. Prints how many mappings the process has then, how many KiB of anonymous
// memory, and how many of those are in mappings of a userfaultfd. Then blocks are resized, moved, given up and made
// again, each as the one mapping the program made, and each page must be what was written to it. Arguments: mmap or
// brk, number of blocks, blocks between pauses of 1 ms, KiB of a block.
#define _GNU_SOURCE
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define PAGE 4096u

static unsigned block_pages;

struct block {
    char *at;
    unsigned pages, turn;
};

static void fill(struct block *b, unsigned from, uint64_t number) {
    for (unsigned i = from; i < b->pages; i++)
        *(uint64_t *)(b->at + i * PAGE + i % 512 * 8) = (number << 32 | b->turn) * 1024 + i;
}

static void check(const struct block *b, uint64_t number) {
    for (unsigned i = 0; i < b->pages; i++)
        if (*(uint64_t *)(b->at + i * PAGE + i % 512 * 8) != (number << 32 | b->turn) * 1024 + i) {
            printf("block %u, page %u is not what was written\n", (unsigned)number, i);
            exit(1);
        }
}

static char *must(void *p, const char *call) {
    if (p == MAP_FAILED) {
        perror(call);
        exit(1);
    }
    return p;
}

static char *make(unsigned pages) {
    return must(mmap(0, pages * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0), "mmap");
}

static void count(void) {
    static char line[4096];
    unsigned long mappings = 0, here = 0, anonymous = 0, registered = 0;
    FILE *f = fopen("/proc/self/smaps", "r");
    while (f && fgets(line, sizeof line, f)) {
        if (sscanf(line, "Anonymous: %lu", &here) == 1) {
            mappings++;
            anonymous += here;
        } else if (!strncmp(line, "VmFlags:", 8) && strstr(line, " um")) {
            registered += here;
        }
    }
    if (f)
        fclose(f);
    printf("%lu %lu %lu\n", mappings, anonymous, registered);
}

static void change(struct block *b, unsigned number) {
    switch (number % 7) {
    case 0:
        b->at = must(mremap(b->at, b->pages * PAGE, (block_pages + 4) * PAGE, MREMAP_MAYMOVE), "mremap");
        b->pages = block_pages + 4;
        fill(b, block_pages, number);
        break;
    case 2: {
        char *to = make(b->pages);
        b->at = must(mremap(b->at, b->pages * PAGE, b->pages * PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, to), "mremap");
        break;
    }
    case 4:
        munmap(b->at, b->pages * PAGE);
        b->at = make(b->pages);
        b->turn++;
        fill(b, 0, number);
        break;
    case 5:
        b->at = must(mremap(b->at, b->pages * PAGE, 3 * PAGE, 0), "mremap");
        b->pages = 3;
    }
}

int main(int argc, char **argv) {
    if (argc != 5)
        return 2;
    unsigned n = (unsigned)atoi(argv[2]), pause = (unsigned)atoi(argv[3]);
    block_pages = (unsigned)atoi(argv[4]) / 4;
    int by_brk = !strcmp(argv[1], "brk");
    struct block *b = calloc(n, sizeof *b);
    for (unsigned i = 0; b && i < n; i++) {
        b[i] = (struct block){by_brk ? must(sbrk(block_pages * PAGE), "sbrk") : make(block_pages), block_pages, 0};
        fill(&b[i], 0, i);
        if (i % pause == 0)
            usleep(1000);
    }
    count();
    for (unsigned i = 0; b && i < n; i++)
        check(&b[i], i);
    for (unsigned i = 0; b && i < n && !by_brk; i++)
        change(&b[i], i);
    for (unsigned i = 0; b && i < n; i++)
        check(&b[i], i);
    return !b;
}
