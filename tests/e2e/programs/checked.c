// Memory of all sizes made, filled and freed by two threads, for the tools that look at each access. Then, as asked for,
// one mistake: `freed` reads what it has freed; `raced`: two threads write to the same without a lock.
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define BLOCKS 4000
#define ROUNDS 2
#define THREADS 2
static int shared;

static void *work(void *argument) {
    uint64_t seed = (uint64_t)(uintptr_t)argument, sum = 0;
    unsigned char **block = calloc(BLOCKS, sizeof *block);
    for (int i = 0; i < BLOCKS * ROUNDS; i++) {
        seed = seed * 6364136223846793005u + 1442695040888963407u;
        size_t bytes = 16 + (seed >> 33) % 800;
        free(block[i % BLOCKS]);
        block[i % BLOCKS] = memset(malloc(bytes), (int)(seed >> 40), bytes);
    }
    for (int i = 0; i < BLOCKS; i++) {
        sum = sum * 31 + block[i][7];
        free(block[i]);
    }
    free(block);
    return (void *)(uintptr_t)sum;
}

static void *race(void *argument) {
    for (int i = 0; i < 1000; i++)
        shared++;
    return argument;
}

static void in_threads(void *(*run)(void *), const char *says) {
    pthread_t thread[THREADS];
    void *sum;
    for (uintptr_t i = 0; i < THREADS; i++)
        pthread_create(&thread[i], NULL, run, (void *)(i + 1));
    for (int i = 0; i < THREADS; i++) {
        pthread_join(thread[i], &sum);
        printf("%s %lx\n", says, (unsigned long)(uintptr_t)sum);
    }
    fflush(stdout);
}

int main(int argc, char **argv) {
    const char *mistake = argc > 1 ? argv[1] : "";
    in_threads(work, "worked");
    if (!strcmp(mistake, "raced"))
        in_threads(race, "raced");
    if (!strcmp(mistake, "freed")) {
        volatile char *block = malloc(100);
        free((void *)(uintptr_t)block);
        printf("%d\n", block[5]);
    }
    return 0;
}
