// The userfaultfd side of a space: one function an ioctl, each result handed to the caller as 0 or -errno.
#include "engine.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/io_uring.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "uffd_abi.h"

#define FEATURES                                                                                                 \
    (UFFD_FEATURE_EVENT_FORK | UFFD_FEATURE_EVENT_REMAP | UFFD_FEATURE_EVENT_REMOVE | UFFD_FEATURE_EVENT_UNMAP | \
     UFFD_FEATURE_THREAD_ID | UFFD_FEATURE_MOVE)

// Source: Documentation/admin-guide/mm/userfaultfd.rst and include/uapi/linux/userfaultfd.h.
int uffd_open_api(struct edm_engine *g, int fd) {
    uint64_t need = FEATURES;
    if (g->cfg.track_writes)
        need |= UFFD_FEATURE_PAGEFAULT_FLAG_WP;
    if (g->no_forks)
        need &= ~(uint64_t)UFFD_FEATURE_EVENT_FORK;
    struct uffdio_api api = {.api = UFFD_API, .features = need};
    return ioctl(fd, UFFDIO_API, &api) ? -errno : 0;
}

// A uffd as good as can be had; *user_mode: only the last resort was.
static int open_best(bool *user_mode) {
    *user_mode = false;
    int fd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK);
    if (fd >= 0 || errno == ENOSYS)
        return fd >= 0 ? fd : -errno;
    int dev = open("/dev/userfaultfd", O_RDWR | O_CLOEXEC);
    if (dev >= 0) {
        fd = ioctl(dev, USERFAULTFD_IOC_NEW, O_CLOEXEC | O_NONBLOCK);
        close(dev);
        if (fd >= 0)
            return fd;
    }
    *user_mode = true;
    fd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK | UFFD_USER_MODE_ONLY);
    return fd >= 0 ? fd : -errno;
}

// The rung we stand on (EDM_ACCESS_*), or a negative errno. *no_forks: also on the last rung it may be otherwise.
int uffd_access(bool *no_forks) {
    bool user_mode;
    int fd = open_best(&user_mode);
    if (fd < 0)
        return fd;
    struct uffdio_api api = {.api = UFFD_API, .features = FEATURES};
    int r = ioctl(fd, UFFDIO_API, &api) ? -errno : 0;
    *no_forks = r == -EPERM;
    if (*no_forks) {
        api = (struct uffdio_api){.api = UFFD_API, .features = FEATURES & ~(uint64_t)UFFD_FEATURE_EVENT_FORK};
        r = ioctl(fd, UFFDIO_API, &api) ? -errno : 0;
    }
    close(fd);
    if (r)
        return r;
    return user_mode ? EDM_ACCESS_USER_MODE : *no_forks ? EDM_ACCESS_NO_FORKS : EDM_ACCESS_ALL;
}

int edm_uffd_access(void) {
    bool no_forks;
    return uffd_access(&no_forks);
}

int edm_tie_access(void) {
    struct io_uring_params p = {.flags = IORING_SETUP_R_DISABLED};
    long ring = syscall(SYS_io_uring_setup, 1, &p);
    if (ring < 0)
        return -errno;
    close((int)ring);
    return 0;
}

int edm_uffd_check(void) {
    int r = edm_uffd_access();
    return r > 0 ? -EPERM : r;
}

int uffd_register(struct space *s, uint64_t a, uint64_t b) {
    struct uffdio_register r = {.range = {a << PAGE_SHIFT, (b - a) << PAGE_SHIFT},
                                .mode = UFFDIO_REGISTER_MODE_MISSING};
    if (s->engine->cfg.track_writes)
        r.mode |= UFFDIO_REGISTER_MODE_WP;
    return ioctl(s->uffd, UFFDIO_REGISTER, &r) ? -errno : 0;
}

int uffd_unregister(struct space *s, uint64_t a, uint64_t b) {
    struct uffdio_range r = {a << PAGE_SHIFT, (b - a) << PAGE_SHIFT};
    return ioctl(s->uffd, UFFDIO_UNREGISTER, &r) ? -errno : 0;
}

int uffd_unprotect(struct space *s, uint64_t a, uint64_t b) {
    if (!s->engine->cfg.track_writes)
        return 0;
    struct uffdio_writeprotect w = {.range = {a << PAGE_SHIFT, (b - a) << PAGE_SHIFT}};
    return ioctl(s->uffd, UFFDIO_WRITEPROTECT, &w) ? -errno : 0;
}

int uffd_watch(struct space *s) {
    struct epoll_event ev = {.events = EPOLLIN, .data.ptr = s};
    return epoll_ctl(s->engine->epoll, EPOLL_CTL_ADD, s->uffd, &ev) ? -errno : 0;
}

static int read_messages(struct space *s, struct uffd_msg *m, int max) {
    sidecar_lock(s);
    ssize_t n = read(s->uffd, m, (size_t)max * sizeof *m);
    int e = errno;
    for (ssize_t i = 0; n > 0 && i < n / (ssize_t)sizeof *m; i++)
        s->generation += space_event(s, &m[i]);
    if (s->ctl)
        __atomic_store_n(&s->ctl->generation, s->generation, __ATOMIC_RELEASE);
    sidecar_unlock(s);
    return n < 0 ? -e : (int)(n / (ssize_t)sizeof *m);
}

// What a call over several pages came to: some may be done before the one that could not be.
static int pages_done(int result, int64_t bytes, uint32_t count) {
    return !result ? (int)count : bytes > 0 ? (int)(bytes >> PAGE_SHIFT) : bytes < 0 ? (int)bytes : -errno;
}

static int zero(struct space *s, uint64_t page, uint32_t count) {
    struct uffdio_zeropage z = {.range = {page << PAGE_SHIFT, (uint64_t)count << PAGE_SHIFT}};
    int r = ioctl(s->uffd, UFFDIO_ZEROPAGE, &z);
    return pages_done(r, z.zeropage, count);
}

static int copy(struct space *s, uint64_t page, uint32_t count, const void *data, bool protect) {
    struct uffdio_copy c = {.dst = page << PAGE_SHIFT,
                            .src = (uint64_t)(uintptr_t)data,
                            .len = (uint64_t)count << PAGE_SHIFT,
                            .mode = protect ? UFFDIO_COPY_MODE_WP : 0};
    int r = ioctl(s->uffd, UFFDIO_COPY, &c);
    return pages_done(r, c.copy, count);
}

static int unprotect(struct space *s, uint64_t page) {
    struct uffdio_writeprotect w = {.range = {page << PAGE_SHIFT, PAGE_SIZE_}};
    return ioctl(s->uffd, UFFDIO_WRITEPROTECT, &w) ? -errno : 0;
}

static int wake(struct space *s, uint64_t page, uint64_t count) {
    struct uffdio_range r = {page << PAGE_SHIFT, count << PAGE_SHIFT};
    return ioctl(s->uffd, UFFDIO_WAKE, &r) ? -errno : 0;
}

static int poison(struct space *s, uint64_t page) {
    struct uffdio_poison p = {.range = {page << PAGE_SHIFT, PAGE_SIZE_}};
    return ioctl(s->uffd, UFFDIO_POISON, &p) ? -errno : 0;
}

// Source: Documentation/admin-guide/mm/pagemap.rst: bits 0-54, zero without CAP_SYS_ADMIN.
static uint64_t pfn(struct space *s, uint64_t page) {
    uint64_t entry = 0;
    if (s->pagemap_fd < 0 || pread(s->pagemap_fd, &entry, sizeof entry, (off_t)(page * sizeof entry)) != sizeof entry)
        return 0;
    return entry >> 63 ? entry & ((1ull << 55) - 1) : 0;
}

static int forked(struct space *child, const struct uffd_msg *m) {
    child->uffd = event_uffd(child->engine, m);
    child->state->uffd[child->engine->turn] = child->uffd;
    child->anchor = child->state->anchor = child->parent->anchor;
    int fl = fcntl(child->uffd, F_GETFL);
    if (fl < 0 || fcntl(child->uffd, F_SETFL, fl | O_NONBLOCK) || fcntl(child->uffd, F_SETFD, FD_CLOEXEC))
        return -errno;
    // Not what the parent knows: mappings that were registered between the fork and this event are not in the child's
    // uffd, and the kernel would let pages go from there that it then fills with zeros. The first sweep finds out.
    // Without its uffd the child would read zeros: where it cannot be watched it waits, and the capture thread tries
    // again.
    child->unwatched = point_fails(POINT_fork_watched, NULL) || uffd_watch(child);
    return 0;
}

// Nothing is ever mapped at the second page: ENOENT while the address space lives, ESRCH when it is gone.
static bool gone(struct space *s) { return s->uffd >= 0 && zero(s, 1, 1) == -ESRCH; }

static bool changing(struct space *s) { return s->uffd >= 0 && zero(s, 1, 1) == -EAGAIN; }

static bool mapped(struct space *s, uint64_t page) { return uffd_register(s, page, page + 1) == 0; }

static bool registered(struct space *s, uint64_t a, uint64_t b, struct ranges *out) {
    return s->pid > 0 && mappings_flagged(s->pid, "um", a, b, out);
}

// Undoes space_attach.
void space_detach(struct space *s) {
    sidecar_end(s);
    int fds[] = {s->ctl_fd, s->pidfd, s->pagemap_fd, s->statm_fd, s->ksm_fd, s->mem_fd};
    // The numbers may be others' in a moment.
    s->state->ctl[s->engine->turn] = -1;
    STATE_BARRIER();
    for (size_t i = 0; i < sizeof fds / sizeof *fds; i++)
        if (fds[i] >= 0)
            close(fds[i]);
    s->ctl_fd = s->pidfd = s->pagemap_fd = s->statm_fd = s->ksm_fd = s->mem_fd = -1;
    if (s->ctl)
        munmap(s->ctl, EDM_CTL_BYTES);
    s->ctl = NULL;
}

static void retire(struct space *s) {
    int uffd = s->uffd;
    s->uffd = s->state->uffd[s->engine->turn] = -1;
    space_detach(s);
    if (uffd >= 0) {
        epoll_ctl(s->engine->epoll, EPOLL_CTL_DEL, uffd, NULL);
        close(uffd);
    }
    holder_note(s->engine);
}

const struct source_ops uffd_ops = {.read = read_messages,
                                    .zero = zero,
                                    .copy = copy,
                                    .unprotect = unprotect,
                                    .wake = wake,
                                    .poison = poison,
                                    .move_out = sidecar_move_out,
                                    .read_out = sidecar_read_out,
                                    .drop_out = sidecar_drop_out,
                                    .settle = sidecar_settle,
                                    .pfn = pfn,
                                    .forked = forked,
                                    .gone = gone,
                                    .mapped = mapped,
                                    .registered = registered,
                                    .changing = changing,
                                    .retire = retire};
