// mremap as the program calls it. The kernel moves one mapping at a time, and what is one without EDM may be two under
// it: a part that the DM-Handler has not seen yet is a mapping of its own, and stays one once both have been written
// to, each with its own anon_vma. Linux 6.17 and later move several at once to a fixed address, but not those of a
// uffd: it stops at the first of them, with what it has moved until then. So what the kernel would do without EDM is
// done here, mapping by mapping. Source: mremap(2); mm/mremap.c of Linux 6.18, remap_move and vma_multi_allowed.
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include "remap.h"

#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>

#include "../procmap_abi.h"
#include "calls.h"
#include "own.h"

#define PAGE 4096ul
#ifndef MREMAP_DONTUNMAP
#define MREMAP_DONTUNMAP 4
#endif
#define AGAIN 1000  // the DM-Handler may register a part of a mapping just after it was looked at
#define EXPORTED __attribute__((visibility("default")))

static bool captured;
static bool several;  // the kernel moves several mappings at once

// Tried on two that EDM never captures, since nobody can write there. Before main: where a thread makes a hole in its
// address space, to map something there later, nothing of ours must come to lie.
static bool kernel_can_several(void) {
    long p = CALL6(SYS_mmap, 0, 4 * PAGE, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (p < 0)
        return false;
    CALL(SYS_madvise, (uint64_t)p + PAGE, PAGE, MADV_DONTDUMP);
    long to = p + (long)(2 * PAGE);
    bool can = CALL6(SYS_mremap, p, 2 * PAGE, 2 * PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, to, 0) == to;
    CALL(SYS_munmap, p, 4 * PAGE, 0);
    return can;
}

void remap_begin(void) {
    if (!captured)
        several = kernel_can_several();
    captured = true;
}

struct order {
    uint64_t from, was, will;  // bytes, of whole pages
    int flags;
    uint64_t to;
};

// ---- what is mapped where ---------------------------------------------------------------------------------------

struct mapping {
    uint64_t a, b;
    uint64_t kind;  // what two must have in common to be one without EDM
};

static uint64_t number(const char **at, unsigned base) {
    uint64_t n = 0;
    for (;; ++*at) {
        unsigned c = (unsigned char)**at, digit = c >= 'a' ? c - 'a' + 10 : c <= '9' ? c - '0' : base;
        if (digit >= base)
            return n;
        n = n * base + digit;
    }
}

#define SHARED_OR_FILE (1ull << 63)

// A line of maps: "start-end perms offset device inode name".
static struct mapping parse(const char *line) {
    struct mapping m = {.a = number(&line, 16)};
    line++;
    m.b = number(&line, 16);
    memcpy(&m.kind, line + 1, 4);
    bool shared = line[4] == 's';
    line += 6;
    number(&line, 16);
    line++;
    for (int i = 0; i < 2; i++, line++)
        number(&line, 16);
    if (shared || number(&line, 10))
        m.kind |= SHARED_OR_FILE;
    return m;
}

// The mapping with `at` in it, or the next one. Linux before 6.11: read all of them.
static bool mapping_in_text(int fd, uint64_t at, struct mapping *m) {
    char text[1024];
    uint64_t have = 0;
    CALL(SYS_lseek, fd, 0, 0);
    for (bool cut = false;;) {  // cut: the rest of a line whose beginning was parsed
        long n = CALL(SYS_read, fd, text + have, sizeof text - 1 - have);
        if (n <= 0)
            return false;
        text[have += (uint64_t)n] = 0;
        char *line = text, *end;
        while ((end = strchr(line, '\n')) || (line == text && have == sizeof text - 1)) {
            if (!cut) {
                *m = parse(line);
                if (m->b > at)
                    return true;
            }
            cut = !end;
            line = end ? end + 1 : text + have;
        }
        have -= (uint64_t)(line - text);
        memmove(text, line, have);
    }
}

static bool mapping_from(int fd, uint64_t at, struct mapping *m) {
    struct edm_procmap_query q;
    memset(&q, 0, sizeof q);
    q.size = sizeof q;
    q.query_flags = EDM_PROCMAP_COVERING_OR_NEXT;
    q.query_addr = at;
    long r = CALL(SYS_ioctl, fd, EDM_PROCMAP_QUERY, &q);
    if (r == -ENOTTY)
        return mapping_in_text(fd, at, m);
    if (r)
        return false;
    *m = (struct mapping){q.vma_start, q.vma_end, q.vma_flags & EDM_PROCMAP_PERMS};
    if (q.inode || q.vma_flags & EDM_PROCMAP_SHARED)
        m->kind |= SHARED_OR_FILE;
    return true;
}

static int open_maps(void) {
    if (restricted())
        return -1;
    return (int)CALL6(SYS_openat, AT_FDCWD, "/proc/thread-self/maps", O_RDONLY | O_CLOEXEC, 0, 0, 0);
}

// Whether it would be one mapping without EDM: side by side, and of one kind.
static bool one_without_edm(int fd, uint64_t a, uint64_t b) {
    struct mapping first, next;
    if (!mapping_from(fd, a, &first) || first.a > a || first.kind & SHARED_OR_FILE)
        return false;
    for (uint64_t end = first.b; end < b; end = next.b)
        if (!mapping_from(fd, end, &next) || next.a > end || next.kind != first.kind)
            return false;
    return true;
}

// ---- moving, mapping by mapping -----------------------------------------------------------------------------------

// All of [from, from + was), which was one mapping just now, or a part where it no longer is: returns how much.
static uint64_t move_one(uint64_t from, uint64_t was, uint64_t will, uint64_t to, long *error) {
    long r = CALL6(SYS_mremap, from, was, will, MREMAP_MAYMOVE | MREMAP_FIXED, to, 0);
    *error = r < 0 ? r : 0;
    return r < 0 ? 0 : was;  // a part that has been moved all the same is a gap now
}

// The same, and it stays mapped: how far the kernel came is seen from what lies at its new place.
static uint64_t move_and_leave(int fd, uint64_t from, uint64_t bytes, uint64_t to, long *error) {
    struct mapping m;
    int flags = MAP_SHARED | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED;
    long r = CALL6(SYS_mmap, to, bytes, PROT_NONE, flags, -1, 0);
    if (r >= 0)
        r = CALL6(SYS_mremap, from, bytes, bytes, MREMAP_MAYMOVE | MREMAP_FIXED | MREMAP_DONTUNMAP, to, 0);
    *error = r < 0 ? r : 0;
    if (r >= 0)
        return bytes;
    uint64_t end = to;
    while (r == -EFAULT && end < to + bytes && mapping_from(fd, end, &m) && m.a <= end && !(m.kind & SHARED_OR_FILE))
        end = m.b;
    if (end == to && r != -EFAULT)
        CALL(SYS_munmap, to, bytes, 0);
    else if (end > to)
        *error = 0;
    return end - to;
}

// Of [at, at + bytes) what there is goes to the same places from `to` on; the last of it grows by `more`. Returns what
// has been done, and in *error why not all.
static uint64_t move_each(int fd, uint64_t at, uint64_t bytes, uint64_t more, bool leave, uint64_t to, long *error) {
    uint64_t done = 0;
    struct mapping m;
    *error = 0;
    for (int tries = 0; done < bytes;) {
        if (!mapping_from(fd, at + done, &m) || m.a >= at + bytes)
            return bytes;  // the rest is a gap
        if (m.a > at + done)
            done = m.a - at;
        uint64_t n = (m.b < at + bytes ? m.b : at + bytes) - at - done;
        uint64_t grow = done + n == bytes ? more : 0;
        uint64_t moved = leave ? move_and_leave(fd, at + done, n, to + done, error)
                               : move_one(at + done, n, n + grow, to + done, error);
        if (*error && (*error != -EFAULT || ++tries == AGAIN))
            return done;
        if (!*error)
            tries = 0;
        done += moved;
    }
    return done;
}

static long move_all(int fd, const struct order *o, uint64_t to) {
    long error, back;
    bool leave = o->flags & MREMAP_DONTUNMAP;
    uint64_t done = move_each(fd, o->from, o->was, o->will - o->was, leave, to, &error);
    if (!error)
        return (long)to;
    if (done)
        move_each(fd, to, done, 0, false, o->from, &back);
    return error;
}

static long move_somewhere(int fd, const struct order *o) {
    long to = CALL6(SYS_mmap, 0, o->will, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (to < 0)
        return to;
    long r = move_all(fd, o, (uint64_t)to);
    if (r < 0)
        CALL(SYS_munmap, to, o->will, 0);
    return r;
}

static long by_mapping(int fd, struct order *o) {
    if (o->will < o->was) {
        CALL(SYS_munmap, o->from + o->will, o->was - o->will, 0);
        o->was = o->will;
    }
    if (o->flags & MREMAP_FIXED)
        return move_all(fd, o, o->to);
    if (o->will > o->was) {
        uint64_t last = o->from + o->was - PAGE;
        long r = CALL6(SYS_mremap, last, PAGE, PAGE + o->will - o->was, 0, 0, 0);
        if (r >= 0)
            return (long)o->from;
        if (!(o->flags & MREMAP_MAYMOVE))
            return r;
    }
    return move_somewhere(fd, o);
}

// ---- the call -------------------------------------------------------------------------------------------------------

static long call(const struct order *o) { return CALL6(SYS_mremap, o->from, o->was, o->will, o->flags, o->to, 0); }

// What the kernel may do for several mappings, and would begin and not end where the first of them is not captured.
static bool of_several(const struct order *o) {
    bool fixed = (o->flags & ~MREMAP_DONTUNMAP) == (MREMAP_MAYMOVE | MREMAP_FIXED);
    bool apart = o->from + o->was <= o->to || o->to + o->was <= o->from;
    return fixed && o->was == o->will && o->was && apart && o->to % PAGE == 0 && several;
}

static long remap(struct order *o) {
    uint64_t end = o->from + o->was;
    struct mapping first;
    int fd = of_several(o) ? open_maps() : -1;
    bool begins = fd >= 0 && mapping_from(fd, o->from, &first) && first.a <= o->from;
    bool whole = begins && first.b >= end && !(o->flags & MREMAP_DONTUNMAP);
    long r = begins && !whole ? -EFAULT : call(o);
    if (r == -EFAULT && fd < 0)
        fd = open_maps();
    if (r == -EFAULT && fd >= 0 && (begins || one_without_edm(fd, o->from, end)))
        r = by_mapping(fd, o);
    if (fd >= 0)
        CALL(SYS_close, fd, 0, 0);
    return r;
}

EXPORTED void *mremap(void *old, size_t was, size_t will, int flags, ...) {
    struct order o = {(uint64_t)old, (was + PAGE - 1) / PAGE * PAGE, (will + PAGE - 1) / PAGE * PAGE, flags, 0};
    if (flags & (MREMAP_FIXED | MREMAP_DONTUNMAP)) {
        va_list more;
        va_start(more, flags);
        o.to = (uint64_t)va_arg(more, void *);
        va_end(more);
    }
    bool ours = captured && o.from % PAGE == 0 && o.was >= was && o.will >= will && o.will;
    long r = ours ? remap(&o) : CALL6(SYS_mremap, old, was, will, flags, o.to, 0);
    if (r < 0)
        errno = (int)-r;
    return r < 0 ? MAP_FAILED : (void *)r;
}
