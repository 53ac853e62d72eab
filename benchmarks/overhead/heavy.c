// The C programs of bench_overhead.py: `heavy loop|memory|huge|malloc|blocks SCALE`. Each prints a checksum, and writes
// the nanoseconds each of its steps took, of about a millisecond, to the file $STEPS.
//   loop    arithmetic on registers and on 32 KiB
//   memory  reads and writes at random in 64 MiB, filled before the first step
//   huge    the same, and asks for huge pages with madvise(2)
//   malloc  objects of 16 bytes to 4 KiB, 50,000 of them alive, made, written and freed in random order
//   blocks  blocks of 64 KiB to 2 MiB, 64 alive: what malloc gets from the kernel and gives back
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>

#define STEPS 20000
#define MEMORY (64ul << 20)

static int64_t took[STEPS], last;
static size_t steps;

static void step(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    int64_t now = t.tv_sec * 1000000000ll + t.tv_nsec;
    if (last && steps < STEPS)
        took[steps++] = now - last;
    last = now;
}

static uint64_t state = 88172645463325252u;

static uint64_t next(void) {
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return state;
}

static uint64_t loop(uint64_t scale) {
    static uint64_t table[4096];
    uint64_t sum = 0;
    for (uint64_t i = 0; i < scale * 1000000; i++) {
        uint64_t x = next();
        table[x % 4096] += x;
        sum += table[(x >> 20) % 4096] % 1021;
        if (i % 200000 == 0)
            step();
    }
    return sum;
}

static uint64_t memory(uint64_t scale, bool huge) {
    uint64_t *at = aligned_alloc(2 << 20, MEMORY), sum = 0, n = MEMORY / sizeof *at;
    if (!at || (huge && madvise(at, MEMORY, MADV_HUGEPAGE)))
        exit(2);
    for (uint64_t i = 0; i < n; i++)
        at[i] = i;
    for (uint64_t i = 0; i < scale * 100000; i++) {
        uint64_t x = next();
        at[x % n] += x;
        sum += at[(x >> 24) % n];
        if (i % 20000 == 0)
            step();
    }
    free(at);
    return sum;
}

static uint64_t churn(uint64_t rounds, uint64_t each, uint32_t alive, size_t least, size_t most) {
    unsigned char **object = calloc(alive, sizeof *object);
    size_t *size = calloc(alive, sizeof *size);
    uint64_t sum = 0;
    for (uint64_t i = 0; i < rounds; i++) {
        uint32_t k = (uint32_t)(next() % alive);
        if (object[k])
            sum += object[k][0] + object[k][size[k] - 1];
        free(object[k]);
        size[k] = least + next() % (most - least);
        object[k] = malloc(size[k]);
        if (!object[k])
            exit(2);
        memset(object[k], (int)(i & 255), size[k]);
        if (i % each == 0)
            step();
    }
    for (uint32_t k = 0; k < alive; k++)
        free(object[k]);
    free(object);
    free(size);
    return sum;
}

int main(int argc, char **argv) {
    uint64_t scale = argc > 2 ? strtoull(argv[2], NULL, 10) : 1, sum;
    if (argc < 2)
        return 2;
    if (!strcmp(argv[1], "loop"))
        sum = loop(scale);
    else if (!strcmp(argv[1], "memory") || !strcmp(argv[1], "huge"))
        sum = memory(scale, argv[1][0] == 'h');
    else if (!strcmp(argv[1], "malloc"))
        sum = churn(scale * 100000, 1000, 50000, 16, 4096);
    else
        sum = churn(scale * 100, 4, 64, 64 << 10, 2 << 20);
    const char *path = getenv("STEPS");
    FILE *file = path ? fopen(path, "wb") : NULL;
    if (path && (!file || fwrite(took, sizeof took[0], steps, file) != steps || fclose(file)))
        return 2;
    printf("%llu\n", (unsigned long long)sum);
    return 0;
}
