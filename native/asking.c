// Reading a captured program's memory from outside, and by /proc/self/mem. The kernel answers a debugger's read of an
// absent page with EIO: it raises no fault for it. So who reads (`edm dump`, app/reach.c) asks here, over the socket
// that programs come by, which pages hold anything, and has them brought where they are not in the program: as after a
// fault, within the budget.
#include <errno.h>
#include <poll.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#include "engine.h"

#define LOOK_MS 100  // at the engine's end

static struct space *space_asked(struct edm_engine *g, int32_t pid) {
    for (uint32_t i = 0; i < g->nspaces; i++)
        if (!g->space[i]->dead && g->space[i]->pid == pid && g->space[i]->uffd >= 0)
            return g->space[i];
    return NULL;
}

#define THERE 1
#define PROTECTED 2

// Source: Documentation/admin-guide/mm/pagemap.rst: bit 63 present, 62 swapped, 57 write-protected by a uffd.
static int look_in_program(const struct space *s, uint64_t page) {
    uint64_t entry = 0;
    if (pread(s->pagemap_fd, &entry, sizeof entry, (off_t)(page * sizeof entry)) != sizeof entry)
        return 0;
    return (entry >> 62 ? THERE : 0) | (entry >> 57 & 1 ? PROTECTED : 0);
}

// Of an adopted program only the DMS knows what it has of the pages that are not there.
static bool held(const struct space *s, uint64_t page, enum page_state state) {
    return !state_new(state) || (s->asks && ranges_has(&s->known, page));
}

// Whether it is one of those that are asked for; *fault: what kind of fault brings it. One that was never touched, or
// was given up, is not there either, and the kernel raises no fault for whoever reads it from outside.
static bool wanted(const struct space *s, uint64_t page, uint32_t op, uint32_t *fault) {
    struct lspt_entry *e = lspt_entry(&s->lspt, page);
    enum page_state state = e ? (enum page_state)e->state : PS_NEW;
    bool write = op == EDM_ASK_BRING_WRITABLE;
    *fault = write ? UFFD_PAGEFAULT_FLAG_WRITE : 0;
    if (op == EDM_ASK_HELD)
        return held(s, page, state);
    if (!state_new(state) && state != PS_RESIDENT)
        return true;
    if (!ranges_has(&s->known, page))
        return false;
    int is = look_in_program(s, page);
    if (!write || !(is & PROTECTED))
        return state_new(state) && !(is & THERE);
    *fault |= UFFD_PAGEFAULT_FLAG_WP;
    return true;
}

// How many pages may be brought now. The others are asked for again: nobody's fault waits for them, and what waits in
// the queue would push out what has just come. One at least, for the LPET to know that somebody waits.
static uint64_t room_now(struct edm_engine *g) {
    uint64_t used = local_pages(g), limit = local_most(g);
    if (!limit)
        return EDM_ASK_PAGES;
    if (used < limit && !g->waiting.n)
        return limit - used;
    pthread_cond_signal(&g->lpet_wake);
    return g->waiting.n ? 0 : 1;
}

static void look(struct edm_engine *g, struct space *s, const struct edm_ask *ask, struct edm_answer *out) {
    uint64_t room = ask->op == EDM_ASK_HELD ? 0 : room_now(g), brought = 0;
    for (uint32_t i = 0; i < ask->count; i++) {
        uint64_t page = ask->first + i;
        uint32_t fault;
        if (!wanted(s, page, ask->op, &fault))
            continue;
        out->pages[i / 64] |= 1ull << i % 64;
        if (brought < room) {
            queue_push(&g->ready, s, page, fault);
            brought++;
        }
    }
    if (brought)
        engine_kick(g);
    uint64_t after = ask->first + ask->count;
    struct leaf *l = lspt_next(&s->lspt, after);
    out->next = s->asks ? after : l ? (l->base > after ? l->base : after) : LSPT_MAX_PAGE;
}

static void answer(struct edm_engine *g, const struct edm_ask *ask, struct edm_answer *out) {
    *out = (struct edm_answer){.magic = EDM_CTL_MAGIC, .status = -EINVAL};
    if (ask->op < EDM_ASK_HELD || ask->op > EDM_ASK_BRING_WRITABLE || !ask->count || ask->count > EDM_ASK_PAGES ||
        ask->first >= LSPT_MAX_PAGE - ask->count)
        return;
    pthread_mutex_lock(&g->mu);
    struct space *s = space_asked(g, ask->pid);
    out->status = s ? 0 : -ESRCH;
    if (s)
        look(g, s, ask, out);
    pthread_mutex_unlock(&g->mu);
}

// Of whom a process may ask that calls him `pid`: root and our user of everybody, others of what is theirs. 0: not of
// him.
static int32_t may_ask(int asker, uint32_t user, int32_t pid) {
    struct stat owner;
    char path[32];
    pid = !pid ? asker : process_of_thread(pid < 0 ? -pid : number_here(asker, pid));
    snprintf(path, sizeof path, "/proc/%d", pid);
    bool may = !user || user == geteuid() || pid == asker;
    return may || (!stat(path, &owner) && owner.st_uid == user) ? pid : 0;
}

void asking_serve(struct edm_engine *g, int sock, int asker, uint32_t user) {
    while (!atomic_load(&g->stop)) {
        struct pollfd p = {sock, POLLIN, 0};
        if (poll(&p, 1, LOOK_MS) == 0)
            continue;
        struct edm_ask ask;
        struct edm_answer out;
        if (recv(sock, &ask, sizeof ask, 0) != (ssize_t)sizeof ask || ask.magic != EDM_CTL_MAGIC)
            return;
        ask.pid = may_ask(asker, user, ask.pid);
        answer(g, &ask, &out);
        if (send(sock, &out, sizeof out, MSG_NOSIGNAL) != (ssize_t)sizeof out)
            return;
    }
}
