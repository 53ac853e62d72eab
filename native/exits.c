// Pages that the kernel writes to when a thread exits, at a time when it can wait for no fault any more: struct
// pthread, where it clears the thread's id (or pthread_join would hang), and the robust mutexes that the thread holds
// (or whoever locks one next would). Those stay. What is told (app/stacks.c) is certain; what is found is not, of a
// mutex that was locked, or a thread that began, between a look and the move.
#include <dirent.h>
#include <linux/futex.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "engine.h"

#define MOST_HELD 2048     // mutexes of one thread; the kernel's ROBUST_LIST_LIMIT
#define MOST_STACKS 1024u  // remembered
#define LOCAL_PART 4       // of the budget, at most, for them
#define STACK_PAGES 3

bool space_peek(const struct space *s, uint64_t at, void *into, size_t bytes) {
    return s->mem_fd >= 0 && pread(s->mem_fd, into, bytes, (off_t)at) == (ssize_t)bytes;
}

// Source: Documentation/locking/robust-futex-ABI.rst. Bit 0 of a pointer marks a mutex with priority inheritance.
static void held_mutexes(const struct space *s, uint64_t head, struct ranges *out) {
    struct robust_list_head h;
    if (!space_peek(s, head, &h, sizeof h))
        return;
    uint64_t at = (uint64_t)(uintptr_t)h.list.next & ~1ull, pending = (uint64_t)(uintptr_t)h.list_op_pending & ~1ull;
    uint64_t word = (uint64_t)h.futex_offset;
    if (pending)
        ranges_add(out, (pending + word) >> PAGE_SHIFT, ((pending + word) >> PAGE_SHIFT) + 1);
    for (int i = 0; i < MOST_HELD && at && at != head; i++) {
        ranges_add(out, at >> PAGE_SHIFT, (at >> PAGE_SHIFT) + 1);
        ranges_add(out, (at + word) >> PAGE_SHIFT, ((at + word) >> PAGE_SHIFT) + 1);
        if (!space_peek(s, at, &at, sizeof at))
            return;
        at &= ~1ull;
    }
}

// A stack that the program made itself is used again, by a thread that may come and go before the next look: the
// page stays until it is unmapped. Those of the C library's stacks are known without (note_stacks).
static void remember(struct space *s, uint64_t a, uint64_t b) {
    uint64_t most = s->engine->limit ? s->engine->limit / LOCAL_PART / STACK_PAGES : MOST_STACKS;
    if (s->exits.n > (most < MOST_STACKS ? most : MOST_STACKS))
        ranges_free(&s->exits);
    ranges_add(&s->exits, a, b);
}

// What the program has told since: see app/stacks.c.
static void told(struct space *s) {
    if (!s->ctl)
        return;
    s->stacks_told = __atomic_load_n(&s->ctl->stacks_told, __ATOMIC_SEQ_CST);
    uint32_t next = __atomic_load_n(&s->ctl->stack_next, __ATOMIC_SEQ_CST);
    if (next - s->stacks_seen > EDM_STACKS)
        s->stacks_seen = next - EDM_STACKS;
    bool all = true;
    for (uint32_t at = s->stacks_seen; at != next; at++) {
        uint64_t note = __atomic_load_n(&s->ctl->stack[at % EDM_STACKS], __ATOMIC_SEQ_CST), page = note >> PAGE_SHIFT;
        // Not written yet: its thread has not been made, and will have told of it before; see wait_for_move.
        if (!note || ((note ^ EDM_STACK_NOTE(0, at - EDM_STACKS)) & 0xfff) == 0)
            all = false;
        else if (page < LSPT_MAX_PAGE && !ranges_touch(&s->stack_tops, page, page + 1))
            remember(s, page, page + 1);
        if (all)
            s->stacks_seen = at + 1;
    }
}

// The pages around each thread's robust list head, which lies in struct pthread, go to s->exits; what else must stay
// for now, to `out`.
void exits_look(struct space *s, struct ranges *out) {
    char path[32];
    snprintf(path, sizeof path, "/proc/%d/task", s->pid);
    told(s);
    pipes_look(s);
    DIR *d = opendir(path);
    if (!d)
        return;
    for (struct dirent *e; (e = readdir(d));) {
        int tid = atoi(e->d_name);
        void *head = NULL;
        size_t length;
        if (tid > 0 && syscall(SYS_get_robust_list, tid, &head, &length) == 0 && head) {
            uint64_t page = (uint64_t)(uintptr_t)head >> PAGE_SHIFT;
            ranges_add(out, page ? page - 1 : 0, page + 2);
            remember(s, page ? page - 1 : 0, page + 2);
            held_mutexes(s, (uint64_t)(uintptr_t)head, out);
        }
    }
    closedir(d);
}

// Unmapped, or another mapping's now.
void exits_forget(struct space *s, uint64_t a, uint64_t b) { ranges_del(&s->exits, a, b); }
