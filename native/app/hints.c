// madvise and posix_madvise as the program calls them. The kernel decides, as ever; what it accepted and EDM can follow
// is noted in the control page, where the DM-Handler looks with the next fault or sweep. A note may be lost: it is a
// hint.
#include "hints.h"

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <errno.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>

#include "calls.h"
#include "own.h"

#ifndef MADV_COLD
#define MADV_COLD 20
#define MADV_PAGEOUT 21
#endif
#ifndef MADV_GUARD_INSTALL
#define MADV_GUARD_INSTALL 102
#endif
#ifndef PR_SET_MEMORY_MERGE
#define PR_SET_MEMORY_MERGE 67
#define PR_GET_MEMORY_MERGE 68
#endif
#define EXPORTED __attribute__((visibility("default")))

static struct edm_ctl *control;
static bool merges;  // KSM has been let at memory of this program, or of one that it was forked from

void hints_begin(struct edm_ctl *c) {
    merges = merges || CALL6(SYS_prctl, PR_GET_MEMORY_MERGE, 0, 0, 0, 0, 0) > 0;
    c->merges = merges;
}

// Before the kernel hears of it: from then on a page may lose its write protection without a word.
static void merging(void) {
    struct edm_ctl *c = __atomic_load_n(&control, __ATOMIC_ACQUIRE);
    merges = true;
    if (c && own_process())
        __atomic_store_n(&c->merges, 1, __ATOMIC_SEQ_CST);
}

void hints_to(struct edm_ctl *c) { __atomic_store_n(&control, c, __ATOMIC_RELEASE); }

static bool of_use(int advice) {
    switch (advice) {
    case MADV_NORMAL:
    case MADV_RANDOM:
    case MADV_SEQUENTIAL:
    case MADV_WILLNEED:
    case MADV_COLD:
    case MADV_PAGEOUT:
        return true;
    default:
        return false;
    }
}

void hint_write(struct edm_hint *ring, uint32_t size, uint32_t *next, struct edm_hint what) {
    uint32_t at = __atomic_fetch_add(next, 1, __ATOMIC_ACQ_REL);
    struct edm_hint *h = &ring[at % size];
    __atomic_store_n(&h->number, 0, __ATOMIC_RELEASE);
    h->address = what.address;
    h->bytes = what.bytes;
    h->advice = what.advice;
    __atomic_store_n(&h->number, at + 1, __ATOMIC_RELEASE);
}

static void note(uint64_t address, size_t bytes, int advice) {
    struct edm_ctl *c = __atomic_load_n(&control, __ATOMIC_ACQUIRE);
    if (c && bytes && own_process())
        hint_write(c->hint, EDM_HINTS, &c->hint_next, (struct edm_hint){address, bytes, advice, 0});
}

// What a guard page had is given up with it, but the kernel tells nobody of that: it is dropped before, so that what
// has left is known to be gone. Refused advice must change nothing, hence the empty range.
static void drop_guarded(void *address, size_t bytes) {
    if (!CALL(SYS_madvise, address, 0, MADV_GUARD_INSTALL))
        CALL(SYS_madvise, address, bytes, MADV_DONTNEED);
}

static int advise(void *address, size_t bytes, int advice) {
    if (advice == MADV_GUARD_INSTALL)
        drop_guarded(address, bytes);
    if (advice == MADV_MERGEABLE)
        merging();
    long r = CALL(SYS_madvise, address, bytes, advice);
    if (!r && of_use(advice))
        note((uint64_t)address, bytes, advice);
    return (int)-r;
}

EXPORTED int madvise(void *address, size_t bytes, int advice) {
    int error = advise(address, bytes, advice);
    if (error)
        errno = error;
    return error ? -1 : 0;
}

// Source: posix_madvise(3): the C library does nothing for POSIX_MADV_DONTNEED, which must not lose anything.
EXPORTED int posix_madvise(void *address, size_t bytes, int advice) {
    return advice == POSIX_MADV_DONTNEED ? 0 : advise(address, bytes, advice);
}

EXPORTED int prctl(int option, ...) {
    long a[4];
    va_list more;
    va_start(more, option);
    for (int i = 0; i < 4; i++)
        a[i] = va_arg(more, long);
    va_end(more);
    if (option == PR_SET_MEMORY_MERGE && a[0])
        merging();
    long r = CALL6(SYS_prctl, option, a[0], a[1], a[2], a[3], 0);
    if (r < 0)
        errno = (int)-r;
    return r < 0 ? -1 : (int)r;
}
