// Touches pages of more memory than stays here: first each once (new), then COUNT of them in no order, read and then
// written. Prints the nanoseconds of a touch in each of the three. Exit 1 on a wrong byte.
//     faults MIB COUNT
#include <inttypes.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <time.h>

#define PAGE 4096ul

static uint64_t state = 1;

static uint64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

static uint64_t chosen(uint64_t pages) {
    state = state * 6364136223846793005ull + 1442695040888963407ull;
    return (state >> 33) % pages;
}

int main(int argc, char **argv) {
    uint64_t pages = (argc > 1 ? strtoull(argv[1], 0, 10) : 64) << 8;
    uint64_t count = argc > 2 ? strtoull(argv[2], 0, 10) : pages;
    char *memory = mmap(NULL, pages * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED)
        return 2;
    uint64_t began = now_ns();
    for (uint64_t i = 0; i < pages; i++)
        *(volatile uint64_t *)(memory + i * PAGE) = i * 0x9e3779b97f4a7c15ull + 1;
    uint64_t new = now_ns();
    for (uint64_t k = 0; k < count; k++) {
        uint64_t i = chosen(pages);
        if (*(volatile uint64_t *)(memory + i * PAGE) != i * 0x9e3779b97f4a7c15ull + 1)
            return 1;
    }
    uint64_t read = now_ns();
    for (uint64_t k = 0; k < count; k++)
        *(volatile uint64_t *)(memory + chosen(pages) * PAGE + 8) = k;
    uint64_t written = now_ns();
    printf("%" PRIu64 " %" PRIu64 " %" PRIu64 "\n", (new - began) / pages, (read - new) / count,
           (written - read) / count);
    return 0;
}
