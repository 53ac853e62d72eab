// Where memory is placed: huge pages asked for, allowed again, made by a collapse and torn apart; memory bound to a
// NUMA node, and pages moved between nodes.
#include "steps.h"

#include <sys/prctl.h>

#define HUGE (2ul << 20)
#define HUGE_PAGES (HUGE / PAGE)
#define COLLAPSE 25  // MADV_COLLAPSE
#define PREFERRED 1  // MPOL_*, from linux/mempolicy.h
#define BIND 2
#define BY_ADDRESS 2  // MPOL_F_ADDR
#define MOVE 2        // MPOL_MF_MOVE
#define ROUNDS 2ul

// At an address where a huge page can be.
static char *huge_area(uint64_t count) {
    char *all = area((count + 1) * HUGE_PAGES), *p = (char *)(((uintptr_t)all + HUGE - 1) / HUGE * HUGE);
    if (p > all)
        MUST(!munmap(all, (size_t)(p - all)));
    MUST(!munmap(p + count * HUGE, (size_t)(all + HUGE - p)));
    MUST(!madvise(p, count * HUGE, MADV_HUGEPAGE) || errno == EINVAL);  // no huge pages in this kernel
    return p;
}

static void in_huge_area(uint64_t seed, bool collapse) {
    char *p = huge_area(2);
    fill(p, 0, 2 * HUGE_PAGES, seed);
    if (collapse)
        madvise(p, 2 * HUGE, COLLAPSE);  // whether it can is the kernel's business
    push_out();
    look(p, 0, 2 * HUGE_PAGES, seed, "whole");
    if (collapse)
        madvise(p, 2 * HUGE, COLLAPSE);
    // Torn apart: a hole, a page given up, another protection.
    MUST(!munmap(p + 100 * PAGE, 3 * PAGE));
    MUST(!madvise(p + HUGE + 50 * PAGE, PAGE, MADV_DONTNEED));
    MUST(!mprotect(p + HUGE + 200 * PAGE, PAGE, PROT_READ));
    push_out();
    look(p, 0, 100, seed, "before the hole");
    look(p, 103, HUGE_PAGES - 103 + 50, seed, "behind the hole");
    look(p, HUGE_PAGES + 50, 1, 0, "given up");
    look(p, HUGE_PAGES + 51, HUGE_PAGES - 51, seed, "the rest");
    MUST(!munmap(p, 2 * HUGE));
}

static void advised(void) {
    for (uint64_t round = 0; round < ROUNDS; round++)
        in_huge_area(10 + round, round % 2);
}

// EDM turns huge pages off for the programs it captures; a program may turn them on again.
static void allowed_again(void) {
    MUST(!prctl(PR_SET_THP_DISABLE, 0, 0, 0, 0));
    for (uint64_t round = 0; round < ROUNDS; round++)
        in_huge_area(20 + round, round % 2);
    pid_t child = fork();
    if (child == 0) {
        in_huge_area(30, true);
        _exit(0);
    }
    int status;
    MUST(child > 0 && waitpid(child, &status, 0) == child);
    if (status)
        WRONG("child: status %#x", status);
}

static bool no_numa(long result) { return result < 0 && (errno == ENOSYS || errno == EPERM); }

static void bound(void) {
    unsigned long node0 = 1;
    char *p = area(HUGE_PAGES);
    fill(p, 0, HUGE_PAGES, 40);
    push_out();
    look(p, 0, HUGE_PAGES, 40, "anywhere");
    push_out();
    long r = syscall(SYS_mbind, p, HUGE, BIND, &node0, 64ul, MOVE);
    if (no_numa(r))
        return;
    MUST(!r);
    look(p, 0, HUGE_PAGES, 40, "bound");
    int policy = -1;
    MUST(!syscall(SYS_get_mempolicy, &policy, NULL, 0ul, p + 5 * PAGE, (unsigned long)BY_ADDRESS));
    if (policy != BIND)
        WRONG("policy %d", policy);
    fill(p, 0, HUGE_PAGES / 2, 41);
    push_out();
    look(p, 0, HUGE_PAGES / 2, 41, "written since");
    look(p, HUGE_PAGES / 2, HUGE_PAGES / 2, 40, "as before");
    MUST(!munmap(p, HUGE));
}

static void preferred(void) {
    unsigned long node0 = 1;
    char *p = area(HUGE_PAGES);
    fill(p, 0, HUGE_PAGES, 50);
    push_out();
    look(p, 0, HUGE_PAGES, 50, "anywhere");
    long r = syscall(SYS_set_mempolicy, PREFERRED, &node0, 64ul);
    if (no_numa(r))
        return;
    MUST(!r);
    fill(p, 0, HUGE_PAGES, 51);
    push_out();
    look(p, 0, HUGE_PAGES, 51, "preferred");
    int policy = -1;
    MUST(!syscall(SYS_get_mempolicy, &policy, NULL, 0ul, NULL, 0ul));
    if (policy != PREFERRED)
        WRONG("policy %d", policy);
    MUST(!syscall(SYS_set_mempolicy, 0, NULL, 0ul));
    MUST(!munmap(p, HUGE));
}

static void moved(void) {
    char *p = area(HUGE_PAGES);
    for (uint64_t round = 0; round < ROUNDS; round++) {
        void *page[HUGE_PAGES];
        int node[HUGE_PAGES] = {0}, status[HUGE_PAGES];
        unsigned long node0 = 1;
        fill(p, 0, HUGE_PAGES, 60 + round);
        look(p, 0, HUGE_PAGES, 60 + round, "anywhere");
        push_out();
        for (uint64_t i = 0; i < HUGE_PAGES; i++)
            page[i] = p + i * PAGE;
        long r = syscall(SYS_move_pages, 0, HUGE_PAGES, page, node, status, MOVE);
        if (no_numa(r))
            return;
        MUST(r >= 0);
        for (uint64_t i = 0; i < HUGE_PAGES; i++)
            if (status[i] && status[i] != -ENOENT)  // a page that is away is nowhere, as one in swap
                WRONG("page %lu: status %d", (unsigned long)i, status[i]);
        MUST(syscall(SYS_migrate_pages, 0, 64ul, &node0, &node0) >= 0 || errno == EPERM);
        look(p, 0, HUGE_PAGES, 60 + round, "moved");
    }
    MUST(!munmap(p, HUGE));
}

int main(int argc, char **argv) {
    static const struct step steps[] = {
        {"advised", advised}, {"allowed_again", allowed_again}, {"bound", bound}, {"preferred", preferred},
        {"moved", moved},
    };
    churn_start();
    int status = run_steps(steps, COUNT(steps), argc, argv);
    churn_stop();
    return status;
}
