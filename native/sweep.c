// Capture by looking from outside: /proc/PID/maps is read when the program's size has changed, and every private
// anonymous mapping is registered. Registering late loses nothing: pages touched before stay and join the LSPT.
#include "engine.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include "pagemap_abi.h"

#define USER_MODE_PIECE 16       // pages
#define FULL_SWEEP_NS 50000000u  // at least this often, changed or not

struct mapping {
    uint64_t a, b;  // page numbers
    bool writable;  // or inaccessible, and perhaps writable later
    bool guard;     // inaccessible
    bool heap;      // of brk(2)
    bool executable;
};

struct mappings {
    struct mapping *v;
    uint32_t n, cap;
    bool staging_seen;
    bool executable;  // and writable: some of it
};

static char *read_maps(int pid) {
    char path[32];
    snprintf(path, sizeof path, "/proc/%d/maps", pid);
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        return NULL;
    size_t cap = 64 * 1024, n = 0;
    char *text = xcalloc(1, cap);
    for (;;) {
        if (cap - n < 16 * 1024)
            text = xrealloc(text, cap *= 2);
        ssize_t r = read(fd, text + n, cap - n - 1);
        if (r <= 0)
            break;
        n += (size_t)r;
    }
    close(fd);
    text[n] = 0;
    return text;
}

// Private anonymous memory, the heap included; not stacks the kernel grows, not the vdso, not files.
static bool parse_line(char *line, struct mapping *m) {
    unsigned long a, b, inode;
    char perm[5];
    int name = 0;
    if (sscanf(line, "%lx-%lx %4s %*x %*s %lu %n", &a, &b, perm, &inode, &name) < 4)
        return false;
    if (perm[3] != 'p' || inode)
        return false;
    const char *what = name ? line + name : "";
    if (*what && strncmp(what, "[heap]", 6) && strncmp(what, "[anon", 5))
        return false;
    bool guard = !strncmp(perm, "---", 3);
    bool heap = !strncmp(what, "[heap]", 6);
    bool executable = !strncmp(perm, "rwx", 3);
    *m = (struct mapping){a >> PAGE_SHIFT, b >> PAGE_SHIFT, perm[1] == 'w' || guard, guard, heap, executable};
    return m->b <= LSPT_MAX_PAGE;
}

static bool mappings_read(struct space *s, struct mappings *out) {
    char *text = read_maps(s->pid), *save = NULL;
    *out = (struct mappings){0};
    if (!text || !*text) {
        free(text);
        return false;
    }
    uint64_t sa = s->staging >> PAGE_SHIFT, sb = sa + EDM_STAGING_PAGES, anchor = s->anchor >> PAGE_SHIFT;
    for (char *line = strtok_r(text, "\n", &save); line; line = strtok_r(NULL, "\n", &save)) {
        struct mapping m;
        if (!parse_line(line, &m))
            continue;
        if (m.a <= sa && m.b >= sb)
            out->staging_seen = true;
        out->executable |= m.executable;
        // The kernel may have merged a neighbour with staging or the anchor: those two stay out.
        uint64_t cut[3][2] = {{sa, sb}, {anchor, anchor + 1}, {m.b, m.b}};
        if (cut[0][0] > cut[1][0]) {
            uint64_t t[2] = {cut[0][0], cut[0][1]};
            memcpy(cut[0], cut[1], sizeof t);
            memcpy(cut[1], t, sizeof t);
        }
        uint64_t at = m.a;
        for (int i = 0; i < 3; i++) {
            uint64_t to = cut[i][0] < m.b ? cut[i][0] : m.b;
            if (to > at) {
                if (out->n == out->cap) {
                    out->cap = out->cap ? out->cap * 2 : 128;
                    out->v = xrealloc(out->v, out->cap * sizeof *out->v);
                }
                out->v[out->n++] = (struct mapping){at, to, m.writable, m.guard, m.heap, m.executable};
            }
            if (cut[i][1] > at)
                at = cut[i][1];
        }
    }
    free(text);
    return true;
}

static void join_page(struct space *s, uint64_t page) {
    struct leaf *l = lspt_leaf_make(&s->lspt, s, page);
    struct lspt_entry *e = &l->e[page % LEAF_PAGES];
    if (!state_new((enum page_state)e->state))
        return;
    uint8_t flags = e->flags;
    entry_arrived(s, l, e, page);
    e->flags = s->asks ? PF_STORED : flags & PF_STORED;  // adopted: the DMS may have an older version
    s->engine->count.joined++;
}

// Linux before 6.7: look at every page's entry.
static void join_by_pread(struct space *s, uint64_t a, uint64_t b) {
    uint64_t map[512];
    for (uint64_t at = a; at < b;) {
        uint64_t n = b - at < 512 ? b - at : 512;
        ssize_t r = pread(s->pagemap_fd, map, n * sizeof map[0], (off_t)(at * sizeof map[0]));
        if (r <= 0)
            return;
        for (ssize_t i = 0; i < r / (ssize_t)sizeof map[0]; i++)
            if (map[i] >> 63)
                join_page(s, at + (uint64_t)i);
        at += (uint64_t)r / sizeof map[0];
    }
}

// Pages already there when their mapping was registered.
static void join_present(struct space *s, uint64_t a, uint64_t b) {
    struct page_region found[256];
    struct pm_scan_arg arg = {.size = sizeof arg,
                              .start = a << PAGE_SHIFT,
                              .end = b << PAGE_SHIFT,
                              .vec = (uint64_t)(uintptr_t)found,
                              .vec_len = 256,
                              .category_mask = PAGE_IS_PRESENT,
                              .return_mask = PAGE_IS_PRESENT};
    while (arg.start < b << PAGE_SHIFT) {
        long n = ioctl(s->pagemap_fd, PAGEMAP_SCAN, &arg);
        if (n < 0) {
            if (errno == ENOTTY)
                join_by_pread(s, arg.start >> PAGE_SHIFT, b);
            return;  // the process has gone: nothing to join
        }
        for (long i = 0; i < n; i++)
            for (uint64_t p = found[i].start >> PAGE_SHIFT; p < found[i].end >> PAGE_SHIFT; p++)
                join_page(s, p);
        if (arg.walk_end <= arg.start)
            return;
        arg.start = arg.walk_end;
    }
}

// Join [a, b) except where a REMOVE was seen lately: what is there may be about to go, and if it were evicted before it
// went, the program would get it back.
static void join_settled(struct space *s, uint64_t a, uint64_t b) {
    uint64_t e;
    while (ranges_gap(&s->removed, &a, b, &e)) {
        join_present(s, a, e);
        a = e;
    }
}

// Adopted: what another DM-Handler has write-protected is for us a page like any other, and the sidecar, which may have
// to write to it, must never wait for a fault. A child comes to its first sweep with pages that are clean already: of a
// write to one nothing is heard any more.
static bool unprotected(struct space *s, uint64_t a, uint64_t b) {
    if (!s->asks)
        return true;
    if (uffd_unprotect(s, a, b)) {
        s->sweep_soon = true;
        return false;
    }
    struct leaf *l;
    for (uint64_t at = a; (l = lspt_next(&s->lspt, at)) && l->base < b; at = l->base + LEAF_PAGES)
        for (uint64_t i = 0; i < LEAF_PAGES; i++)
            if (l->base + i >= a && l->base + i < b)
                l->e[i].flags &= ~PF_CLEAN;
    return true;
}

static void removed_settle(struct space *s) {
    if (!removed_settled(s))
        return;
    struct ranges was = s->removed, there = {0};
    s->removed = (struct ranges){0};
    for (uint32_t i = 0; i < was.n; i++)
        ranges_within(&s->known, was.v[i].a, was.v[i].b, &there);
    for (uint32_t i = 0; i < there.n; i++)
        join_present(s, there.v[i].a, there.v[i].b);
    ranges_free(&was);
    ranges_free(&there);
}

// Of what was registered just now, only what lies inside one mapping on a second look counts as captured: a mapping
// that was replaced in between was perhaps never registered.
static void accept_registered(struct space *s, const struct ranges *fresh) {
    struct mappings again;
    if (!mappings_read(s, &again))
        return;
    // Something of what was seen may belong to an event that is to be read. It will put that right; until then nothing
    // can leave from there, and a remap to there need not wait for anything.
    bool doubtful = s->ops->changing(s);
    for (uint32_t i = 0; i < fresh->n; i++)
        for (uint32_t k = 0; k < again.n; k++) {
            uint64_t a = fresh->v[i].a, b = fresh->v[i].b;
            if (again.v[k].a <= a && again.v[k].b >= b && unprotected(s, a, b)) {
                ranges_add(&s->known, a, b);
                if (doubtful)
                    ranges_add(&s->doubtful, a, b);
                join_settled(s, a, b);
                break;
            }
        }
    free(again.v);
}

// The top of each mapping that stands on a guard: where a C library keeps what the kernel writes to when the thread of
// that stack exits, also while the stack waits for its next thread. exits_look finds the threads that are there.
static void note_stacks(struct space *s, const struct mappings *now) {
    s->stack_tops.n = 0;
    for (uint32_t i = 0; i < EDM_KEEP && s->ctl && s->ctl->keep[i]; i++)
        ranges_add(&s->stack_tops, s->ctl->keep[i] >> PAGE_SHIFT, (s->ctl->keep[i] >> PAGE_SHIFT) + 1);
    for (uint32_t i = 1; i < now->n; i++)
        if (now->v[i - 1].guard && now->v[i - 1].b == now->v[i].a && now->v[i].writable && !now->v[i].guard)
            ranges_add(&s->stack_tops, now->v[i].b > now->v[i].a + 2 ? now->v[i].b - 2 : now->v[i].a, now->v[i].b);
}

static bool due(struct space *s) {
    uint64_t now = now_ns();
    char text[32];
    ssize_t n = pread(s->statm_fd, text, sizeof text - 1, 0);
    if (n <= 0)
        return false;
    text[n] = 0;
    uint64_t vsz = strtoull(text, NULL, 10);
    bool changed = vsz != s->vsz;
    s->vsz = vsz;
    if (changed)
        s->changed_ns = now;
    return changed || s->sweep_soon || s->engine->user_mode || now - s->swept_ns > FULL_SWEEP_NS;
}

static void stretch_add(const struct space *s, struct unregistered *u, uint64_t a, uint64_t b, bool heap) {
    for (uint64_t e; ranges_gap(&s->wanted, &a, b, &e); a = e) {
        if (u->n == u->cap)
            u->v = xrealloc(u->v, (u->cap = u->cap ? u->cap * 2 : 64) * sizeof *u->v);
        u->v[u->n++] = (struct stretch){a, e, heap, ranges_touch(&s->foreign, a, e)};
    }
}

// What is not registered yet, a stretch a mapping.
static struct unregistered unregistered(struct space *s, const struct mappings *now) {
    struct unregistered u = {0};
    uint64_t e;
    for (uint32_t i = 0; i < now->n; i++)
        for (uint64_t a = now->v[i].a; now->v[i].writable && ranges_gap(&s->known, &a, now->v[i].b, &e); a = e)
            stretch_add(s, &u, a, e, now->v[i].heap);
    return u;
}

static void register_fresh(struct space *s, uint64_t a, uint64_t b, struct ranges *fresh) {
    int r = uffd_register(s, a, b);
    if (r == -EBUSY)
        ranges_add(&s->foreign, a, b);
    if (!r)
        ranges_append(fresh, a, b);  // neighbours must be checked one by one
}

// With a uffd for user mode only, a system call that comes upon an absent page of registered memory fails, be it new or
// evicted: a read into a new buffer would. So only what is there is registered, in pieces not too small: each may be a
// mapping of its own. (What is given up later with MADV_DONTNEED stays registered: before its event can be acted upon
// the program has gone on.)
static void register_present(struct space *s, uint64_t a, uint64_t b, struct ranges *fresh) {
    struct page_region found[64];
    struct pm_scan_arg arg = {.size = sizeof arg,
                              .start = a << PAGE_SHIFT,
                              .end = b << PAGE_SHIFT,
                              .vec = (uint64_t)(uintptr_t)found,
                              .vec_len = 64,
                              .category_mask = PAGE_IS_PRESENT,
                              .return_mask = PAGE_IS_PRESENT};
    while (arg.start < b << PAGE_SHIFT) {
        long n = ioctl(s->pagemap_fd, PAGEMAP_SCAN, &arg);
        for (long i = 0; i < n; i++)
            if (found[i].end - found[i].start >= USER_MODE_PIECE * PAGE_SIZE_)
                register_fresh(s, found[i].start >> PAGE_SHIFT, found[i].end >> PAGE_SHIFT, fresh);
        if (n < 0 || arg.walk_end <= arg.start)
            return;
        arg.start = arg.walk_end;
    }
}

// Of an adopted program, what another DM-Handler had registered: pages of it may be away that are in no table, and a
// fork of which no event tells needs them.
static void register_held(struct space *s, const struct mappings *now, struct ranges *fresh) {
    struct ranges held = {0};
    s->held_seen = mappings_flagged(s->pid, "um", 0, LSPT_MAX_PAGE, &held);
    for (uint32_t i = 0; i < now->n; i++)
        for (uint32_t k = 0; k < held.n; k++) {
            uint64_t a = held.v[k].a > now->v[i].a ? held.v[k].a : now->v[i].a;
            uint64_t b = held.v[k].b < now->v[i].b ? held.v[k].b : now->v[i].b;
            if (a < b)
                register_fresh(s, a, b, fresh);
        }
    ranges_free(&held);
}

// Called with the lock held. Returns whether mappings have changed lately.
bool space_sweep(struct space *s) {
    if (s->applying || s->statm_fd < 0 || !due(s))
        return false;
    s->sweep_soon = false;
    s->swept_ns = now_ns();
    s->engine->count.sweeps++;
    merging_look(s);
    struct mappings now;
    if (!mappings_read(s, &now))
        return false;
    if (!now.staging_seen) {  // exec into something that was not captured
        free(now.v);
        space_retire(s);
        return true;
    }
    if (now.executable && s->ctl)
        s->ctl->executable = 1;
    note_stacks(s, &now);
    struct ranges fresh = {0};
    if (s->asks && !s->held_seen && (s->engine->no_forks || space_whole(s) || s->wanted.n))
        register_held(s, &now, &fresh);
    uint64_t before = s->put_off;
    struct unregistered left = unregistered(s, &now);
    growth_put_off(s, &left);
    foreign_again(s);
    for (uint32_t i = 0; i < left.n; i++)
        if (left.v[i].a < left.v[i].b)
            (s->engine->user_mode ? register_present : register_fresh)(s, left.v[i].a, left.v[i].b, &fresh);
    free(left.v);
    free(now.v);
    if (fresh.n)
        point(POINT_swept);
    if (fresh.n)
        accept_registered(s, &fresh);
    removed_settle(s);
    bool changed = fresh.n > 0 || s->put_off > before;
    ranges_free(&fresh);
    return changed;
}

// All but the anchor, which the child has touched already.
static void forget_not_copied(struct space *s, uint64_t a, uint64_t b) {
    uint64_t anchor = s->anchor >> PAGE_SHIFT;
    if (anchor < a || anchor >= b) {
        space_forget(s, a, b);
        return;
    }
    space_forget(s, a, anchor);
    space_forget(s, anchor + 1, b);
}

// A forked child: mappings that were not copied (MADV_DONTFORK) must leave its table, or a later mapping there would be
// taken for one of them. What is wiped (MADV_WIPEONFORK) is zeros in it. To find that out takes as long as the program
// is large, and is spared a child whose table has nothing but pages that are here, or were here and are not: those are
// zeros.
void space_prune_unmapped(struct space *s) {
    struct mappings now;
    struct ranges wiped = {0};
    bool wipe = s->asks || s->inherited;
    if (!mappings_read(s, &now) || (wipe && !mappings_flagged(s->pid, "wf", 0, LSPT_MAX_PAGE, &wiped)))
        goto out;
    uint64_t at = 0;
    for (uint32_t i = 0; i <= now.n; i++) {
        uint64_t to = i < now.n ? now.v[i].a : LSPT_MAX_PAGE;
        if (to > at) {
            ranges_del(&s->known, at, to);
            forget_not_copied(s, at, to);
        }
        if (i < now.n)
            at = now.v[i].b;
    }
    for (uint32_t i = 0; i < wiped.n; i++)
        forget_not_copied(s, wiped.v[i].a, wiped.v[i].b);
    state_commit(s->engine);
out:
    free(now.v);
    ranges_free(&wiped);
}
