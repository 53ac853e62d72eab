// A program with MEGABYTES of live data: fills it, then reads and writes pages in random order for ROUNDS passes, each
// page carrying its number and how often it was written, checked at every touch. Prints one line that is the same
// wherever its memory is. Exit 1 on a wrong byte.
//
// Usage: working_set [MEGABYTES [ROUNDS [SIGN]]]. With a SIGN it waits until its memory is captured, works ROUNDS
// passes as ever, makes the file SIGN, with its pid in it, and goes on for as long as that is there.
#include "captured.h"
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define PAGE 4096u

struct page {
    uint64_t number, writes;
    uint64_t body[(PAGE - 16) / 8];
};

static uint64_t mix(uint64_t x) {
    x ^= x >> 33;
    x *= 0xff51afd7ed558ccdull;
    x ^= x >> 33;
    x *= 0xc4ceb9fe1a85ec53ull;
    return x ^ x >> 33;
}

static void fill(struct page *p, uint64_t number, uint64_t writes) {
    p->number = number;
    p->writes = writes;
    for (size_t i = 0; i < sizeof p->body / 8; i++)
        p->body[i] = mix(number * 1000003 + writes * 7919 + i);
}

static void check(const struct page *p, uint64_t number, uint64_t writes, size_t step) {
    int wrong = p->number != number || p->writes != writes;
    for (size_t i = 0; i < sizeof p->body / 8; i += step)
        wrong |= p->body[i] != mix(number * 1000003 + writes * 7919 + i);
    if (wrong) {
        printf("page %lu: wrong bytes (number %lu, writes %lu, expected %lu)\n", (unsigned long)number,
               (unsigned long)p->number, (unsigned long)p->writes, (unsigned long)writes);
        exit(1);
    }
}

static struct page *data;
static uint32_t *writes;
static uint64_t pages, state = 42;

static void work(void) {
    for (uint64_t k = 0; k < pages; k++) {
        state = state * 6364136223846793005ull + 1442695040888963407ull;
        uint64_t i = (state >> 33) % pages;
        check(&data[i], i, writes[i], 61);
        if (state >> 32 & 1)
            fill(&data[i], i, ++writes[i]);
    }
}

// More passes, as long as the file is there.
static void work_on(const char *sign) {
    FILE *f = fopen(sign, "w");
    if (!f)
        exit(2);
    fprintf(f, "%d\n", (int)getpid());
    fclose(f);
    while (!access(sign, F_OK))
        work();
    for (uint64_t i = 0; i < pages; i++)
        check(&data[i], i, writes[i], 1);
}

int main(int argc, char **argv) {
    pages = (argc > 1 ? strtoull(argv[1], 0, 10) : 256) * 256;
    uint64_t rounds = argc > 2 ? strtoull(argv[2], 0, 10) : 1, sum = 0;
    data = aligned_alloc(PAGE, pages * sizeof *data);
    writes = calloc(pages, sizeof *writes);
    if (!data || !writes)
        return 2;
    if (argc > 3)
        wait_until_captured(data);
    for (uint64_t i = 0; i < pages; i++)
        fill(&data[i], i, 0);
    for (uint64_t k = 0; k < rounds; k++)
        work();
    for (uint64_t i = 0; i < pages; i++) {
        check(&data[i], i, writes[i], 61);
        sum = mix(sum ^ data[i].body[i % (sizeof data[i].body / 8)]);
    }
    if (argc > 3)
        work_on(argv[3]);
    printf("%lu pages, sum %016lx\n", (unsigned long)pages, (unsigned long)sum);
    return 0;
}
