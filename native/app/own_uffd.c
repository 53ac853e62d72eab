// ioctl as the program calls it. One userfaultfd can have a page, and EDM's may have it already: then the DM-Handler is
// asked for it (foreign.c), and keeps off until the call has been made. The kernel decides, as ever.
#include "own_uffd.h"

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <dlfcn.h>
#include <errno.h>
#include <stdarg.h>
#include <stdbool.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <time.h>

#include "../uffd_abi.h"
#include "calls.h"
#include "own.h"
#include "own_ranges.h"
#include "talk.h"

#define TRIES 20        // while it is not given
#define LOST_TRIES 500  // … and while there is no DM-Handler
#define EXPORTED __attribute__((visibility("default")))

typedef int control_call(int, unsigned long, ...);

typedef int unmap_call(void *, size_t);

static struct edm_ctl *control;
static control_call *real;
static unmap_call *real_munmap;
static bool opened;  // a userfaultfd, by this program or one that it was forked from

void own_uffd_find(void) {
    void *found = dlsym(RTLD_NEXT, "ioctl");
    memcpy(&real, &found, sizeof real);
    found = dlsym(RTLD_NEXT, "munmap");
    memcpy(&real_munmap, &found, sizeof real_munmap);
}

void own_uffd_begin(struct edm_ctl *c) { c->own_uffd = opened; }

void own_uffd_to(struct edm_ctl *c) { __atomic_store_n(&control, c, __ATOMIC_RELEASE); }

static int call(int fd, unsigned long request, void *argument) {
    if (real)
        return real(fd, request, argument);
    long r = CALL(SYS_ioctl, fd, request, argument);
    if (r < 0)
        errno = (int)-r;
    return r < 0 ? -1 : (int)r;
}

static void pause_ms(long ms) {
    struct timespec t = {0, ms * 1000000};
    CALL(SYS_nanosleep, &t, 0, 0);
}

// From then on pages that it has not touched are left so: a userfaultfd may have to tell of them.
static void note_opened(void) {
    struct edm_ctl *c = __atomic_load_n(&control, __ATOMIC_ACQUIRE);
    opened = true;
    if (c && own_process())
        __atomic_store_n(&c->own_uffd, 1, __ATOMIC_SEQ_CST);
}

static bool may_ask(void) { return __atomic_load_n(&control, __ATOMIC_ACQUIRE) && own_process() && !restricted(); }

// A connection, which is to be closed behind the call; -1: there is nobody to ask. *given: EDM has nothing there.
static int ask(const struct uffdio_range *range, bool missing, bool *given) {
    struct edm_wanted what = {range->start, range->len, missing};
    int32_t status = 0;
    *given = false;
    for (int i = 0; i < LOST_TRIES; i++) {
        int connection = ask_handler(EDM_HELLO_WANTED, &what, sizeof what, &status);
        *given = connection >= 0 && !status;
        if (connection >= 0)
            return connection;
        pause_ms(10);
    }
    return -1;
}

// The call again, or for the first time, with nothing of EDM's in the range if *given.
static int call_alone(int fd, unsigned long request, void *argument, const struct uffdio_range *range, bool missing,
                      bool *given) {
    struct edm_hello over = {.magic = EDM_CTL_MAGIC, .kind = EDM_HELLO_WANTED};
    int connection = ask(range, missing, given), result = call(fd, request, argument), error = errno;
    if (connection >= 0) {
        send_message(connection, &over, sizeof over, NULL, 0);  // a child that was forked meanwhile has a copy of it
        close_fd(connection);
    }
    errno = error;
    return result;
}

// … as often as it is refused with `error`, which EDM may be the reason of.
static int call_until(int error, int fd, unsigned long request, void *argument, const struct uffdio_range *range,
                      bool missing) {
    int before = errno, result = -1;
    bool given = false;
    for (int i = 0; i < TRIES && !given && result == -1 && (!i || errno == error); i++) {
        if (i)
            pause_ms(2);
        errno = before;
        result = call_alone(fd, request, argument, range, missing, &given);
    }
    return result;
}

static void note_registered(int fd, const struct uffdio_range *r) { own_range_add(fd, r->start, r->start + r->len); }

static int register_memory(int fd, struct uffdio_register *r) {
    int before = errno, result = call(fd, UFFDIO_REGISTER, r);
    if (result == -1 && errno == EBUSY && may_ask()) {
        errno = before;
        result = call_until(EBUSY, fd, UFFDIO_REGISTER, r, &r->range, r->mode & UFFDIO_REGISTER_MODE_MISSING);
    }
    if (result != -1)
        note_registered(fd, &r->range);
    return result;
}

// As the kernel would read it: where it is not what the call takes, the kernel is to say so.
static bool read_argument(const void *argument, void *into, size_t bytes) {
    struct iovec to = {into, bytes}, from = {(void *)(uintptr_t)argument, bytes};
    return CALL6(SYS_process_vm_readv, CALL(SYS_getpid, 0, 0, 0), &to, 1, &from, 1, 0) == (long)bytes;
}

// Before Linux 6.17 it takes away what EDM's has in the range as well, and since then it fails for that. Source:
// mm/userfaultfd.c, userfaultfd_unregister.
static int unregister_memory(int fd, void *argument) {
    struct uffdio_range r;
    if (!may_ask() || !read_argument(argument, &r, sizeof r))
        return call(fd, UFFDIO_UNREGISTER, argument);
    int result = call_until(EINVAL, fd, UFFDIO_UNREGISTER, argument, &r, false);
    if (result != -1)
        own_range_del(r.start, r.start + r.len);
    return result;
}

// What is to be moved may be away: a hole, which is passed over or ends the call.
static int move_memory(int fd, void *argument) {
    struct uffdio_move m;
    if (!may_ask() || !read_argument(argument, &m, sizeof m))
        return call(fd, UFFDIO_MOVE, argument);
    struct uffdio_range from = {m.src, m.len};
    int before = errno;
    bool given;
    if (m.mode & UFFDIO_MOVE_MODE_ALLOW_SRC_HOLES)
        return call_alone(fd, UFFDIO_MOVE, argument, &from, true, &given);
    int result = call(fd, UFFDIO_MOVE, argument);
    if (result == -1 && errno == ENOENT) {
        errno = before;
        result = call_alone(fd, UFFDIO_MOVE, argument, &from, true, &given);
    }
    return result;
}

// Something is to be put to a range, which the kernel allows where any userfaultfd has it, EDM's as well. Where none of
// the program's seems to have it, the kernel is asked while EDM's does not. All of these begin with the address.
static int put_to(int fd, unsigned long request, void *argument) {
    if (!own_range_file(fd))
        return call(fd, request, argument);
    struct uffdio_range to = *(const struct uffdio_range *)argument;
    bool given;
    if (request == UFFDIO_COPY)
        to.len = ((const struct uffdio_copy *)argument)->len;
    if (!own_range_lacks(to.start, to.start + to.len) || !may_ask())
        return call(fd, request, argument);
    int result = call_alone(fd, request, argument, &to, false, &given);
    if (result != -1)
        note_registered(fd, &to);
    return result;
}

EXPORTED int ioctl(int fd, unsigned long request, ...) {
    va_list more;
    va_start(more, request);
    void *argument = va_arg(more, void *);
    va_end(more);
    switch ((unsigned)request) {  // of which the kernel sees no more; musl's takes an int
    case UFFDIO_REGISTER:
        return register_memory(fd, argument);
    case UFFDIO_UNREGISTER:
        return unregister_memory(fd, argument);
    case UFFDIO_MOVE:
        return move_memory(fd, argument);
    case UFFDIO_COPY:
    case UFFDIO_ZEROPAGE:
    case UFFDIO_WRITEPROTECT:
    case UFFDIO_POISON:
        return put_to(fd, (unsigned)request, argument);
    case UFFDIO_API:
        own_range_new(fd);
        note_opened();
        return call(fd, request, argument);
    default:
        return call(fd, request, argument);
    }
}

EXPORTED int munmap(void *at, size_t bytes) {
    long r = real_munmap ? real_munmap(at, bytes) : CALL(SYS_munmap, at, bytes, 0);
    if (!r)
        own_range_del((uint64_t)at, (uint64_t)at + bytes);
    else if (!real_munmap)
        errno = (int)-r;
    return r ? -1 : 0;
}
