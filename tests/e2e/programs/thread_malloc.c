// Threads that allocate, fill, check and free blocks of many sizes, and come and go. Exit 1 on a wrong byte.
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static void *work(void *argument) {
    unsigned seed = (unsigned)(uintptr_t)argument;
    for (int round = 0; round < 60; round++) {
        size_t bytes = 1000 + (size_t)rand_r(&seed) % 300000;
        unsigned char *block = malloc(bytes), value = (unsigned char)(round + (int)seed);
        memset(block, value, bytes);
        for (size_t i = 0; i < bytes; i += 511)
            if (block[i] != value) {
                puts("wrong byte");
                exit(1);
            }
        free(block);
    }
    return NULL;
}

int main(int argc, char **argv) {
    int threads = argc > 1 ? atoi(argv[1]) : 16;
    for (int round = 0; round < 20; round++) {
        pthread_t t[64];
        for (int i = 0; i < threads; i++)
            pthread_create(&t[i], NULL, work, (void *)(uintptr_t)(i + round * threads));
        for (int i = 0; i < threads; i++)
            pthread_join(t[i], NULL);
    }
    puts("ok");
    return 0;
}
