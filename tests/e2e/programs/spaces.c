// Address-space changes while pages are evicted, from several threads at once: each thread goes through all of them in
// memory of its own while the others do too. After each change every byte is what it would be without EDM.
#include "steps.h"

#include <setjmp.h>
#include <sys/resource.h>

#define PAGES 128ul
#define THREADS 3
#ifndef MREMAP_DONTUNMAP
#define MREMAP_DONTUNMAP 4
#endif
#ifndef MADV_POPULATE_READ
#define MADV_POPULATE_READ 22
#define MADV_POPULATE_WRITE 23
#endif

static char *moved(char *p, uint64_t from, uint64_t to) {
    char *q = mremap(p, from * PAGE, to * PAGE, MREMAP_MAYMOVE);
    MUST(q != MAP_FAILED);
    return q;
}

static void grow(uint64_t seed) {
    char *p = area(PAGES);
    fill(p, 0, PAGES, seed);
    push_out();
    p = moved(p, PAGES, 4 * PAGES);
    look(p, 0, PAGES, seed, "grown");
    look(p, PAGES, 3 * PAGES, 0, "grown, the new part");
    fill(p, PAGES, PAGES, seed);
    push_out();
    look(p, 0, 2 * PAGES, seed, "grown and written");
    munmap(p, 4 * PAGES * PAGE);
}

static void shrink(uint64_t seed) {
    char *p = area(PAGES);
    fill(p, 0, PAGES, seed);
    push_out();
    MUST(mremap(p, PAGES * PAGE, PAGES / 2 * PAGE, 0) == p);
    look(p, 0, PAGES / 2, seed, "shrunk");
    p = moved(p, PAGES / 2, PAGES);
    look(p, 0, PAGES / 2, seed, "shrunk and grown");
    look(p, PAGES / 2, PAGES / 2, 0, "what was given back, again");
    munmap(p, PAGES * PAGE);
}

static void move(uint64_t seed) {
    char *p = area(PAGES), *to = area(PAGES);
    fill(p, 0, PAGES, seed);
    fill(to, 0, PAGES, seed + 1);
    push_out();
    char *q = mremap(p, PAGES * PAGE, PAGES * PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, to);
    MUST(q == to);
    look(to, 0, PAGES, seed, "moved over another");
    push_out();
    look(to, 0, PAGES, seed, "moved, and out again");
    munmap(to, PAGES * PAGE);
}

static void dontunmap(uint64_t seed) {
    char *p = area(PAGES);
    fill(p, 0, PAGES, seed);
    push_out();
    char *q = mremap(p, PAGES * PAGE, PAGES * PAGE, MREMAP_MAYMOVE | MREMAP_DONTUNMAP, NULL);
    MUST(q != MAP_FAILED);
    look(q, 0, PAGES, seed, "moved");
    look(p, 0, PAGES, 0, "left");
    fill(p, 0, PAGES, seed + 1);
    push_out();
    look(q, 0, PAGES, seed, "moved");
    look(p, 0, PAGES, seed + 1, "left, and written");
    munmap(p, PAGES * PAGE);
    munmap(q, PAGES * PAGE);
}

static void unmap_part(uint64_t seed) {
    char *p = area(PAGES);
    fill(p, 0, PAGES, seed);
    push_out();
    MUST(!munmap(p + PAGES / 4 * PAGE, PAGES / 2 * PAGE));
    look(p, 0, PAGES / 4, seed, "before the hole");
    look(p, PAGES / 4 * 3, PAGES / 4, seed, "after the hole");
    munmap(p, PAGES / 4 * PAGE);
    munmap(p + PAGES / 4 * 3 * PAGE, PAGES / 4 * PAGE);
}

static void map_over(uint64_t seed) {
    char *p = area(PAGES);
    fill(p, 0, PAGES, seed);
    push_out();
    for (int k = 0; k < 3; k++) {
        area_at(p + PAGES / 4 * PAGE, PAGES / 2, MAP_FIXED);
        look(p, PAGES / 4, PAGES / 2, 0, "mapped over");
        fill(p, PAGES / 4, PAGES / 2, seed + 1 + k);
        push_out();
        look(p, PAGES / 4, PAGES / 2, seed + 1 + k, "mapped over, and written");
    }
    look(p, 0, PAGES / 4, seed, "before it");
    look(p, PAGES / 4 * 3, PAGES / 4, seed, "after it");
    munmap(p, PAGES * PAGE);
}

static void drop(uint64_t seed) {
    char *p = area(PAGES);
    for (int k = 0; k < 3; k++) {
        fill(p, 0, PAGES, seed + k);
        if (k)
            push_out();
        MUST(!madvise(p + 8 * PAGE, 32 * PAGE, MADV_DONTNEED));
        look(p, 8, 32, 0, "dropped");
        look(p, 0, 8, seed + k, "before it");
        look(p, 40, PAGES - 40, seed + k, "after it");
        push_out();
        look(p, 8, 32, 0, "dropped, later");
    }
    munmap(p, PAGES * PAGE);
}

// What was freed is the old or zeros, whole pages of it, and stays what was written afterwards.
static void lazily_free(uint64_t seed) {
    char *p = area(PAGES);
    fill(p, 0, PAGES, seed);
    push_out();
    MUST(!madvise(p, PAGES / 2 * PAGE, MADV_FREE));
    push_out();
    for (uint64_t i = 0; i < PAGES / 2; i++)
        look(p, i, 1, ((volatile uint64_t *)p)[i * 512] ? seed : 0, "freed");
    MUST(!madvise(p, PAGES / 2 * PAGE, MADV_FREE));
    fill(p, 0, PAGES / 2, seed + 1);
    push_out();
    look(p, 0, PAGES / 2, seed + 1, "freed, and written");
    look(p, PAGES / 2, PAGES / 2, seed, "not freed");
    munmap(p, PAGES * PAGE);
}

// MADV_REMOVE is for shared memory, and an error elsewhere; there it makes zeros.
static void remove_advice(uint64_t seed) {
    char *p = area(PAGES);
    fill(p, 0, PAGES, seed);
    push_out();
    if (!madvise(p, PAGES * PAGE, MADV_REMOVE) || errno != EINVAL)
        WRONG("MADV_REMOVE of private memory");
    look(p, 0, PAGES, seed, "not removed");
    char *q = mmap(NULL, PAGES * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    MUST(q != MAP_FAILED);
    fill(q, 0, PAGES, seed);
    MUST(!madvise(q, PAGES / 2 * PAGE, MADV_REMOVE));
    look(q, 0, PAGES / 2, 0, "removed");
    look(q, PAGES / 2, PAGES / 2, seed, "shared");
    munmap(p, PAGES * PAGE);
    munmap(q, PAGES * PAGE);
}

static void populate(uint64_t seed) {
    char *p = area(PAGES);
    fill(p, 0, PAGES / 2, seed);
    push_out();
    MUST(!madvise(p, PAGES * PAGE, MADV_POPULATE_READ));
    look(p, 0, PAGES / 2, seed, "populated to read");
    look(p, PAGES / 2, PAGES / 2, 0, "populated to read, new");
    push_out();
    MUST(!madvise(p, PAGES * PAGE, MADV_POPULATE_WRITE));
    look(p, 0, PAGES / 2, seed, "populated to write");
    look(p, PAGES / 2, PAGES / 2, 0, "populated to write, new");
    MUST(!madvise(p, PAGES * PAGE, MADV_WILLNEED));
    push_out();
    look(p, 0, PAGES / 2, seed, "out again");
    char *q = area_at(NULL, PAGES, MAP_POPULATE);
    look(q, 0, PAGES, 0, "mapped with MAP_POPULATE");
    munmap(p, PAGES * PAGE);
    munmap(q, PAGES * PAGE);
}

static void protect(uint64_t seed) {
    char *p = area(PAGES);
    fill(p, 0, PAGES, seed);
    push_out();
    look(p, 0, PAGES, seed, "not yet protected");
    MUST(!mprotect(p, PAGES * PAGE, PROT_NONE));
    push_out();
    int fd[2];
    MUST(!pipe(fd));
    if (write(fd[1], p, PAGE) != -1 || errno != EFAULT)
        WRONG("the kernel read what is PROT_NONE");
    close(fd[0]);
    close(fd[1]);
    MUST(!mprotect(p, PAGES * PAGE, PROT_READ));
    look(p, 0, PAGES, seed, "read only");
    MUST(!mprotect(p, PAGES * PAGE, PROT_READ | PROT_WRITE));
    fill(p, 0, PAGES / 2, seed + 1);
    push_out();
    look(p, 0, PAGES / 2, seed + 1, "written");
    look(p, PAGES / 2, PAGES / 2, seed, "not written");
    munmap(p, PAGES * PAGE);
}

static void lock(uint64_t seed) {
    char *p = area(PAGES);
    fill(p, 0, PAGES, seed);
    push_out();
    MUST(!mlock(p, PAGES / 2 * PAGE));
    unsigned char there[PAGES / 2];
    push_out();
    MUST(!mincore(p, PAGES / 2 * PAGE, there));
    for (uint64_t i = 0; i < PAGES / 2; i++)
        if (!(there[i] & 1))
            WRONG("locked page %lu is not here", (unsigned long)i);
    look(p, 0, PAGES, seed, "locked");
    fill(p, 0, PAGES, seed + 1);
    MUST(!munlock(p, PAGES / 2 * PAGE));
    push_out();
    look(p, 0, PAGES, seed + 1, "unlocked");
    munmap(p, PAGES * PAGE);
}

// The break, by hand: up, down and up again. Alone, since malloc moves it too.
static void brk_and_heap(uint64_t seed) {
    char *p = sbrk(0);
    uint64_t up = (PAGE - (uintptr_t)p % PAGE) % PAGE;
    MUST(sbrk((intptr_t)(up + PAGES * PAGE)) != (void *)-1);
    p += up;
    fill(p, 0, PAGES, seed);
    push_out();
    look(p, 0, PAGES, seed, "above the old break");
    MUST(sbrk(-(intptr_t)(PAGES / 2 * PAGE)) != (void *)-1);
    push_out();
    look(p, 0, PAGES / 2, seed, "below the lowered break");
    MUST(sbrk((intptr_t)(PAGES / 2 * PAGE)) != (void *)-1);
    look(p, PAGES / 2, PAGES / 2, 0, "above it, again");
    look(p, 0, PAGES / 2, seed, "below it");
    MUST(sbrk(-(intptr_t)(PAGES * PAGE)) != (void *)-1);
}

// ---- one thread each, or all at once -------------------------------------------------------------------------------

static void (*const changes[])(uint64_t) = {
    grow, shrink, move, dontunmap, unmap_part, map_over, drop, lazily_free, remove_advice, populate, protect, lock,
};

#define ALONE(change) \
    static void only_##change(void) { change(1000); }
ALONE(grow)
ALONE(shrink)
ALONE(move)
ALONE(dontunmap)
ALONE(unmap_part)
ALONE(map_over)
ALONE(drop)
ALONE(lazily_free)
ALONE(remove_advice)
ALONE(populate)
ALONE(protect)
ALONE(lock)
ALONE(brk_and_heap)

static void *all(void *argument) {
    uint64_t me = (uint64_t)(uintptr_t)argument;
    // Each begins elsewhere, so that unlike changes meet.
    for (uint64_t k = 0; k < sizeof changes / sizeof *changes; k++)
        changes[(me * 5 + k) % (sizeof changes / sizeof *changes)](me * 1000 + k * 10);
    return NULL;
}

static void all_at_once(void) {
    pthread_t t[THREADS];
    for (uint64_t i = 0; i < THREADS; i++)
        MUST(!pthread_create(&t[i], NULL, all, (void *)(uintptr_t)(i + 1)));
    for (int i = 0; i < THREADS; i++)
        pthread_join(t[i], NULL);
}

static uint64_t deep(uint64_t levels) {
    volatile uint64_t here[512];
    for (int i = 0; i < 512; i += 64)
        here[i] = word_at(levels, i);
    uint64_t below = levels ? deep(levels - 1) : 0;
    for (int i = 0; i < 512; i += 64)
        if (here[i] != word_at(levels, i))
            WRONG("level %lu of the stack, word %d", (unsigned long)levels, i);
    return below + here[64];
}

static void stack_growth(void) {
    struct rlimit limit;
    MUST(!getrlimit(RLIMIT_STACK, &limit));
    uint64_t first = deep(1200), again;  // about 5 MiB
    push_out();
    again = deep(1200);
    if (first != again)
        WRONG("the same stack twice: %lx and %lx", (unsigned long)first, (unsigned long)again);
    char *p = area(8);
    fill(p, 0, 8, 5);
    look(p, 0, 8, 5, "beside the stack");
}

static sigjmp_buf back;
static void *volatile faulted;

static void on_segv(int number, siginfo_t *info, void *context) {
    (void)number;
    (void)context;
    faulted = info->si_addr;
    siglongjmp(back, 1);
}

// A touch of what may not be touched is the program's own SIGSEGV, at its address, evicted or not.
static void segv(void) {
    struct sigaction act = {.sa_sigaction = on_segv, .sa_flags = SA_SIGINFO}, old;
    char *p = area(PAGES);
    fill(p, 0, PAGES, 31);
    push_out();
    MUST(!mprotect(p, PAGES / 2 * PAGE, PROT_NONE) && !mprotect(p + PAGES / 2 * PAGE, PAGES / 2 * PAGE, PROT_READ));
    push_out();
    MUST(!sigaction(SIGSEGV, &act, &old));
    for (volatile uint64_t i = 0; i < PAGES; i += 5) {
        faulted = NULL;
        if (!sigsetjmp(back, 1)) {
            *(volatile char *)(p + i * PAGE + 9) = 1;
            WRONG("page %lu could be written", (unsigned long)i);
        }
        if (faulted != p + i * PAGE + 9)
            WRONG("page %lu: the fault was said to be at %p", (unsigned long)i, faulted);
    }
    MUST(!sigaction(SIGSEGV, &old, NULL) && !mprotect(p, PAGES * PAGE, PROT_READ | PROT_WRITE));
    look(p, 0, PAGES, 31, "afterwards");
    munmap(p, PAGES * PAGE);
}

// Everything locked, what comes later too; last, since it fills all memory there is.
static void lock_all(void) {
    char *p = area(PAGES);
    fill(p, 0, PAGES, 41);
    push_out();
    MUST(!mlockall(MCL_CURRENT | MCL_FUTURE));
    look(p, 0, PAGES, 41, "locked");
    char *q = area(PAGES);
    look(q, 0, PAGES, 0, "new, locked");
    fill(q, 0, PAGES, 42);
    MUST(!munlockall());
    push_out();
    look(p, 0, PAGES, 41, "unlocked");
    look(q, 0, PAGES, 42, "new, unlocked");
}

int main(int argc, char **argv) {
#define STEP(change)           \
    {                          \
        #change, only_##change \
    }
    static const struct step steps[] = {
        STEP(grow),
        STEP(shrink),
        STEP(move),
        STEP(dontunmap),
        STEP(unmap_part),
        STEP(map_over),
        STEP(drop),
        STEP(lazily_free),
        STEP(remove_advice),
        STEP(populate),
        STEP(protect),
        STEP(lock),
        STEP(brk_and_heap),
        {"all_at_once", all_at_once},
        {"stack_growth", stack_growth},
        {"segv", segv},
        {"lock_all", lock_all},
    };
    return run_steps(steps, COUNT(steps), argc, argv);
}
