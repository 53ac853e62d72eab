// Loaded before libc (LD_PRELOAD): one kind of system call on files below a directory fails, from the Nth on or once.
// Python, py-lmdb and EDM's own C code all call through here.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/uio.h>
#include <unistd.h>

enum { WRITE, SYNC, DIRSYNC, OPEN, TRUNCATE, PUNCH, RENAME, UNLINK, READ, KINDS };

static char below[PATH_MAX];
static int armed = -1, error_is, lasts;
static atomic_long left, struck;

// kind -1: nothing fails. error -1: a write or read is cut to half.
void failing_arm(const char *directory, int kind, long at, int error, int lasting) {
    snprintf(below, sizeof below, "%s", directory);
    left = at;
    struck = 0;
    error_is = error;
    lasts = lasting;
    armed = kind;
}

long failing_struck(void) { return struck; }

static int path_is_ours(int dir, const char *path) {
    char name[64], target[PATH_MAX];
    if (path && (path[0] == '/' || dir == AT_FDCWD))
        return !strncmp(path, below, strlen(below));
    snprintf(name, sizeof name, "/proc/self/fd/%d", dir);
    ssize_t n = readlink(name, target, sizeof target - 1);
    if (n < 0)
        return 0;
    target[n] = 0;
    return !strncmp(target, below, strlen(below));
}

// 0; or the errno to fail with; or -1 for a short write or read.
static int strikes(int kind, int dir, const char *path) {
    if (kind != armed || !path_is_ours(dir, path))
        return 0;
    long n = left--;
    if (n > 0 || (n < 0 && !lasts))
        return 0;
    struck++;
    return error_is;
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))
#define FAIL_IF(kind, dir, path)                                                                                       \
    do {                                                                                                               \
        int failed_ = strikes(kind, dir, path);                                                                        \
        if (failed_ > 0) {                                                                                             \
            errno = failed_;                                                                                           \
            return -1;                                                                                                 \
        }                                                                                                              \
    } while (0)

static size_t cut(int how, size_t n) { return how < 0 && n > 1 ? (n > 8192 ? n / 2 / 4096 * 4096 : n / 2) : n; }

ssize_t write(int fd, const void *from, size_t n) {
    int how = strikes(WRITE, fd, NULL);
    if (how > 0)
        return errno = how, -1;
    return REAL(write)(fd, from, cut(how, n));
}

ssize_t pwrite(int fd, const void *from, size_t n, off_t at) {
    int how = strikes(WRITE, fd, NULL);
    if (how > 0)
        return errno = how, -1;
    return REAL(pwrite)(fd, from, cut(how, n), at);
}

ssize_t pwrite64(int fd, const void *from, size_t n, off64_t at) {
    return pwrite(fd, from, n, at);
}

ssize_t writev(int fd, const struct iovec *parts, int n) {
    int how = strikes(WRITE, fd, NULL);
    if (how > 0)
        return errno = how, -1;
    return how < 0 ? REAL(write)(fd, parts[0].iov_base, cut(how, parts[0].iov_len)) : REAL(writev)(fd, parts, n);
}

ssize_t pwritev(int fd, const struct iovec *parts, int n, off_t at) {
    int how = strikes(WRITE, fd, NULL);
    if (how > 0)
        return errno = how, -1;
    return how < 0 ? REAL(pwrite)(fd, parts[0].iov_base, cut(how, parts[0].iov_len), at)
                   : REAL(pwritev)(fd, parts, n, at);
}

ssize_t read(int fd, void *to, size_t n) {
    int how = strikes(READ, fd, NULL);
    if (how > 0)
        return errno = how, -1;
    return REAL(read)(fd, to, cut(how, n));
}

ssize_t pread(int fd, void *to, size_t n, off_t at) {
    int how = strikes(READ, fd, NULL);
    if (how > 0)
        return errno = how, -1;
    return REAL(pread)(fd, to, cut(how, n), at);
}

ssize_t pread64(int fd, void *to, size_t n, off64_t at) { return pread(fd, to, n, at); }

ssize_t preadv(int fd, const struct iovec *parts, int n, off_t at) {
    int how = strikes(READ, fd, NULL);
    if (how > 0)
        return errno = how, -1;
    return how < 0 ? REAL(pread)(fd, parts[0].iov_base, cut(how, parts[0].iov_len), at)
                   : REAL(preadv)(fd, parts, n, at);
}

ssize_t preadv64(int fd, const struct iovec *parts, int n, off64_t at) { return preadv(fd, parts, n, at); }

static int is_directory(int fd) {
    char name[64], target[PATH_MAX];
    snprintf(name, sizeof name, "/proc/self/fd/%d/.", fd);
    return readlink(name, target, sizeof target) < 0 && errno == EINVAL;
}

int fsync(int fd) {
    FAIL_IF(is_directory(fd) ? DIRSYNC : SYNC, fd, NULL);
    return REAL(fsync)(fd);
}

int fdatasync(int fd) {
    FAIL_IF(SYNC, fd, NULL);
    return REAL(fdatasync)(fd);
}

int ftruncate(int fd, off_t bytes) {
    FAIL_IF(TRUNCATE, fd, NULL);
    return REAL(ftruncate)(fd, bytes);
}

// LMDB maps its file for reading and never calls this; were it to, it would be a sync.
int msync(void *at, size_t bytes, int flags) {
    if (armed == SYNC)
        fprintf(stderr, "msync was called\n"), abort();
    return REAL(msync)(at, bytes, flags);
}

int ftruncate64(int fd, off64_t bytes) { return ftruncate(fd, bytes); }

int fallocate(int fd, int mode, off_t at, off_t bytes) {
    FAIL_IF(PUNCH, fd, NULL);
    return REAL(fallocate)(fd, mode, at, bytes);
}

int fallocate64(int fd, int mode, off64_t at, off64_t bytes) { return fallocate(fd, mode, at, bytes); }

int rename(const char *from, const char *to) {
    FAIL_IF(RENAME, AT_FDCWD, to);
    return REAL(rename)(from, to);
}

int renameat(int from_dir, const char *from, int to_dir, const char *to) {
    FAIL_IF(RENAME, to_dir, to);
    return REAL(renameat)(from_dir, from, to_dir, to);
}

int unlink(const char *path) {
    FAIL_IF(UNLINK, AT_FDCWD, path);
    return REAL(unlink)(path);
}

int unlinkat(int dir, const char *path, int flags) {
    FAIL_IF(UNLINK, dir, path);
    return REAL(unlinkat)(dir, path, flags);
}

int rmdir(const char *path) {
    FAIL_IF(UNLINK, AT_FDCWD, path);
    return REAL(rmdir)(path);
}

static int opened(int dir, const char *path, int flags, mode_t mode) {
    FAIL_IF(OPEN, dir, path);
    return REAL(openat)(dir, path, flags, mode);
}

#define MODE_OF(flags)                                                                                                 \
    mode_t mode = 0;                                                                                                   \
    if (flags & (O_CREAT | O_TMPFILE)) {                                                                               \
        va_list arguments;                                                                                             \
        va_start(arguments, flags);                                                                                    \
        mode = va_arg(arguments, mode_t);                                                                              \
        va_end(arguments);                                                                                             \
    }

int open(const char *path, int flags, ...) {
    MODE_OF(flags)
    return opened(AT_FDCWD, path, flags, mode);
}

int open64(const char *path, int flags, ...) {
    MODE_OF(flags)
    return opened(AT_FDCWD, path, flags, mode);
}

int openat(int dir, const char *path, int flags, ...) {
    MODE_OF(flags)
    return opened(dir, path, flags, mode);
}

int openat64(int dir, const char *path, int flags, ...) {
    MODE_OF(flags)
    return opened(dir, path, flags, mode);
}
