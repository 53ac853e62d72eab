// Reads pages of more memory than stays here, one after the other in no order, until its input ends; prints when each
// read that took longer than a few milliseconds began and ended (CLOCK_MONOTONIC, ns). Exit 1 on a wrong byte.
//     touching MIB
#include <inttypes.h>
#include <poll.h>
#include <stdbool.h>
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

static bool input_ended(void) {
    struct pollfd p = {0, POLLIN, 0};
    return poll(&p, 1, 0) == 1;
}

int main(int argc, char **argv) {
    uint64_t pages = (argc > 1 ? strtoull(argv[1], 0, 10) : 64) << 8, state = 1;
    char *memory = mmap(NULL, pages * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED)
        return 2;
    for (uint64_t i = 0; i < pages; i++)
        *(volatile uint64_t *)(memory + i * PAGE) = i * 0x9e3779b97f4a7c15ull + 1;
    printf("ready\n");
    fflush(stdout);
    uint64_t last = now_ns();
    for (uint64_t k = 0; k % 1024 || !input_ended(); k++) {
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
