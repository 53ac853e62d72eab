// Reads pages of more memory than stays here, one after the other in no order, for SECONDS; prints when each read that
// took longer than a few milliseconds began and ended (CLOCK_MONOTONIC, ns). Exit 1 on a wrong byte.
//     touching MIB SECONDS
#include <inttypes.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <time.h>

#define PAGE 4096ul
#define PAUSE_NS 5000000u

static uint64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

int main(int argc, char **argv) {
    uint64_t pages = (argc > 1 ? strtoull(argv[1], 0, 10) : 64) << 8, state = 1;
    uint64_t seconds = argc > 2 ? strtoull(argv[2], 0, 10) : 10;
    char *memory = mmap(NULL, pages * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED)
        return 2;
    for (uint64_t i = 0; i < pages; i++)
        *(volatile uint64_t *)(memory + i * PAGE) = i * 0x9e3779b97f4a7c15ull + 1;
    printf("ready\n");
    fflush(stdout);
    for (uint64_t began = now_ns(), last = began; last - began < seconds * 1000000000u;) {
        state = state * 6364136223846793005ull + 1442695040888963407ull;
        uint64_t i = (state >> 33) % pages;
        if (*(volatile uint64_t *)(memory + i * PAGE) != i * 0x9e3779b97f4a7c15ull + 1)
            return 1;
        uint64_t now = now_ns();
        if (now - last > PAUSE_NS) {
            printf("%" PRIu64 " %" PRIu64 "\n", last, now);
            fflush(stdout);
        }
        last = now;
    }
    printf("done\n");
    return 0;
}
