// What `edm dump` needs of the kernel: who captured a program, which of its pages are there, its threads stopped.
// Source: ptrace(2), proc_pid_maps(5), Documentation/admin-guide/mm/pagemap.rst.
#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ptrace.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "edm_abi.h"
#include "pagemap_abi.h"
#include "sidecar.h"

#define PAGE 4096ul
#define ENTRIES 512

static int open_proc(int32_t pid, const char *name) {
    char path[48];
    snprintf(path, sizeof path, "/proc/%d/%s", pid, name);
    return open(path, O_RDONLY | O_CLOEXEC);
}

// Where the control page is mapped; 0: nowhere, or -1 with errno set.
static int64_t ctl_address(int32_t pid) {
    int fd = open_proc(pid, "maps");
    FILE *maps = fd < 0 ? NULL : fdopen(fd, "r");
    if (!maps) {
        errno = errno == ENOENT ? ESRCH : errno;
        return -1;
    }
    char *line = NULL;
    size_t size = 0;
    unsigned long at = 0;
    while (!at && getline(&line, &size, maps) > 0)
        if (!strstr(line, " /memfd:edm-ctl") || sscanf(line, "%lx-", &at) != 1)
            at = 0;
    free(line);
    bool failed = ferror(maps);
    int error = errno;
    fclose(maps);
    errno = error;
    return failed ? -1 : (int64_t)at;
}

int edm_capture_of(int32_t pid, struct edm_capture *out) {
    int64_t at = ctl_address(pid);
    if (at <= 0)
        return at < 0 ? -errno : -ENOENT;
    int fd = open_proc(pid, "mem");
    if (fd < 0)
        return -errno;
    struct edm_ctl c;
    ssize_t n = pread(fd, &c, sizeof c, (off_t)at);
    int error = n < 0 ? errno : 0;
    close(fd);
    if (n != (ssize_t)sizeof c || c.magic != EDM_CTL_MAGIC)
        return error ? -error : -ENOENT;
    *out = (struct edm_capture){.handler_pid = c.handler_pid,
                                .sidecar_pid = c.sidecar_pid,
                                .staging = c.staging,
                                .staging_bytes = EDM_STAGING_PAGES * PAGE};
    memcpy(out->sock, c.sock, sizeof out->sock);
    out->sock[sizeof out->sock - 1] = 0;
    return 0;
}

// Linux before 6.7: look at every page's entry.
static int present_by_pread(int fd, uint64_t first, uint64_t last, uint64_t *out, int max, uint64_t *walked) {
    uint64_t map[ENTRIES];
    int n = 0;
    for (uint64_t at = first; at < last;) {
        uint64_t want = last - at < ENTRIES ? last - at : ENTRIES;
        ssize_t r = pread(fd, map, want * sizeof map[0], (off_t)(at * sizeof map[0]));
        if (r <= 0)
            return r < 0 ? -errno : n;
        for (ssize_t i = 0; i < r / (ssize_t)sizeof map[0]; i++, at++, *walked = at) {
            if (!(map[i] >> 62))  // bit 63: present, bit 62: swapped
                continue;
            if (n && out[2 * n - 1] == at) {
                out[2 * n - 1]++;
                continue;
            }
            if (n == max)
                return n;
            out[2 * n] = at;
            out[2 * n + 1] = at + 1;
            n++;
        }
    }
    return n;
}

int edm_present(int pagemap_fd, uint64_t first, uint64_t last, uint64_t *out, int max, uint64_t *walked) {
    struct page_region found[ENTRIES];
    struct pm_scan_arg arg = {.size = sizeof arg,
                              .start = first * PAGE,
                              .end = last * PAGE,
                              .vec = (uint64_t)(uintptr_t)found,
                              .vec_len = max < ENTRIES ? (uint64_t)max : ENTRIES,
                              .category_anyof_mask = PAGE_IS_PRESENT | PAGE_IS_SWAPPED,
                              .return_mask = PAGE_IS_PRESENT | PAGE_IS_SWAPPED};
    *walked = first;
    long n = ioctl(pagemap_fd, PAGEMAP_SCAN, &arg);
    if (n < 0)
        return errno == ENOTTY ? present_by_pread(pagemap_fd, first, last, out, max, walked) : -errno;
    for (long i = 0; i < n; i++) {
        out[2 * i] = found[i].start / PAGE;
        out[2 * i + 1] = found[i].end / PAGE;
    }
    *walked = arg.walk_end / PAGE;
    return (int)n;
}

static void pause_ms(void) {
    struct timespec t = {0, 1000000};
    nanosleep(&t, NULL);
}

int edm_thread_stop(int32_t tid, int timeout_ms) {
    if (ptrace(PTRACE_SEIZE, tid, 0, 0))
        return -errno;
    if (ptrace(PTRACE_INTERRUPT, tid, 0, 0))
        return -errno;
    for (int ms = 0; ms <= timeout_ms; ms++) {
        int status;
        pid_t r = waitpid(tid, &status, __WALL | WNOHANG);
        if (r < 0 && errno != EINTR)
            return -errno;
        if (r == tid && WIFSTOPPED(status))
            return status >> 16 ? 0 : WSTOPSIG(status);  // an event of ours, or a signal on its way to the program
        if (r == tid)
            return -ESRCH;
        if (ms > 2)
            pause_ms();
        else
            sched_yield();
    }
    return -ETIMEDOUT;  // left to be let go by our end: a thread that does not stand still cannot be detached from
}

int edm_thread_registers(int32_t tid, uint32_t note, void *out, uint64_t size) {
    struct iovec v = {out, size};
    if (ptrace(PTRACE_GETREGSET, tid, (void *)(uintptr_t)note, &v))
        return -errno;
    return (int)v.iov_len;
}

int edm_thread_let_go(int32_t tid, int sig) {
    return ptrace(PTRACE_DETACH, tid, 0, (void *)(intptr_t)sig) ? -errno : 0;
}
