// libedm_debugger.so: what `edm debug` puts into a debugger (LD_PRELOAD). The kernel answers a debugger's access to an
// evicted page with EIO and raises no fault for it, so a failed access to a captured program's memory is made again
// after its DM-Handler has brought the pages (native/asking.c). Nothing else is changed.
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <dlfcn.h>
#include <errno.h>
#include <pthread.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ptrace.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#include "../edm_abi.h"
#include "../sidecar.h"

#define PAGE 4096ul
#define MOST_PAGES 64u
#define WAIT_MS 10000

static pthread_mutex_t mu = PTHREAD_MUTEX_INITIALIZER;
static int32_t asked_pid;  // whose DM-Handler `line` leads to
static int line = -1;

static void hang_up(void) {
    if (line >= 0)
        close(line);
    line = -1;
    asked_pid = 0;
}

static bool connected(int32_t pid) {
    if (line >= 0 && asked_pid == pid)
        return true;
    hang_up();
    struct edm_capture c;
    if (edm_capture_of(pid, &c))
        return false;
    struct sockaddr_un a = {.sun_family = AF_UNIX};
    memcpy(a.sun_path, c.sock, sizeof a.sun_path);
    struct edm_reply greeting;
    struct edm_hello hello = {.magic = EDM_CTL_MAGIC, .kind = EDM_HELLO_ASK};
    struct timeval patience = {1, 0};
    line = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
    if (line < 0 || setsockopt(line, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof patience) ||
        connect(line, (struct sockaddr *)&a, sizeof a) ||
        recv(line, &greeting, sizeof greeting, 0) != (ssize_t)sizeof greeting ||
        send(line, &hello, sizeof hello, MSG_NOSIGNAL) != (ssize_t)sizeof hello) {
        hang_up();
        return false;
    }
    asked_pid = pid;
    return true;
}

// Whether any of the pages is on its way now; a DM-Handler that does not answer is asked anew the next time.
static bool bring(int32_t pid, uint64_t first, uint32_t count, bool write) {
    struct edm_ask ask = {EDM_CTL_MAGIC, write ? EDM_ASK_BRING_WRITABLE : EDM_ASK_BRING, pid, count, first};
    struct edm_answer answer;
    if (!connected(pid))
        return false;
    if (send(line, &ask, sizeof ask, MSG_NOSIGNAL) != (ssize_t)sizeof ask ||
        recv(line, &answer, sizeof answer, 0) != (ssize_t)sizeof answer) {
        hang_up();
        return true;
    }
    for (uint32_t i = 0; i < EDM_ASK_PAGES / 64 && !answer.status; i++)
        if (answer.pages[i])
            return true;
    return false;
}

// The process whose memory a descriptor is, or 0.
static int32_t memory_of(int fd) {
    char path[32], target[64];
    snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
    ssize_t n = readlink(path, target, sizeof target - 1);
    int pid = 0, end = 0;
    if (n <= 0)
        return 0;
    target[n] = 0;
    if (sscanf(target, "/proc/%d/mem%n", &pid, &end) == 1 && end == n)
        return pid;
    end = 0;
    if (sscanf(target, "/proc/%d/task/%*d/mem%n", &pid, &end) == 1 && end == n)
        return pid;
    return 0;
}

// After a failed access of `bytes` at `at`: whether it is worth making it again. `tries` counts them.
static bool again(int32_t pid, uint64_t at, size_t bytes, bool write, int *tries) {
    uint64_t first = at / PAGE, count = (at + (bytes ? bytes : 1) - 1) / PAGE - first + 1;
    if (!pid || *tries >= WAIT_MS)
        return false;
    pthread_mutex_lock(&mu);
    bool coming = bring(pid, first, (uint32_t)(count < MOST_PAGES ? count : MOST_PAGES), write);
    pthread_mutex_unlock(&mu);
    if (!coming && *tries)  // it came between the access and the question
        *tries = WAIT_MS - 1;
    if (!coming && !*tries)
        return false;
    struct timespec t = {0, *tries < 20 ? 50000 : 1000000};
    nanosleep(&t, NULL);
    ++*tries;
    return true;
}

#define REAL(name)                 \
    static __typeof__(&name) real; \
    if (!real)                     \
    real = (__typeof__(&name))(uintptr_t)dlsym(RTLD_NEXT, #name)

#define ACCESS(name, constant, write)                                                                          \
    __attribute__((visibility("default"))) ssize_t name(int fd, constant void *data, size_t bytes, off_t at) { \
        REAL(name);                                                                                            \
        ssize_t n = real(fd, data, bytes, at);                                                                 \
        if (n >= 0 || errno != EIO)                                                                            \
            return n;                                                                                          \
        int32_t pid = memory_of(fd);                                                                           \
        for (int tries = 0; n < 0 && again(pid, (uint64_t)at, bytes, write, &tries);)                          \
            n = real(fd, data, bytes, at);                                                                     \
        if (n < 0)                                                                                             \
            errno = EIO;                                                                                       \
        return n;                                                                                              \
    }

ACCESS(pread, , false)
ACCESS(pread64, , false)
ACCESS(pwrite, const, true)
ACCESS(pwrite64, const, true)
