// pthread_create as the program calls it. Where the C library has struct pthread, at the top of the thread's stack, the
// kernel writes when the thread exits, and waits for no page then: the DM-Handler is told which pages those are. It
// looks for itself too, but a thread may come and go between two looks. A stack of the program's own, in memory that
// may be on its way out, is told before the thread is made. So is a robust mutex before it is initialized: the kernel
// writes to one when a thread exits that holds it. And a buffer before it is given to a pipe, which has a reference to
// its pages from then on: what is written to them later is to be read from the pipe.
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include "stacks.h"

#include <dlfcn.h>
#include <errno.h>
#include <pthread.h>
#include <stdbool.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/uio.h>

#include "calls.h"
#include "hints.h"
#include "own.h"

#define PAGE 4096ul
#define TOP (2 * PAGE)
#define MOST_PIECES 1024   // the kernel's IOV_MAX
#define WAIT_TURNS 100000  // of a move that takes microseconds: its sidecar may have died

#define EXPORTED __attribute__((visibility("default")))

typedef int create(pthread_t *, const pthread_attr_t *, void *(*)(void *), void *);
typedef int initialize(pthread_mutex_t *, const pthread_mutexattr_t *);
typedef ssize_t give(int, const struct iovec *, size_t, unsigned);

static struct edm_ctl *control;

void stacks_to(struct edm_ctl *c) { __atomic_store_n(&control, c, __ATOMIC_RELEASE); }

static struct edm_ctl *mine(void) {
    struct edm_ctl *c = __atomic_load_n(&control, __ATOMIC_ACQUIRE);
    return c && own_process() ? c : NULL;
}

static void tell(struct edm_ctl *c, uint64_t address) {
    uint32_t at = __atomic_fetch_add(&c->stack_next, 1, __ATOMIC_ACQ_REL);
    __atomic_store_n(&c->stack[at % EDM_STACKS], EDM_STACK_NOTE(address / PAGE * PAGE, at), __ATOMIC_SEQ_CST);
}

// A move that began before sees nothing of what was told; one that begins later does.
static void wait_for_move(struct edm_ctl *c) {
    __atomic_fetch_add(&c->stacks_told, 1, __ATOMIC_SEQ_CST);
    for (int i = 0; i < WAIT_TURNS && __atomic_load_n(&c->lock, __ATOMIC_SEQ_CST) == EDM_LOCK_SIDECAR; i++)
        if (i > 100)
            CALL(SYS_sched_yield, 0, 0, 0);
}

// The end of the program's own stack; 0: the C library is to make one.
static uint64_t own_stack_end(const pthread_attr_t *attr) {
    void *address;
    size_t bytes;
    if (!attr || pthread_attr_getstack(attr, &address, &bytes))
        return 0;
    return (uint64_t)address + bytes;
}

// The C library's own; false: it has none.
static bool next_of(void *function, const char *name) {
    void *found = dlsym(RTLD_NEXT, name);
    memcpy(function, &found, sizeof found);
    return found;
}

EXPORTED int pthread_create(pthread_t *thread, const pthread_attr_t *attr, void *(*run)(void *), void *argument) {
    static create *real;
    if (!real && !next_of(&real, "pthread_create"))
        return ENOSYS;
    struct edm_ctl *c = mine();
    uint64_t end = c ? own_stack_end(attr) : 0;
    for (uint64_t at = TOP; end && at; at -= PAGE)
        tell(c, end - at);
    if (end)
        wait_for_move(c);
    int error = real(thread, attr, run, argument);
    if (c && !end && !error)
        tell(c, (uint64_t)*thread);  // which is the address of struct pthread, with glibc as with musl
    return error;
}

EXPORTED int pthread_mutex_init(pthread_mutex_t *mutex, const pthread_mutexattr_t *attr) {
    static initialize *real;
    int robust = PTHREAD_MUTEX_STALLED;
    if (!real && !next_of(&real, "pthread_mutex_init"))
        return ENOSYS;
    struct edm_ctl *c = attr && !pthread_mutexattr_getrobust(attr, &robust) && robust ? mine() : NULL;
    if (c) {
        tell(c, (uint64_t)mutex);
        tell(c, (uint64_t)mutex + sizeof *mutex - 1);
        wait_for_move(c);
    }
    return real(mutex, attr);
}

// Whether it was told lately, and will not be forgotten soon: buffers are given again and again.
static bool given_lately(const struct edm_ctl *c, const struct iovec *piece) {
    uint32_t next = __atomic_load_n(&c->given_next, __ATOMIC_ACQUIRE);
    uint32_t kept = __atomic_load_n(&c->given_kept, __ATOMIC_ACQUIRE);
    for (uint32_t i = 1; i <= kept / 2 && i <= next; i++) {
        const struct edm_hint *h = &c->given[(next - i) % EDM_GIVEN];
        if (__atomic_load_n(&h->number, __ATOMIC_ACQUIRE) == next - i + 1 && h->address == (uint64_t)piece->iov_base &&
            h->bytes == piece->iov_len)
            return true;
    }
    return false;
}

EXPORTED ssize_t vmsplice(int fd, const struct iovec *piece, size_t count, unsigned flags) {
    static give *real;
    if (!real && !next_of(&real, "vmsplice"))
        return errno = ENOSYS, -1;
    struct edm_ctl *c = piece && count <= MOST_PIECES ? mine() : NULL;
    bool told = false;
    for (size_t i = 0; c && i < count; i++) {
        if (!piece[i].iov_len || given_lately(c, &piece[i]))
            continue;
        hint_write(c->given, EDM_GIVEN, &c->given_next,
                   (struct edm_hint){(uint64_t)piece[i].iov_base, piece[i].iov_len, 0, 0});
        told = true;
    }
    if (told)
        wait_for_move(c);
    return real(fd, piece, count, flags);
}
