// Thousands of threads created and joined, a good many alive at once, each with work in memory of its own and in memory
// they share; some detached. Arguments: threads, MiB of shared data. Exit 1 on a wrong byte.
#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define ALIVE 48
static uint64_t *shared, words;
static _Atomic uint64_t sum;
static _Atomic int detached;

static uint64_t mix(uint64_t x) {
    x = (x ^ x >> 33) * 0xff51afd7ed558ccdull;
    return x ^ x >> 29;
}

static void *work(void *argument) {
    uint64_t me = (uint64_t)(uintptr_t)argument, mine[512];
    uint64_t *heap = malloc(64 * 1024);
    for (int i = 0; i < 512; i++)
        mine[i] = mix(me * 512 + i);
    for (int i = 0; i < 8192; i++)
        heap[i] = mix(me + i);
    uint64_t local = 0;
    for (int k = 0; k < 64; k++) {
        uint64_t at = mix(me * 64 + k) % words;
        if (shared[at] != mix(at)) {
            printf("thread %lu: shared word %lu is wrong\n", (unsigned long)me, (unsigned long)at);
            exit(1);
        }
        local += shared[at];
    }
    for (int i = 0; i < 8192; i += 7)
        if (heap[i] != mix(me + i) || mine[i % 512] != mix(me * 512 + i % 512)) {
            printf("thread %lu: its own memory is wrong\n", (unsigned long)me);
            exit(1);
        }
    free(heap);
    sum += local;
    if (me % 16 == 15)
        detached--;
    return NULL;
}

int main(int argc, char **argv) {
    uint64_t threads = argc > 1 ? strtoull(argv[1], 0, 10) : 1000, made = 0;
    words = (argc > 2 ? strtoull(argv[2], 0, 10) : 16) << 17;
    shared = malloc(words * sizeof *shared);
    for (uint64_t i = 0; i < words; i++)
        shared[i] = mix(i);
    while (made < threads) {
        pthread_t t[ALIVE];
        int n = 0;
        for (; n < ALIVE && made < threads; made++) {
            pthread_t one;
            if (made % 16 == 15)
                detached++;
            if (pthread_create(&one, NULL, work, (void *)(uintptr_t)made)) {
                puts("no thread");
                return 1;
            }
            if (made % 16 == 15)
                pthread_detach(one);
            else
                t[n++] = one;
        }
        for (int i = 0; i < n; i++)
            pthread_join(t[i], NULL);
    }
    while (detached > 0)
        ;
    printf("%lu threads, sum %016lx\n", (unsigned long)threads, (unsigned long)sum);
    return 0;
}
