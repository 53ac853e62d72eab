// madvise and posix_madvise as the program calls them. The kernel decides, as ever; what it accepted and EDM can follow
// is noted in the control page, where the DM-Handler looks with the next fault or sweep. A note may be lost: it is a
// hint.
#include "hints.h"

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <errno.h>
#include <stdbool.h>
#include <stddef.h>
#include <sys/mman.h>
#include <sys/syscall.h>

#include "calls.h"

#ifndef MADV_COLD
#define MADV_COLD 20
#define MADV_PAGEOUT 21
#endif
#define EXPORTED __attribute__((visibility("default")))

static struct edm_ctl *control;
static long control_pid;  // a forked child has no control page until it comes to have its own

void hints_to(struct edm_ctl *c) {
    control_pid = CALL(SYS_getpid, 0, 0, 0);
    __atomic_store_n(&control, c, __ATOMIC_RELEASE);
}

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

static void note(uint64_t address, size_t bytes, int advice) {
    struct edm_ctl *c = __atomic_load_n(&control, __ATOMIC_ACQUIRE);
    if (!c || !bytes || CALL(SYS_getpid, 0, 0, 0) != control_pid)
        return;
    uint32_t at = __atomic_fetch_add(&c->hint_next, 1, __ATOMIC_ACQ_REL);
    struct edm_hint *h = &c->hint[at % EDM_HINTS];
    __atomic_store_n(&h->number, 0, __ATOMIC_RELEASE);
    h->address = address;
    h->bytes = bytes;
    h->advice = advice;
    __atomic_store_n(&h->number, at + 1, __ATOMIC_RELEASE);
}

static int advise(void *address, size_t bytes, int advice) {
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
