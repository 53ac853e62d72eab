// malloc, calloc, realloc, aligned_alloc and free of all sizes from several threads, blocks handed from thread to
// thread, every block checked before it is changed or freed. Arguments: threads, MiB alive, operations a thread.
#include <malloc.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define SLOTS 4096
static struct slot {
    pthread_mutex_t lock;
    unsigned char *p;
    size_t bytes;
    unsigned char value;
} slot[SLOTS];
static size_t largest;
static int operations;

static void check(const struct slot *s) {
    for (size_t i = 0; i < s->bytes; i += i + 300 < s->bytes ? 251 : 1)
        if (s->p[i] != s->value) {
            printf("slot %td: byte %zu of %zu is %d, not %d\n", s - slot, i, s->bytes, s->p[i], s->value);
            exit(1);
        }
}

static void allocate(struct slot *s, size_t bytes, unsigned how) {
    s->bytes = bytes;
    switch (how % 3) {
    case 0:
        s->p = malloc(bytes);
        break;
    case 1:
        s->p = calloc(1, bytes);
        for (size_t i = 0; i < bytes; i += 509)
            if (s->p[i]) {
                puts("calloc: not zero");
                exit(1);
            }
        break;
    default:
        s->p = aligned_alloc(4096, (bytes + 4095) & ~(size_t)4095);
    }
    memset(s->p, s->value, bytes);
}

static void *work(void *argument) {
    unsigned seed = (unsigned)(uintptr_t)argument;
    for (int k = 0; k < operations; k++) {
        struct slot *s = &slot[rand_r(&seed) % SLOTS];
        size_t bytes = (size_t)rand_r(&seed) % (rand_r(&seed) % 8 ? largest : 8 * largest) + 1;
        pthread_mutex_lock(&s->lock);
        if (!s->p) {
            s->value = (unsigned char)rand_r(&seed);
            allocate(s, bytes, (unsigned)rand_r(&seed));
        } else if (rand_r(&seed) % 3 == 0) {
            check(s);
            s->p = realloc(s->p, bytes);
            if (bytes > s->bytes)
                memset(s->p + s->bytes, s->value, bytes - s->bytes);
            s->bytes = bytes;
        } else if (rand_r(&seed) % 2) {
            check(s);
            free(s->p);
            s->p = NULL;
        } else {
            check(s);
            memset(s->p, ++s->value, s->bytes);
        }
        pthread_mutex_unlock(&s->lock);
        if (k % 5000 == 4999)
            malloc_trim(0);
    }
    return NULL;
}

int main(int argc, char **argv) {
    int threads = argc > 1 ? atoi(argv[1]) : 4;
    largest = (size_t)(argc > 2 ? atoi(argv[2]) : 32) << 20;
    largest /= SLOTS;
    operations = argc > 3 ? atoi(argv[3]) : 20000;
    pthread_t t[64];
    for (int i = 0; i < SLOTS; i++)
        pthread_mutex_init(&slot[i].lock, NULL);
    for (int i = 0; i < threads; i++)
        pthread_create(&t[i], NULL, work, (void *)(uintptr_t)(i + 1));
    for (int i = 0; i < threads; i++)
        pthread_join(t[i], NULL);
    for (int i = 0; i < SLOTS; i++)
        if (slot[i].p)
            check(&slot[i]);
    puts("ok");
    return 0;
}
