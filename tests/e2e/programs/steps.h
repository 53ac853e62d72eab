// What the self-verifying programs of this folder share: areas whose every word says where it is and when it was
// written, a thread that keeps the evictor busy, and a table of named steps. `PROGRAM [STEP…]` runs all steps, or those
// named; each prints one line that is the same wherever the memory is. Exit 1 on a wrong byte, 2 where a system call
// failed. With SPOIL=STEP in the environment the first area that this step looks at loses a byte before: the step must
// then fail.
#ifndef STEPS_H
#define STEPS_H
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#define PAGE 4096ul
#define CHURN (2ul << 20)

static const char *step_name = "";
static _Atomic bool spoil;

#define WRONG(...) (printf("%s: ", step_name), printf(__VA_ARGS__), putchar('\n'), fflush(stdout), _exit(1))
#define MUST(call)                                                                        \
    do {                                                                                  \
        if (!(call)) {                                                                    \
            printf("%s, line %d: %s: %s\n", step_name, __LINE__, #call, strerror(errno)); \
            fflush(stdout);                                                               \
            _exit(2);                                                                     \
        }                                                                                 \
    } while (0)

static inline uint64_t word_at(uint64_t seed, uint64_t i) {
    uint64_t x = seed * 0x9e3779b97f4a7c15ull + i + 1;
    x = (x ^ x >> 31) * 0xff51afd7ed558ccdull;
    return x ^ x >> 29;
}

// The area's words from its `from`th page on become those of `seed`.
static inline void fill(void *area, uint64_t from, uint64_t pages, uint64_t seed) {
    for (uint64_t i = from * 512; i < (from + pages) * 512; i++)
        ((volatile uint64_t *)area)[i] = word_at(seed, i);
}

// Every 37th word, so that each page is looked at in many places. seed 0: must be zeros.
static inline void look(const void *area, uint64_t from, uint64_t pages, uint64_t seed, const char *where) {
    if (atomic_exchange(&spoil, false))
        ((volatile uint64_t *)area)[from * 512] ^= 0x40;
    for (uint64_t i = from * 512; i < (from + pages) * 512; i += 37) {
        uint64_t is = ((const volatile uint64_t *)area)[i], should = seed ? word_at(seed, i) : 0;
        if (is != should)
            WRONG("%s: page %lu, word %lu: %016lx instead of %016lx", where, (unsigned long)(i / 512),
                  (unsigned long)(i % 512), (unsigned long)is, (unsigned long)should);
    }
}

static inline char *area_at(void *where, uint64_t pages, int flags) {
    void *p = mmap(where, pages * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | flags, -1, 0);
    MUST(p != MAP_FAILED);
    return p;
}

static inline char *area(uint64_t pages) { return area_at(NULL, pages, 0); }

// ---- other memory in use all the time, so that what is not touched leaves --------------------------------------

static atomic_bool churning;
static _Atomic uint64_t churned;  // times round
static pthread_t churner;

static inline void *churn(void *memory) {
    volatile uint64_t *m = memory;
    while (churning) {
        for (uint64_t i = 0; i < CHURN / 8 && churning; i += 512)
            m[i]++;
        churned++;
    }
    return NULL;
}

static inline void churn_start(void) {
    churning = true;
    MUST(!pthread_create(&churner, NULL, churn, area(CHURN / PAGE)));
}

static inline void churn_stop(void) {
    churning = false;
    pthread_join(churner, NULL);
}

// Touch other memory, more than stays here: what was touched before has left by then.
static inline void push_out(void) {
    static _Thread_local char *other;
    if (!other)
        other = area(CHURN / PAGE);
    for (uint64_t i = 0; i < CHURN; i += PAGE)
        other[i]++;
}

// Long enough for new memory to be captured, too.
static inline void leave(void) {
    for (int i = 0; i < 2; i++) {
        push_out();
        usleep(6000);
    }
}

static inline void ended_well(pid_t pid, const char *who) {
    int status = -1;
    MUST(pid > 0 && waitpid(pid, &status, 0) == pid);
    if (status)
        WRONG("%s: status %#x", who, status);
}

// ---- steps -------------------------------------------------------------------------------------------------------

struct step {
    const char *name;
    void (*run)(void);
};

static inline int run_steps(const struct step *steps, int count, int argc, char **argv) {
    const char *spoiled = getenv("SPOIL");
    for (int i = 0; i < count; i++) {
        bool wanted = argc <= 1;
        for (int k = 1; k < argc; k++)
            wanted |= !strcmp(argv[k], steps[i].name);
        if (!wanted)
            continue;
        step_name = steps[i].name;
        spoil = spoiled && !strcmp(spoiled, step_name);
        steps[i].run();
        printf("%s: as it should be\n", step_name);
        fflush(stdout);
    }
    return 0;
}

#define COUNT(steps) ((int)(sizeof(steps) / sizeof *(steps)))
#endif
