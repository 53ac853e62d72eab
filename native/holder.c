// The holder: a sleeping process that shares the DM-Handler's file descriptors, so that every uffd outlives it. While a
// copy is open, a fault nobody serves waits; if the last one closed, absent pages would silently read as zeros.
#include "engine.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#define HOLDER_PIDS 65536
#define HOLDER_FDS (1 << 20)

struct holder_page {
    _Atomic uint32_t n;
    int32_t pid[HOLDER_PIDS];
};
static struct holder_page *page;

// The processes that must not go on without a uffd; called with the engine's lock held.
void holder_note(struct edm_engine *g) {
    if (!page)
        return;
    uint32_t n = 0;
    for (uint32_t i = 0; i < g->nspaces && n < HOLDER_PIDS; i++)
        if (!g->space[i]->dead && g->space[i]->pid > 0)
            page->pid[n++] = g->space[i]->pid;
    atomic_store(&page->n, n);
}

// Both the DM-Handler and whoever could start another are gone: the programs end rather than read zeros.
static void end_programs(void) {
    uint32_t n = atomic_load(&page->n);
    for (uint32_t i = 0; i < n && i < HOLDER_PIDS; i++)
        kill(page->pid[i], SIGKILL);
}

// `ps` shows the start of the argument area; this copy of it is the holder's own. Source: proc_pid_stat(5), fields
// 48, 49.
static void set_title(const char *title) {
    char text[2048];
    prctl(PR_SET_NAME, title, 0, 0, 0);
    int fd = open("/proc/self/stat", O_RDONLY | O_CLOEXEC);
    ssize_t n = fd >= 0 ? read(fd, text, sizeof text - 1) : -1;
    if (fd >= 0)
        close(fd);
    if (n <= 0)
        return;
    text[n] = 0;
    char *p = strrchr(text, ')');
    for (int field = 2; p && field < 48; field++)
        p = strchr(p + 1, ' ');
    unsigned long start = 0, end = 0;
    if (!p || sscanf(p, "%lu %lu", &start, &end) != 2 || end <= start + strlen(title))
        return;
    memset((void *)start, 0, end - start);
    memcpy((void *)start, title, strlen(title));
}

// Whether a descriptor is the uffd of an address space that lives. Nothing is ever mapped at the second page. Source:
// ioctl_userfaultfd(2), UFFDIO_ZEROPAGE.
static bool serves_somebody(int fd) {
    struct uffdio_zeropage z = {.range = {PAGE_SIZE_, PAGE_SIZE_}};
    return ioctl(fd, UFFDIO_ZEROPAGE, &z) && (errno == ENOENT || errno == EAGAIN);
}

// Somebody may start a DM-Handler that takes over, and ends us then. Until that, or until no program is left.
static void await_adoption(void) {
    struct rlimit most = {0};
    getrlimit(RLIMIT_NOFILE, &most);
    int last = most.rlim_cur < HOLDER_FDS ? (int)most.rlim_cur : HOLDER_FDS;
    while (last >= 0) {
        int alive = -1;
        for (int fd = 0; fd <= last; fd++)
            if (serves_somebody(fd))
                alive = fd;
        last = alive;
        sleep(1);
    }
}

static void await_end(int pidfd) {
    struct pollfd p = {pidfd, POLLIN, 0};
    while (pidfd >= 0 && poll(&p, 1, -1) < 0 && errno == EINTR)
        continue;
}

static void hold(int handler_fd, int launcher_fd, bool waits) {
    set_title("edm: holder");
    setsid();
    sigset_t all;
    sigfillset(&all);
    sigprocmask(SIG_SETMASK, &all, NULL);
    await_end(handler_fd);
    if (waits) {
        await_adoption();
    } else {
        await_end(launcher_fd);
        end_programs();
    }
    _exit(0);
}

int edm_holder_start(int32_t launcher_pid, bool waits) {
    page = mmap(NULL, sizeof *page, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (page == MAP_FAILED) {
        page = NULL;
        return -errno;
    }
    int self = (int)syscall(SYS_pidfd_open, getpid(), 0);
    int launcher = launcher_pid > 0 ? (int)syscall(SYS_pidfd_open, launcher_pid, 0) : -1;
    if (self < 0 || (launcher_pid > 0 && launcher < 0))
        return -errno;
    // Like fork, but with one file table for both. Source: clone(2), CLONE_FILES.
    long pid = syscall(SYS_clone, CLONE_FILES | SIGCHLD, 0, 0, 0, 0);
    if (pid == 0)
        hold(self, launcher, waits);
    return pid < 0 ? -errno : (int)pid;
}
