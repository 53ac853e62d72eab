// Threads that write, read, drop, remap and unmap pages of their own, and fork, OPS times each, every page carrying which
// one it is, how often it was written, and by whom: a thread, or a child. What a page must hold is known at every step,
// and looked at. Prints one line that is the same wherever its memory is. Exit 1 on a wrong byte.
#define _GNU_SOURCE
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#define PAGE 4096ul
#define CHUNK 48  // pages of one mapping
#define PAGES (8 * CHUNK)
#define THREADS 2

struct owner {
    uint64_t state, number, looks, forks;
    char *chunk[PAGES / CHUNK];
    uint32_t version[PAGES];  // 0: never written, or dropped
    uint8_t writer[PAGES];
};

static uint64_t next(struct owner *o) {
    o->state = o->state * 6364136223846793005ull + 1442695040888963407ull;
    return o->state >> 33;
}

static uint64_t stamp(const struct owner *o, uint64_t page, uint64_t k) {
    uint64_t x = ((uint64_t)o->writer[page] << 56) ^ (page << 40) ^ ((uint64_t)o->version[page] << 8) ^ k;
    x ^= x >> 31;
    x *= 0x9e3779b97f4a7c15ull;
    return o->version[page] ? x ^ x >> 29 : 0;
}

static char *at(const struct owner *o, uint64_t page) { return o->chunk[page / CHUNK] + page % CHUNK * PAGE; }

static void look(struct owner *o, uint64_t page, const char *where) {
    const uint64_t *p = (const uint64_t *)at(o, page);
    o->looks++;
    for (uint64_t k = 0; k < PAGE / 8; k += 73)
        if (p[k] != stamp(o, page, k)) {
            printf("%s: thread %lu, page %lu, word %lu: %lx instead of %lx (version %u)\n", where, (unsigned long)o->number,
                   (unsigned long)page, (unsigned long)k, (unsigned long)p[k], (unsigned long)stamp(o, page, k),
                   o->version[page]);
            fflush(stdout);
            _exit(1);
        }
}

static void put(struct owner *o, uint64_t page) {
    uint64_t *p = (uint64_t *)at(o, page);
    o->version[page]++;
    o->writer[page] = (uint8_t)o->number;
    for (uint64_t k = 0; k < PAGE / 8; k++)
        p[k] = stamp(o, page, k);
}

static char *map(char *where) {
    int fixed = where ? MAP_FIXED : 0;
    void *p = mmap(where, CHUNK * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | fixed, -1, 0);
    if (p == MAP_FAILED)
        _exit(2);
    return p;
}

static void forget(struct owner *o, uint64_t page, uint64_t count) {
    for (uint64_t i = 0; i < count; i++)
        o->version[page + i] = 0;
}

static void drop(struct owner *o, uint64_t page) {
    uint64_t count = 1 + page % 16, left = CHUNK - page % CHUNK;
    count = count < left ? count : left;
    if (madvise(at(o, page), count * PAGE, MADV_DONTNEED))
        _exit(2);
    forget(o, page, count);
}

// What one thread unmaps no other may be given before it is mapped again: not as its stack, nor as its first chunks.
static pthread_mutex_t mapping = PTHREAD_MUTEX_INITIALIZER;
static pthread_barrier_t all_there;

static void unmap(struct owner *o, uint64_t c) {
    char *was = o->chunk[c];
    pthread_mutex_lock(&mapping);
    if (munmap(was, CHUNK * PAGE))
        _exit(2);
    o->chunk[c] = map(was);
    pthread_mutex_unlock(&mapping);
    forget(o, c * CHUNK, CHUNK);
}

static void move(struct owner *o, uint64_t c) {
    pthread_mutex_lock(&mapping);
    char *to = map(NULL);
    pthread_mutex_unlock(&mapping);
    if (mremap(o->chunk[c], CHUNK * PAGE, CHUNK * PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, to) != to)
        _exit(2);
    o->chunk[c] = to;
}

static void fork_and_look(struct owner *o) {
    fflush(stdout);
    pid_t child = fork();
    o->forks++;
    if (child == 0) {
        o->number = THREADS + 1 + (o->forks * THREADS + o->number) % (256 - THREADS - 1);
        for (uint64_t i = 0; i < PAGES; i++)
            look(o, i, "child");
        for (uint64_t i = 0; i < PAGES; i += 7)
            put(o, i);
        for (uint64_t i = 0; i < PAGES; i += 5)
            look(o, i, "child, its own");
        _exit(0);
    }
    for (uint64_t i = 3; i < PAGES; i += 11)
        put(o, i);
    int status = 0;
    if (child < 0 || waitpid(child, &status, 0) != child || status) {
        printf("child: status %#x\n", status);
        fflush(stdout);
        _exit(1);
    }
    o->looks += PAGES + (PAGES + 4) / 5;  // the child's
}

static void *work(void *arg) {
    struct owner *o = arg;
    uint64_t ops = o->state;
    o->state = 77 + o->number;
    for (int c = 0; c < PAGES / CHUNK; c++)
        o->chunk[c] = map(NULL);
    pthread_barrier_wait(&all_there);
    for (uint64_t i = 0; i < PAGES; i++)
        put(o, i);
    for (uint64_t k = 0; k < ops; k++) {
        uint64_t what = next(o) % 256, page = next(o) % PAGES;
        if (what < 110) {
            look(o, page, "read");
        } else if (what < 240) {
            look(o, page, "before a write");
            put(o, page);
        } else if (what < 246) {
            drop(o, page);
        } else if (what < 249) {
            unmap(o, page / CHUNK);
        } else if (what < 252) {
            move(o, page / CHUNK);
        } else if (what == 252) {
            fork_and_look(o);
        }
    }
    for (uint64_t i = 0; i < PAGES; i++)
        look(o, i, "at the end");
    return NULL;
}

int main(int argc, char **argv) {
    static struct owner owner[THREADS];
    pthread_t t[THREADS];
    uint64_t sum = 0, looks = 0;
    pthread_barrier_init(&all_there, NULL, THREADS);
    for (uint64_t i = 0; i < THREADS; i++) {
        owner[i].number = i + 1;
        owner[i].state = argc > 1 ? strtoull(argv[1], 0, 10) : 2000;
        if (pthread_create(&t[i], NULL, work, &owner[i]))
            return 2;
    }
    for (int i = 0; i < THREADS; i++) {
        pthread_join(t[i], NULL);
        looks += owner[i].looks;
        for (uint64_t p = 0; p < PAGES; p++)
            sum = sum * 31 + stamp(&owner[i], p, 7);
    }
    printf("%d pages, looked at %lu times, sum %016lx\n", THREADS * PAGES, (unsigned long)looks, (unsigned long)sum);
    return 0;
}
