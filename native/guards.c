// Guard pages of madvise(2), MADV_GUARD_INSTALL: marks in the page table. A touch of one is the program's SIGSEGV and
// raises no fault here, but UFFDIO_COPY puts a page over one as if nothing were there. So nothing is brought to where a
// guard is before it is asked for. Source: mm/userfaultfd.c mfill_atomic_install_pte; pagemap.rst, bit 58.
#include <fcntl.h>
#include <pthread.h>
#include <sys/mman.h>
#include <unistd.h>

#include "engine.h"

#ifndef MADV_GUARD_INSTALL
#define MADV_GUARD_INSTALL 102
#endif
#define PM_GUARD_REGION (1ull << 58)

static enum { NO_GUARDS, GUARDS_SEEN, GUARDS_HIDDEN } kind;  // Linux before 6.13, from 6.15 on, and between
static pthread_once_t known = PTHREAD_ONCE_INIT;

static void find_out(void) {
    char *p = mmap(NULL, PAGE_SIZE_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    int fd = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
    uint64_t entry = 0;
    if (p != MAP_FAILED && !madvise(p, PAGE_SIZE_, MADV_GUARD_INSTALL)) {
        off_t at = (off_t)((uint64_t)(uintptr_t)p / PAGE_SIZE_ * sizeof entry);
        bool seen = pread(fd, &entry, sizeof entry, at) == sizeof entry && entry & PM_GUARD_REGION;
        kind = seen ? GUARDS_SEEN : GUARDS_HIDDEN;
    }
    if (fd >= 0)
        close(fd);
    if (p != MAP_FAILED)
        munmap(p, PAGE_SIZE_);
}

bool guards_hidden(void) {
    pthread_once(&known, find_out);
    return kind == GUARDS_HIDDEN;
}

// Of `n` pages from `from` on, how many there are before the first guard; backwards: after the last.
uint32_t guards_until(const struct space *s, uint64_t from, uint32_t n, bool backwards) {
    uint64_t map[MAX_FETCH];
    pthread_once(&known, find_out);
    if (kind != GUARDS_SEEN || s->pagemap_fd < 0 || !n)
        return n;
    if (pread(s->pagemap_fd, map, n * sizeof map[0], (off_t)(from * sizeof map[0])) != (ssize_t)(n * sizeof map[0]))
        return 0;
    for (uint32_t i = 0; i < n; i++)
        if (map[backwards ? n - 1 - i : i] & PM_GUARD_REGION)
            return i;
    return n;
}
