// glibc's heap grows in steps of 64 MiB: what is new beside registered memory is a mapping of its own, and is filled
// ahead of the program where it is large (measured: sqlite3 58 mappings instead of 650, and malloc of small blocks in
// 0.6 to 0.9 of the time). As it no longer learns, once it is told, which blocks a program frees and allocates again,
// it is told what it would have learnt at most, and keeps what is free at the top so that the step is not taken again
// with every block. Source: mallopt(3), M_MMAP_THRESHOLD.
//
// Nothing of this where the program's memory is limited: of an RLIMIT_AS of 200 MiB it would have 128. A limit that it
// sets itself later has the step given back.
#include "heap.h"

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <errno.h>
#include <fcntl.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/syscall.h>

#include "calls.h"

#define MEBI (1l << 20)
#define STEP (64 * MEBI)
#define LARGE (1024ul * STEP)  // a limit beside which a step is nothing
#define EXPORTED __attribute__((visibility("default")))

// Source: malloc.h of glibc. Other C libraries have none of it.
#define M_TRIM_THRESHOLD (-1)
#define M_TOP_PAD (-2)
#define M_MMAP_THRESHOLD (-3)
extern int mallopt(int what, int value) __attribute__((weak));
extern int malloc_trim(size_t pad) __attribute__((weak));

static bool in_steps;
static long owner;

// By whoever started the program: it is to be as they said.
static bool told_by_user(void) {
    static const char *const variable[] = {"MALLOC_TOP_PAD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"};
    static const char *const tunable[] = {"malloc.top_pad", "malloc.mmap_threshold", "malloc.trim_threshold"};
    const char *tunables = getenv("GLIBC_TUNABLES");
    for (int i = 0; i < 3; i++)
        if (getenv(variable[i]) || (tunables && strstr(tunables, tunable[i])))
            return true;
    return false;
}

static bool small(int resource) {
    struct rlimit limit;
    return !CALL6(SYS_prlimit64, 0, resource, 0, &limit, 0, 0) && limit.rlim_cur < LARGE;
}

// vm.overcommit_memory=2: what is mapped is taken, touched or not.
static bool strict(void) {
    char mode = 0;
    long fd = CALL6(SYS_openat, AT_FDCWD, "/proc/sys/vm/overcommit_memory", O_RDONLY | O_CLOEXEC, 0, 0, 0);
    if (fd < 0)
        return false;
    long got = CALL(SYS_read, fd, &mode, 1);
    CALL(SYS_close, fd, 0, 0);
    return got == 1 && mode == '2';
}

void heap_mine(void) { owner = CALL(SYS_getpid, 0, 0, 0); }

void heap_begin(void) {
    if (!mallopt || told_by_user() || small(RLIMIT_AS) || small(RLIMIT_DATA) || strict())
        return;
    heap_mine();
    in_steps = mallopt(M_TOP_PAD, STEP) && mallopt(M_MMAP_THRESHOLD, 32 * MEBI) && mallopt(M_TRIM_THRESHOLD, 80 * MEBI);
}

// It goes on with what is between glibc's first values and those it learns at most: which these would be is not known.
static void give_step_back(void) {
    in_steps = false;
    mallopt(M_TOP_PAD, 128 * 1024);
    mallopt(M_MMAP_THRESHOLD, 4 * MEBI);
    mallopt(M_TRIM_THRESHOLD, 8 * MEBI);
    if (malloc_trim)
        malloc_trim(128 * 1024);
}

// Not in a child that has this memory too (vfork): its limits are its own.
static int set_limit(pid_t pid, int resource, const struct rlimit *limit, struct rlimit *before) {
    long r = CALL6(SYS_prlimit64, pid, resource, limit, before, 0, 0);
    if (r < 0)
        return errno = (int)-r, -1;
    if (limit && in_steps && (resource == RLIMIT_AS || resource == RLIMIT_DATA) && limit->rlim_cur < LARGE &&
        CALL(SYS_getpid, 0, 0, 0) == owner && (!pid || pid == owner)) {
        int error = errno;
        give_step_back();
        errno = error;
    }
    return 0;
}

EXPORTED int setrlimit(__rlimit_resource_t resource, const struct rlimit *limit) {
    return set_limit(0, (int)resource, limit, NULL);
}

EXPORTED int setrlimit64(__rlimit_resource_t resource, const struct rlimit64 *limit) {
    return set_limit(0, (int)resource, (const struct rlimit *)limit, NULL);
}

EXPORTED int prlimit(pid_t pid, enum __rlimit_resource resource, const struct rlimit *limit, struct rlimit *before) {
    return set_limit(pid, (int)resource, limit, before);
}

EXPORTED int prlimit64(pid_t pid, enum __rlimit_resource resource, const struct rlimit64 *limit,
                       struct rlimit64 *before) {
    return set_limit(pid, (int)resource, (const struct rlimit *)limit, (struct rlimit *)before);
}
