// Memory whose every word says where it is: `patterned MIB`. Two threads keep rewriting it with what is in it already.
// "ready PLACE PID" on standard output once all is written; checks every word at the end of standard input.
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define PAGE_WORDS 512

struct place {
    uint64_t magic, pages;
    uint64_t *start;      // writable
    uint64_t *closed;     // PROT_NONE since it was written, 64 pages
    uint64_t *untouched;  // 64 MiB of which two pages have been
};
struct place place = {0x5041545445524e31, 0, 0, 0, 0};
_Atomic uint64_t rounds;
static _Atomic int stop;

uint64_t word_at(uint64_t page, uint64_t word) { return (page * PAGE_WORDS + word + 1) * 0x9e3779b97f4a7c15u; }

static void fill(uint64_t *at, uint64_t page) {
    for (uint64_t w = 0; w < PAGE_WORDS; w++)
        at[w] = word_at(page, w);
}

static void *rewrite(void *seed) {
    uint64_t x = (uintptr_t)seed * 88172645463325252u;
    while (!stop) {
        x ^= x << 13, x ^= x >> 7, x ^= x << 17;
        uint64_t page = x % place.pages;
        fill(place.start + page * PAGE_WORDS, page);
        if (++rounds % 8 == 0)
            usleep(1000);
    }
    return NULL;
}

static uint64_t *get(uint64_t pages) {
    void *p = mmap(NULL, pages * 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED)
        exit(2);
    return p;
}

static void __attribute__((noinline)) wait_for_the_end(void) {
    char c;
    while (read(0, &c, 1) > 0) {
    }
}

int main(int argc, char **argv) {
    place.pages = (argc > 1 ? strtoull(argv[1], NULL, 10) : 16) << 8;
    place.closed = get(64);
    place.untouched = get(1 << 14);
    place.start = get(place.pages);
    for (uint64_t i = 0; i < 64; i++)
        fill(place.closed + i * PAGE_WORDS, i);
    place.untouched[0] = place.untouched[(1ull << 13) * PAGE_WORDS] = 42;
    mprotect(place.closed, 64 * 4096, PROT_NONE);
    for (uint64_t i = 0; i < place.pages; i++)
        fill(place.start + i * PAGE_WORDS, i);
    pthread_t thread[2];
    for (uintptr_t i = 0; i < 2; i++)
        pthread_create(&thread[i], NULL, rewrite, (void *)(i + 1));
    printf("ready %p %d\n", (void *)&place, (int)getpid());
    fflush(stdout);
    wait_for_the_end();
    stop = 1;
    for (int i = 0; i < 2; i++)
        pthread_join(thread[i], NULL);
    mprotect(place.closed, 64 * 4096, PROT_READ);
    uint64_t wrong = 0;
    for (uint64_t i = 0; i < place.pages; i++)
        for (uint64_t w = 0; w < PAGE_WORDS; w++)
            wrong += place.start[i * PAGE_WORDS + w] != word_at(i, w);
    for (uint64_t i = 0; i < 64; i++)
        for (uint64_t w = 0; w < PAGE_WORDS; w++)
            wrong += place.closed[i * PAGE_WORDS + w] != word_at(i, w);
    printf("%s\n", wrong ? "wrong" : "as it was written");
    return wrong != 0;
}
