// mremap over what the kernel has as one mapping without EDM, and as two where a part of it is captured later than the
// rest, or over what is several mappings anyway: two halves, of which the second is new each time, from three threads
// at once.
#include "steps.h"

#define PAGES 64ul
#define HALF (PAGES / 2)
#define BYTES (PAGES * PAGE)
#define THREADS 3
#define ROUNDS 2
#ifndef MREMAP_DONTUNMAP
#define MREMAP_DONTUNMAP 4
#endif

// Address space for `pages`, and nothing below it or above it that could merge with what is put there. Far below all
// else, and never used again: where a thread makes a hole, nothing of another's is put.
static char *room(uint64_t pages) {
    static _Atomic uint64_t next = 1ull << 41;
    uint64_t bytes = (pages + 2) * PAGE;
    char *p = (char *)atomic_fetch_add(&next, 2 * bytes);
    MUST(mmap(p, bytes, PROT_NONE, MAP_SHARED | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0) == p);
    return p + PAGE;
}

static void leave_room(char *p, uint64_t pages) { MUST(!munmap(p - PAGE, (pages + 2) * PAGE)); }

// Its second half is unmapped and mapped again, and both are written to at once: one mapping without EDM.
static char *in_halves(char *p, uint64_t seed) {
    area_at(p, PAGES, MAP_FIXED);
    fill(p, 0, PAGES, seed);
    leave();
    MUST(!munmap(p + HALF * PAGE, HALF * PAGE));
    area_at(p + HALF * PAGE, HALF, MAP_FIXED);
    fill(p, HALF, HALF, seed);
    return p;
}

static void same(char *p, uint64_t seed, const char *when) {
    look(p, 0, PAGES, seed, when);
    fill(p, 0, PAGES, seed + 100);
    leave();
    look(p, 0, PAGES, seed + 100, when);
}

static void moved(uint64_t seed) {
    char *p = room(PAGES), *q = room(PAGES);
    in_halves(p, seed);
    MUST(mremap(p, BYTES, BYTES, MREMAP_MAYMOVE | MREMAP_FIXED, q) == q);
    same(q, seed, "moved");
    unsigned char here[PAGES];
    MUST(mincore(p, BYTES, here) && errno == ENOMEM);
    leave_room(p, PAGES);
    leave_room(q, PAGES);
}

static void grown_in_place(uint64_t seed) {
    char *p = room(2 * PAGES);
    in_halves(p, seed);
    MUST(!munmap(p + BYTES, BYTES));
    MUST(mremap(p, BYTES, 2 * BYTES, MREMAP_MAYMOVE) == p);
    look(p, PAGES, PAGES, 0, "grown in place, the new part");
    same(p, seed, "grown in place");
    leave_room(p, 2 * PAGES);
}

static void no_room(uint64_t seed) {
    char *p = room(PAGES);
    in_halves(p, seed);
    MUST(mremap(p, BYTES, 2 * BYTES, 0) == MAP_FAILED && errno == ENOMEM);
    same(p, seed, "not grown");
    leave_room(p, PAGES);
}

static void grown_elsewhere(uint64_t seed) {
    char *p = room(PAGES);
    in_halves(p, seed);
    char *q = mremap(p, BYTES, 2 * BYTES, MREMAP_MAYMOVE);
    MUST(q != MAP_FAILED && q != p);
    look(q, PAGES, PAGES, 0, "grown elsewhere, the new part");
    same(q, seed, "grown elsewhere");
    MUST(!munmap(q, 2 * BYTES));
    leave_room(p, PAGES);
}

static void grown_to(uint64_t seed) {
    char *p = room(PAGES), *q = room(2 * PAGES);
    in_halves(p, seed);
    MUST(mremap(p, BYTES, 2 * BYTES, MREMAP_MAYMOVE | MREMAP_FIXED, q) == q);
    look(q, PAGES, PAGES, 0, "grown to a place, the new part");
    same(q, seed, "grown to a place");
    leave_room(p, PAGES);
    leave_room(q, 2 * PAGES);
}

static void shrunk(uint64_t seed) {
    char *p = room(PAGES), *q = room(PAGES);
    in_halves(p, seed);
    MUST(mremap(p, BYTES, BYTES - 8 * PAGE, MREMAP_MAYMOVE) == p);
    look(p, 0, PAGES - 8, seed, "shrunk");
    MUST(mremap(p, BYTES - 8 * PAGE, BYTES - 16 * PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, q) == q);
    look(q, 0, PAGES - 16, seed, "shrunk to a place");
    leave();
    look(q, 0, PAGES - 16, seed, "shrunk to a place");
    leave_room(p, PAGES);
    leave_room(q, PAGES);
}

// What is left behind is empty, and in use as before.
static void left_behind(uint64_t seed) {
    char *p = room(PAGES), *q = room(PAGES);
    in_halves(p, seed);
    MUST(mremap(p, BYTES, BYTES, MREMAP_MAYMOVE | MREMAP_FIXED | MREMAP_DONTUNMAP, q) == q);
    look(q, 0, PAGES, seed, "moved");
    look(p, 0, PAGES, 0, "left behind");
    in_halves(p, seed + 1);
    char *r = mremap(p, BYTES, BYTES, MREMAP_MAYMOVE | MREMAP_DONTUNMAP, NULL);
    MUST(r != MAP_FAILED && r != p);
    look(p, 0, PAGES, 0, "left behind again");
    same(r, seed + 1, "moved somewhere");
    same(q, seed, "moved");
    fill(p, 0, PAGES, seed + 2);
    same(p, seed + 2, "left behind, written");
    MUST(!munmap(r, BYTES));
    leave_room(p, PAGES);
    leave_room(q, PAGES);
}

// ---- several mappings without EDM too: whether it can be done is the kernel's to say, and the same under EDM ---------

static _Atomic int can[3];  // 0: not known yet, 1: no, 2: yes

static bool said(int which, const char *from, const char *result, const char *to) {
    MUST(result == to || (result == MAP_FAILED && errno == EFAULT && from));
    int is = result == to ? 2 : 1, was = atomic_exchange(&can[which], is);
    if (was && was != is)
        WRONG("%s", is == 2 ? "moved, and before it could not be" : "not moved, and before it could be");
    return is == 2;
}

static void look_at_several(char *p, uint64_t seed, const char *when) {
    look(p, 0, HALF - 8, seed, when);
    look(p, HALF, HALF, seed, when);
    leave();
    look(p, 0, HALF - 8, seed, when);
    MUST(!mprotect(p + HALF * PAGE, HALF * PAGE, PROT_READ | PROT_WRITE));
    look(p, HALF, HALF, seed, when);
}

static void several(uint64_t seed) {
    char *p = room(PAGES), *q = room(PAGES);
    for (int gap = 0; gap < 2; gap++) {
        in_halves(p, seed);
        MUST(!mprotect(p + HALF * PAGE, HALF * PAGE, PROT_READ));
        if (gap)
            MUST(!munmap(p + (HALF - 8) * PAGE, 8 * PAGE));
        char *to = mremap(p, BYTES, BYTES, MREMAP_MAYMOVE | MREMAP_FIXED, q);
        look_at_several(said(gap, p, to, q) ? q : p, seed, "several");
    }
    leave_room(p, PAGES);
    leave_room(q, PAGES);
}

static void several_left_behind(uint64_t seed) {
    char *p = room(PAGES), *q = room(PAGES);
    in_halves(p, seed);
    MUST(!mprotect(p + HALF * PAGE, HALF * PAGE, PROT_READ));
    char *to = mremap(p, BYTES, BYTES, MREMAP_MAYMOVE | MREMAP_FIXED | MREMAP_DONTUNMAP, q);
    if (said(2, p, to, q))
        look(p, 0, PAGES, 0, "left behind");
    look_at_several(to == q ? q : p, seed, "several");
    leave_room(p, PAGES);
    leave_room(q, PAGES);
}

// Nothing is changed by what is refused.
static void refused(uint64_t seed) {
    char *p = room(PAGES), *q = room(2 * PAGES);
    int flags = MREMAP_MAYMOVE | MREMAP_FIXED;
    in_halves(p, seed);
    MUST(!mprotect(p + HALF * PAGE, HALF * PAGE, PROT_READ));
    MUST(mremap(p, BYTES, 2 * BYTES, flags, q) == MAP_FAILED && errno == EFAULT);
    MUST(mremap(p, BYTES, 2 * BYTES, MREMAP_MAYMOVE) == MAP_FAILED && errno == EFAULT);
    MUST(mremap(p, BYTES, BYTES, MREMAP_MAYMOVE | MREMAP_DONTUNMAP, NULL) == MAP_FAILED && errno == EFAULT);
    look(p, 0, PAGES, seed, "refused");
    MUST(!mprotect(p, BYTES, PROT_READ | PROT_WRITE) && !munmap(p, 8 * PAGE));
    MUST(mremap(p, BYTES, BYTES, flags, q) == MAP_FAILED && errno == EFAULT);
    MUST(mremap(p, BYTES, BYTES, flags | MREMAP_DONTUNMAP, q) == MAP_FAILED && errno == EFAULT);
    MUST(mremap(p + 8 * PAGE, BYTES, BYTES, flags, p + 16 * PAGE) == MAP_FAILED && errno == EINVAL);
    MUST(mremap(p + 8 * PAGE, PAGE, PAGE, flags, q + 1) == MAP_FAILED && errno == EINVAL);
    MUST(mremap(p + 8 * PAGE, PAGE, 2 * PAGE, MREMAP_MAYMOVE | MREMAP_DONTUNMAP, q) == MAP_FAILED && errno == EINVAL);
    look(p, 8, PAGES - 8, seed, "refused, with a gap");
    leave();
    look(p, 8, PAGES - 8, seed, "refused, with a gap");
    leave_room(p, PAGES);
    leave_room(q, 2 * PAGES);
}

// ---- each from several threads at once -------------------------------------------------------------------------------

static void (*now)(uint64_t seed);

static void *rounds(void *number) {
    for (uint64_t i = 0; i < ROUNDS; i++)
        now(1 + (uint64_t)(uintptr_t)number * 1000 + i * 10);
    return NULL;
}

static void together(void (*what)(uint64_t)) {
    pthread_t t[THREADS];
    now = what;
    for (uint64_t i = 0; i < THREADS; i++)
        MUST(!pthread_create(&t[i], NULL, rounds, (void *)(uintptr_t)i));
    for (int i = 0; i < THREADS; i++)
        MUST(!pthread_join(t[i], NULL));
}

#define TOGETHER(what) \
    static void what##_together(void) { together(what); }
TOGETHER(moved)
TOGETHER(grown_in_place)
TOGETHER(no_room)
TOGETHER(grown_elsewhere)
TOGETHER(grown_to)
TOGETHER(shrunk)
TOGETHER(left_behind)
TOGETHER(several)
TOGETHER(several_left_behind)
TOGETHER(refused)

int main(int argc, char **argv) {
    static const struct step steps[] = {
        {"moved", moved_together},
        {"grown_in_place", grown_in_place_together},
        {"no_room", no_room_together},
        {"grown_elsewhere", grown_elsewhere_together},
        {"grown_to", grown_to_together},
        {"shrunk", shrunk_together},
        {"left_behind", left_behind_together},
        {"several", several_together},
        {"several_left_behind", several_left_behind_together},
        {"refused", refused_together},
    };
    churn_start();
    int status = run_steps(steps, COUNT(steps), argc, argv);
    if (argc <= 1)
        printf("moved as several: %d, with a gap: %d, left behind: %d\n", can[0] - 1, can[1] - 1, can[2] - 1);
    churn_stop();
    return status;
}
