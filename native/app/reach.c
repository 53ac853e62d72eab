// The calls that read or write memory by /proc/PID/mem or ptrace. The kernel raises no fault for them: EIO where a page
// is away, or less than was asked for. They are made again when its DM-Handler has brought the page (native/asking.c).
// What fails otherwise fails as ever. All other files pay for a comparison.
//
// Called from signal handlers, too: only system calls.
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include "reach.h"

#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/magic.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <string.h>
#include <sys/ptrace.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <sys/vfs.h>
#include <time.h>

#include "calls.h"

#define PAGE 4096ul
#define MOST_PAGES 64u
#define MOST_BYTES 0x7ffff000ul  // of one call; the kernel's MAX_RW_COUNT
#define MISSES 3                 // in a row: a page may come, or go, between the access and the question
#define WAIT_TURNS 10000
#define QUICK_TURNS 20
#define EARLY_FILES 10  // that a shell could have opened for a program
#define NOBODY INT32_MIN
#define EXPORTED __attribute__((visibility("default")))

static bool memory_open;  // some process's, by this program or one that it was forked from

// ---- which file is whose memory -----------------------------------------------------------------------------------

// "…/NUMBER" before `end`; NULL: it is something else.
static const char *number_before(const char *start, const char *end, int32_t *number) {
    int32_t n = 0, digit = 1;
    const char *at = end;
    for (; at > start && at[-1] >= '0' && at[-1] <= '9'; at--, digit *= 10)
        n += (at[-1] - '0') * digit;
    *number = n;
    return at < end && at > start && at[-1] == '/' ? at - 1 : NULL;
}

static bool ends_with(const char *start, const char *end, const char *what) {
    size_t n = strlen(what);
    return (size_t)(end - start) >= n && !memcmp(end - n, what, n);
}

static const char *link_of(const char *path, char *into, size_t room) {
    long n = CALL6(SYS_readlinkat, AT_FDCWD, path, into, room, 0, 0);
    return n > 0 && n < (long)room ? into + n : NULL;
}

// The process whose memory an open file is, REACH_SELF or NOBODY. "/proc/PID/mem", or "/proc/PID/task/TID/mem".
static int32_t memory_of(int fd) {
    char path[40] = "/proc/thread-self/fd/", target[256], own[24];
    int32_t pid, me, digits = 0, at = 21;
    struct statfs s;
    if (fd < 0 || CALL(SYS_fstatfs, fd, &s, 0) || s.f_type != PROC_SUPER_MAGIC)
        return NOBODY;
    for (int rest = fd; rest || !digits; rest /= 10)
        digits++;
    for (int i = digits, rest = fd; i--; rest /= 10)
        path[at + i] = (char)('0' + rest % 10);
    path[at + digits] = 0;
    const char *end = link_of(path, target, sizeof target), *before;
    if (!end || !ends_with(target, end, "/mem") || !(before = number_before(target, end - 4, &pid)))
        return NOBODY;
    if (ends_with(target, before, "/task") && !number_before(target, before - 5, &pid))
        return NOBODY;
    own[0] = '/';
    end = link_of("/proc/self", own + 1, sizeof own - 1);
    if (!end || !number_before(own, end, &me))
        return NOBODY;
    return me == pid ? REACH_SELF : me == CALL(SYS_getpid, 0, 0, 0) ? pid : -pid;
}

static void note_opened(int fd, const char *path) {
    int error = errno;
    const char *name = fd < 0 ? NULL : strrchr(path, '/');
    name = name ? name + 1 : path;
    if (fd >= 0 && !strcmp(name, "mem") && memory_of(fd) != NOBODY)
        __atomic_store_n(&memory_open, true, __ATOMIC_RELAXED);
    errno = error;
}

// ---- reading and writing it -----------------------------------------------------------------------------------------

enum how { WRITE = 1, PLACED = 2 };

struct access {
    int fd;
    const struct iovec *piece;
    int pieces;
    bool write, placed;
    off_t at;  // if placed
};

struct turns {
    int all, misses;
};

// After an access to `bytes` at `at` that failed: whether it is to be made again.
static bool again(int32_t pid, uint64_t at, size_t bytes, bool write, struct turns *t) {
    uint64_t first = at / PAGE, count = (at + (bytes ? bytes : 1) - 1) / PAGE - first + 1;
    if (t->all++ == WAIT_TURNS)
        return false;
    if (!reach_bring(pid, first, (uint32_t)(count < MOST_PAGES ? count : MOST_PAGES), write))
        return ++t->misses < MISSES;
    t->misses = 0;
    struct timespec pause = {0, t->all < QUICK_TURNS ? 50000 : 1000000};
    CALL(SYS_nanosleep, &pause, 0, 0);
    return true;
}

static long one_call(const struct access *a, int32_t pid, char *data, size_t bytes, uint64_t at) {
    long r;
    bool ours = a->write && pid == REACH_SELF;
    if (ours)
        reach_hold();
    if (a->placed)
        r = CALL6(a->write ? SYS_pwrite64 : SYS_pread64, a->fd, data, bytes, at, 0, 0);
    else
        r = CALL(a->write ? SYS_write : SYS_read, a->fd, data, bytes);
    if (ours)
        reach_let_go();
    return r;
}

// The rest of an access of which `done` bytes have been made, or -1 where it failed: as the kernel does it where
// nothing is away.
static ssize_t go_on(const struct access *a, int32_t pid, ssize_t done) {
    uint64_t at = (uint64_t)(a->placed ? a->at : CALL(SYS_lseek, a->fd, 0, SEEK_CUR));
    size_t all = 0, skip = done > 0 ? (size_t)done : 0;
    if (a->placed)
        at += skip;
    struct turns t = {0, 0};
    for (int i = 0; i < a->pieces && all < MOST_BYTES; i++) {
        size_t length = a->piece[i].iov_len < MOST_BYTES - all ? a->piece[i].iov_len : MOST_BYTES - all;
        for (size_t in = skip < length ? skip : length; in < length;) {
            long n = one_call(a, pid, (char *)a->piece[i].iov_base + in, length - in, at);
            if (n == -EIO && again(pid, at, length - in, a->write, &t))
                continue;
            if (n <= 0 && all + in)
                return (ssize_t)(all + in);
            if (n <= 0) {
                errno = n ? (int)-n : errno;
                return n ? -1 : 0;
            }
            t = (struct turns){0, 0};
            in += (size_t)n;
            at += (uint64_t)n;
        }
        skip -= skip < length ? skip : length;
        all += length;
    }
    return (ssize_t)all;
}

static bool some_open(void) { return __builtin_expect(__atomic_load_n(&memory_open, __ATOMIC_RELAXED), false); }

static size_t bytes_of(const struct access *a) {
    size_t all = 0;
    for (int i = 0; i < a->pieces; i++)
        all += a->piece[i].iov_len;
    return all;
}

// A call came back with `n`. Out of line, as what follows, so that other files do not pay for what it takes.
static __attribute__((noinline)) ssize_t look_at(const struct access *a, ssize_t n) {
    int error = errno;
    int32_t pid = n < 0 || (size_t)n < bytes_of(a) ? memory_of(a->fd) : NOBODY;
    errno = error;
    if (pid == NOBODY)
        return n;
    __atomic_store_n(&memory_open, true, __ATOMIC_RELAXED);
    n = go_on(a, pid, n);
    if (n >= 0)
        errno = error;
    return n;
}

static __attribute__((noinline)) ssize_t pieces_after(ssize_t n, int fd, const struct iovec *piece, int pieces, int how,
                                                      off_t at) {
    return look_at(&(struct access){fd, piece, pieces, how & WRITE, how & PLACED, at}, n);
}

static __attribute__((noinline)) ssize_t bytes_after(ssize_t n, int fd, const void *data, size_t bytes, int how,
                                                     off_t at) {
    return pieces_after(n, fd, &(struct iovec){(void *)(uintptr_t)data, bytes}, 1, how, at);
}

// A write is not begun while a page that it goes to may be on its way out.
static __attribute__((noinline)) bool is_own(int fd) {
    int error = errno;
    bool is = memory_of(fd) == REACH_SELF;
    errno = error;
    return is;
}

static ssize_t done_or_errno(long r) {
    if (r < 0)
        errno = (int)-r;
    return r < 0 ? -1 : r;
}

// `call` as the program made it, or `raw` before the C library's has been found; `after` with what it was made with.
#define ACCESS(real, call, raw, after, fd, of, size, how, at)                                 \
    do {                                                                                      \
        if ((how) & WRITE && some_open() && is_own(fd))                                       \
            return errno = EIO, after(-1, fd, of, size, how, at);                             \
        ssize_t n = __builtin_expect((real) != NULL, true) ? (real)call : done_or_errno(raw); \
        bool look = n < 0 ? errno == EIO : some_open();                                       \
        return __builtin_expect(look, false) ? after(n, fd, of, size, how, at) : n;           \
    } while (0)

// ---- the C library's calls, under all their names -------------------------------------------------------------------

#define STREAM(name, constant, how, number)                                                                          \
    static ssize_t (*real_##name)(int, constant void *, size_t);                                                     \
    EXPORTED ssize_t name(int fd, constant void *data, size_t bytes) {                                               \
        ACCESS(real_##name, (fd, data, bytes), CALL(number, fd, data, bytes), bytes_after, fd, data, bytes, how, 0); \
    }

#define AT(name, constant, how, number)                                                                             \
    static ssize_t (*real_##name)(int, constant void *, size_t, off_t);                                             \
    EXPORTED ssize_t name(int fd, constant void *data, size_t bytes, off_t at) {                                    \
        ACCESS(real_##name, (fd, data, bytes, at), CALL6(number, fd, data, bytes, at, 0, 0), bytes_after, fd, data, \
               bytes, (how) | PLACED, at);                                                                          \
    }

#define PIECES(name, how, number)                                                                                  \
    static ssize_t (*real_##name)(int, const struct iovec *, int);                                                 \
    EXPORTED ssize_t name(int fd, const struct iovec *piece, int pieces) {                                         \
        ACCESS(real_##name, (fd, piece, pieces), CALL(number, fd, piece, pieces), pieces_after, fd, piece, pieces, \
               how, 0);                                                                                            \
    }

#define PIECES_AT(name, how, number)                                                                               \
    static ssize_t (*real_##name)(int, const struct iovec *, int, off_t);                                          \
    EXPORTED ssize_t name(int fd, const struct iovec *piece, int pieces, off_t at) {                               \
        ACCESS(real_##name, (fd, piece, pieces, at), CALL6(number, fd, piece, pieces, at, 0, 0), pieces_after, fd, \
               piece, pieces, (how) | PLACED, at);                                                                 \
    }

STREAM(read, , 0, SYS_read)
STREAM(write, const, WRITE, SYS_write)
AT(pread, , 0, SYS_pread64)
AT(pread64, , 0, SYS_pread64)
AT(pwrite, const, WRITE, SYS_pwrite64)
AT(pwrite64, const, WRITE, SYS_pwrite64)
PIECES(readv, 0, SYS_readv)
PIECES(writev, WRITE, SYS_writev)
PIECES_AT(preadv, 0, SYS_preadv)
PIECES_AT(preadv64, 0, SYS_preadv)
PIECES_AT(pwritev, WRITE, SYS_pwritev)
PIECES_AT(pwritev64, WRITE, SYS_pwritev)

// As programs call them that were compiled with _FORTIFY_SOURCE; only glibc has them.
ssize_t __read_chk(int fd, void *data, size_t bytes, size_t room);
ssize_t __pread_chk(int fd, void *data, size_t bytes, off_t at, size_t room);
ssize_t __pread64_chk(int fd, void *data, size_t bytes, off_t at, size_t room);
static ssize_t (*real___read_chk)(int, void *, size_t, size_t);
static ssize_t (*real___pread_chk)(int, void *, size_t, off_t, size_t);
static ssize_t (*real___pread64_chk)(int, void *, size_t, off_t, size_t);

EXPORTED ssize_t __read_chk(int fd, void *data, size_t bytes, size_t room) {
    ACCESS(real___read_chk, (fd, data, bytes, room), CALL(SYS_read, fd, data, bytes), bytes_after, fd, data, bytes, 0,
           0);
}

EXPORTED ssize_t __pread_chk(int fd, void *data, size_t bytes, off_t at, size_t room) {
    ACCESS(real___pread_chk, (fd, data, bytes, at, room), CALL6(SYS_pread64, fd, data, bytes, at, 0, 0), bytes_after,
           fd, data, bytes, PLACED, at);
}

EXPORTED ssize_t __pread64_chk(int fd, void *data, size_t bytes, off_t at, size_t room) {
    ACCESS(real___pread64_chk, (fd, data, bytes, at, room), CALL6(SYS_pread64, fd, data, bytes, at, 0, 0), bytes_after,
           fd, data, bytes, PLACED, at);
}

// ---- opening, to know of one from which less comes than was asked for -----------------------------------------------

#define OPEN(name)                                                                                       \
    static int (*real_##name)(const char *, int, ...);                                                   \
    EXPORTED int name(const char *path, int flags, ...) {                                                \
        va_list more;                                                                                    \
        va_start(more, flags);                                                                           \
        mode_t mode = va_arg(more, mode_t);                                                              \
        va_end(more);                                                                                    \
        int fd = real_##name ? real_##name(path, flags, mode)                                            \
                             : (int)done_or_errno(CALL6(SYS_openat, AT_FDCWD, path, flags, mode, 0, 0)); \
        note_opened(fd, path);                                                                           \
        return fd;                                                                                       \
    }

#define OPEN_AT(name)                                                                              \
    static int (*real_##name)(int, const char *, int, ...);                                        \
    EXPORTED int name(int at, const char *path, int flags, ...) {                                  \
        va_list more;                                                                              \
        va_start(more, flags);                                                                     \
        mode_t mode = va_arg(more, mode_t);                                                        \
        va_end(more);                                                                              \
        int fd = real_##name ? real_##name(at, path, flags, mode)                                  \
                             : (int)done_or_errno(CALL6(SYS_openat, at, path, flags, mode, 0, 0)); \
        note_opened(fd, path);                                                                     \
        return fd;                                                                                 \
    }

OPEN(open)
OPEN(open64)
OPEN_AT(openat)
OPEN_AT(openat64)

int __open_2(const char *path, int flags);
int __open64_2(const char *path, int flags);
EXPORTED int __open_2(const char *path, int flags) { return open(path, flags); }
EXPORTED int __open64_2(const char *path, int flags) { return open64(path, flags); }

// ---- ptrace -------------------------------------------------------------------------------------------------------

static long (*real_ptrace)(int, ...);

EXPORTED long ptrace(enum __ptrace_request request, ...) {
    va_list more;
    va_start(more, request);
    pid_t pid = va_arg(more, pid_t);
    void *at = va_arg(more, void *), *data = va_arg(more, void *);
    va_end(more);
    if (!real_ptrace)
        return errno = ENOSYS, -1;
    bool write = request == PTRACE_POKETEXT || request == PTRACE_POKEDATA;
    bool reaches = write || request == PTRACE_PEEKTEXT || request == PTRACE_PEEKDATA;
    struct turns t = {0, 0};
    for (;;) {
        int before = errno;
        long r = real_ptrace((int)request, pid, at, data);
        if (!reaches || r != -1 || errno != EIO || !again(pid, (uint64_t)at, sizeof r, write, &t))
            return r;
        errno = before;
    }
}

// -----------------------------------------------------------------------------------------------------------------------

#define FIND(name)                                        \
    do {                                                  \
        void *found = dlsym(RTLD_NEXT, #name);            \
        memcpy(&real_##name, &found, sizeof real_##name); \
    } while (0)

void reach_begin(void) {
    FIND(read);
    FIND(write);
    FIND(pread);
    FIND(pread64);
    FIND(pwrite);
    FIND(pwrite64);
    FIND(readv);
    FIND(writev);
    FIND(preadv);
    FIND(preadv64);
    FIND(pwritev);
    FIND(pwritev64);
    FIND(__read_chk);
    FIND(__pread_chk);
    FIND(__pread64_chk);
    FIND(open);
    FIND(open64);
    FIND(openat);
    FIND(openat64);
    FIND(ptrace);
    for (int fd = 0; fd < EARLY_FILES && !memory_open; fd++)
        memory_open = memory_of(fd) != NOBODY;
}
