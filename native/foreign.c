// Memory for a userfaultfd of the program's own. The kernel lets one userfaultfd have a page, and EDM's may have it
// already: libedm_app.so then asks for it here (app/own_uffd.c). All that is away there comes back, and EDM lets go of
// it and keeps off until the program has registered it. When the program's userfaultfd has it no more, the next sweep
// captures it as any other memory.
//
// The program is to find what it would find without EDM: what it had touched is there, and what it never touched is
// not, also where that had been filled ahead of it.
#include <errno.h>
#include <poll.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <unistd.h>

#include "engine.h"

#define LOOK_MS 100           // at the end of the program, or of the engine
#define WANTED_MS 10000       // to say what it wants
#define PATIENCE_ROUNDS 4000  // for pages that are to leave

// ---- pages that were filled ahead

bool foreign_waits(const struct edm_engine *g) {
    for (uint32_t i = 0; i < g->nspaces; i++)
        if (g->space[i]->untouched.b && !g->space[i]->dead)
            return true;
    return false;
}

// Nothing tells a page that was only read, or written zeros to, from one that was not touched.
static bool perhaps_untouched(struct space *s, struct leaf *l, int i) {
    uint64_t page = l->base + (uint64_t)i;
    uint8_t bytes[PAGE_SIZE_];
    bool stays = refused_lately(l) & 1ull << i || ranges_has(&s->exits, page) || ranges_has(&s->stack_tops, page) ||
                 ranges_has(&s->given, page);
    return !stays && space_peek(s, page << PAGE_SHIFT, bytes, sizeof bytes) && page_is_zero(bytes);
}

static uint64_t untouched_mask(struct space *s, struct leaf *l, uint64_t most) {
    uint64_t mask = 0;
    for (int i = 0; i < LEAF_PAGES && most; i++) {
        uint64_t page = l->base + (uint64_t)i;
        if (page < s->untouched.a || page >= s->untouched.b || l->e[i].state != PS_RESIDENT ||
            !(l->e[i].flags & PF_AHEAD))
            continue;
        if (!perhaps_untouched(s, l, i)) {
            l->e[i].flags &= ~PF_AHEAD;
            continue;
        }
        mask |= 1ull << i;
        most--;
    }
    return mask;
}

struct space *foreign_select(struct edm_engine *g, struct move_batch *b, uint64_t most) {
    for (uint32_t i = 0; i < g->nspaces && most; i++) {
        struct space *s = g->space[i];
        if (!s->untouched.b || !can_move_out(s))
            continue;
        struct ranges held = {0};  // for now: what is told for good is in s->exits
        exits_look(s, &held);
        ranges_free(&held);
        struct leaf *l;
        for (uint64_t at = s->untouched.a;
             b->n < EDM_WINDOWS && most && (l = lspt_next(&s->lspt, at)) && l->base < s->untouched.b;
             at = l->base + LEAF_PAGES) {
            uint64_t mask = untouched_mask(s, l, most);
            if (mask)
                batch_choose(b, l, mask, 0);
            most -= (uint64_t)__builtin_popcountll(mask);
        }
        if (b->n)
            return s;
        s->untouched = (struct range){0};
    }
    return NULL;
}

// ---- what another userfaultfd has

void foreign_again(struct space *s) {
    struct ranges was = s->foreign;
    s->foreign = (struct ranges){0};
    for (uint32_t i = 0; i < was.n; i++)
        ranges_within(&s->wanted, was.v[i].a, was.v[i].b, &s->foreign);
    ranges_free(&was);
}

// No event is unread, and nothing is on its way out.
static bool quiet(struct edm_engine *g, struct space *s) {
    order_settle(g, s);
    return !s->applying && !s->batch_busy && !s->late && !s->unquiet && sidecar_idle(s) && !s->ops->changing(s);
}

// All of [a, b) is in the program. What the DMS has of it is dropped first: were it not, and this process killed in
// between, the next DM-Handler could be given it for what the program does there unseen.
static int give(struct edm_engine *g, struct space *s, uint64_t a, uint64_t b) {
    struct ranges ours = {0};
    int result = 0;
    ranges_within(&s->known, a, b, &ours);
    for (uint32_t i = 0; i < ours.n; i++)
        space_forget(s, ours.v[i].a, ours.v[i].b);
    state_commit(g);
    point(POINT_give_dropped);
    for (uint32_t i = 0; i < ours.n && !result; i++)
        result = uffd_unregister(s, ours.v[i].a, ours.v[i].b);
    point(POINT_give_done);
    // A move of pages to there that began meanwhile, of another thread, has an event that waits.
    bool changing = s->ops->changing(s);
    for (uint32_t i = 0; i < ours.n; i++) {
        ranges_del(&s->known, ours.v[i].a, ours.v[i].b);
        ranges_del(&s->doubtful, ours.v[i].a, ours.v[i].b);
        if (result || changing)
            uffd_register(s, ours.v[i].a, ours.v[i].b);  // for the next sweep to find
        else {
            ranges_add(&s->foreign, ours.v[i].a, ours.v[i].b);
            g->count.given += ours.v[i].b - ours.v[i].a;
        }
    }
    ranges_free(&ours);
    return result ? result : changing ? -EAGAIN : 0;
}

// ---- the request

static void rest(struct edm_engine *g) {
    pthread_mutex_unlock(&g->mu);
    usleep(BRING_ROUND_US);
    pthread_mutex_lock(&g->mu);
}

// Waits as long as a fault would. -ECANCELED when this engine ends: another will be asked.
static int make_room(struct edm_engine *g, struct space *s, uint64_t a, uint64_t b, bool missing) {
    struct bringing w = {0};
    int result = -ECANCELED;
    while (s->giving && !s->dead && !atomic_load(&g->stop))
        rest(g);
    s->giving = true;
    ranges_add(&s->wanted, a, b);
    s->sweep_soon |= s->asks && !s->held_seen;
    if (missing && s->ready) {
        s->untouched = (struct range){a, b};
        pthread_cond_signal(&g->lpet_wake);
    }
    for (uint32_t round = 0; !s->dead && !atomic_load(&g->stop); round++) {
        if (round == PATIENCE_ROUNDS || !s->ready)
            s->untouched = (struct range){0};
        bool still = quiet(g, s);
        if (!space_bring(g, s, a, b, true, &w))
            continue;
        if (still && !s->untouched.b) {
            result = give(g, s, a, b);
            break;
        }
        rest(g);
    }
    s->untouched = (struct range){0};
    s->giving = false;
    return s->dead ? 0 : result;
}

// Until the program says that it has registered what it wanted, or hangs up.
static void wait_for_end(struct edm_engine *g, const struct space *s, int sock) {
    struct pollfd p = {sock, POLLIN, 0};
    bool alive = true;
    while (alive && !atomic_load(&g->stop) && poll(&p, 1, LOOK_MS) == 0) {
        pthread_mutex_lock(&g->mu);
        alive = !s->dead;
        pthread_mutex_unlock(&g->mu);
    }
}

void foreign_serve(struct edm_engine *g, int sock, int pid) {
    struct edm_wanted what;
    struct edm_reply reply = {EDM_CTL_MAGIC, 0};
    struct pollfd p = {sock, POLLIN, 0};
    if (poll(&p, 1, WANTED_MS) != 1 || recv(sock, &what, sizeof what, 0) != (ssize_t)sizeof what)
        return;
    uint64_t a = what.at >> PAGE_SHIFT, n = (what.bytes >> PAGE_SHIFT) + (what.bytes % PAGE_SIZE_ != 0);
    pthread_mutex_lock(&g->mu);
    struct space *s = a < LSPT_MAX_PAGE && n <= LSPT_MAX_PAGE - a ? space_alive(g, pid) : NULL;
    if (s) {
        s->refs++;
        reply.status = make_room(g, s, a, a + n, what.missing);
    }
    pthread_mutex_unlock(&g->mu);
    if (reply.status != -ECANCELED && send(sock, &reply, sizeof reply, MSG_NOSIGNAL) == (ssize_t)sizeof reply && s)
        wait_for_end(g, s, sock);
    if (!s)
        return;
    pthread_mutex_lock(&g->mu);
    ranges_del(&s->wanted, a, a + n);
    ranges_del(&s->blank, a, a + n);
    s->sweep_soon = true;
    if (!s->dead)
        s->ops->wake(s, a, n);
    space_unref(s);
    pthread_mutex_unlock(&g->mu);
}
