// A program's pages all brought back: before a fork that the kernel will not tell us of (no CAP_SYS_PTRACE), since what
// is absent then would be zeros in the child. Nothing leaves until the fork is over: see space_whole.
#include <errno.h>
#include <pthread.h>
#include <unistd.h>

#include "engine.h"

#define ASK_AGAIN_ROUNDS 400  // what became of a fault that was put off is not told: ask again now and then
#define LOST_ROUNDS 4000      // lost pages never come, and what is lost for the parent is for its child

static uint64_t absent_in_table(struct edm_engine *g, struct space *s, uint64_t a, uint64_t b, bool zeros, bool ask) {
    uint64_t n = 0;
    struct leaf *l;
    for (uint64_t at = a; (l = lspt_next(&s->lspt, at)) && l->base < b; at = l->base + LEAF_PAGES)
        for (uint64_t i = 0; i < LEAF_PAGES; i++) {
            uint64_t page = l->base + i;
            enum page_state state = (enum page_state)l->e[i].state;
            if (page < a || page >= b || state == PS_RESIDENT || (zeros ? state == PS_NEW : state_new(state)))
                continue;
            n++;
            if (ask && (state == PS_REMOTE || state == PS_STAGED || state == PS_ZERO))
                queue_push(&g->ready, s, page, 0);
        }
    return n;
}

// Of an adopted program only the DMS knows what it has of the pages that are not there.
static uint64_t absent_and_unknown(struct edm_engine *g, struct space *s, uint64_t a, uint64_t b, bool ask) {
    uint64_t n = 0, map[512];
    for (uint32_t k = 0; k < s->known.n; k++) {
        uint64_t end = s->known.v[k].b < b ? s->known.v[k].b : b;
        for (uint64_t at = s->known.v[k].a > a ? s->known.v[k].a : a; at < end;) {
            uint64_t count = end - at < 512 ? end - at : 512;
            ssize_t r = pread(s->pagemap_fd, map, count * sizeof map[0], (off_t)(at * sizeof map[0]));
            if (r <= 0)
                return n;  // it has ended
            for (uint64_t i = 0; i < (uint64_t)r / sizeof map[0]; i++) {
                struct lspt_entry *e = lspt_entry(&s->lspt, at + i);
                if (map[i] >> 62 || (e && !state_new((enum page_state)e->state)) || ranges_has(&s->blank, at + i))
                    continue;
                n++;
                if (ask)
                    queue_push(&g->ready, s, at + i, 0);
            }
            at += (uint64_t)r / sizeof map[0];
        }
    }
    return n;
}

// Pages of [a, b) that are not in the program now, without those that never were; `zeros`: with those that are zeros;
// `ask`: have them brought. Of an adopted program it is not known before a sweep has found what was registered.
static uint64_t absent(struct edm_engine *g, struct space *s, uint64_t a, uint64_t b, bool zeros, bool ask) {
    if (s->applying || (s->asks && s->ctl && (!s->held_seen || (s->ready && s->sweep_soon))))
        return UINT64_MAX;
    return absent_in_table(g, s, a, b, zeros, ask) + (s->asks ? absent_and_unknown(g, s, a, b, ask) : 0);
}

struct space *space_alive(struct edm_engine *g, int pid) {
    for (uint32_t i = 0; i < g->nspaces; i++)
        if (!g->space[i]->dead && g->space[i]->pid == pid)
            return g->space[i];
    return NULL;
}

bool space_bring(struct edm_engine *g, struct space *s, uint64_t a, uint64_t b, bool zeros, struct bringing *w) {
    bool ask = !w->asked || ++w->round - w->asked >= ASK_AGAIN_ROUNDS;
    uint64_t left = absent(g, s, a, b, zeros, ask);
    if (ask && left != UINT64_MAX)
        w->asked = ++w->round;
    w->still = left < w->before ? 0 : w->still + 1;
    w->before = left;
    if (!left || (left <= s->lost && w->still > LOST_ROUNDS))
        return true;
    pthread_mutex_unlock(&g->mu);
    if (ask)
        engine_kick(g);
    usleep(BRING_ROUND_US);
    pthread_mutex_lock(&g->mu);
    return false;
}

// Waits as long as a fault would. 0, or -ECANCELED when this engine ends: another will be asked.
int space_make_whole(struct edm_engine *g, int pid) {
    struct bringing w = {0};
    pthread_mutex_lock(&g->mu);
    struct space *s = space_alive(g, pid);
    if (s)
        s->refs++;
    while (s && !s->dead && !atomic_load(&g->stop) && !space_bring(g, s, 0, LSPT_MAX_PAGE, false, &w))
        continue;
    int result = atomic_load(&g->stop) ? -ECANCELED : 0;
    if (s)
        space_unref(s);
    pthread_mutex_unlock(&g->mu);
    return result;
}

static void *making_thread(void *space) {
    struct space *s = space;
    struct edm_engine *g = s->engine;
    pthread_mutex_lock(&g->mu);
    uint32_t asked = s->whole_asked;
    int pid = s->pid;
    pthread_mutex_unlock(&g->mu);
    int r = space_make_whole(g, pid);
    pthread_mutex_lock(&g->mu);
    if (!r && s->ctl)
        __atomic_store_n(&s->ctl->whole_done, asked, __ATOMIC_RELEASE);
    s->making_whole = false;
    space_unref(s);
    g->handshakes--;
    pthread_cond_signal(&g->handshake_done);
    pthread_mutex_unlock(&g->mu);
    return NULL;
}

// A program that may not make the system calls of asking has left word in its control page. With the lock held.
void whole_look(struct edm_engine *g, struct space *s) {
    uint32_t asked = s->ctl ? __atomic_load_n(&s->ctl->whole_asked, __ATOMIC_ACQUIRE) : 0;
    pthread_t t;
    if (s->making_whole || !s->ctl || asked == __atomic_load_n(&s->ctl->whole_done, __ATOMIC_ACQUIRE))
        return;
    s->whole_asked = asked;
    if (pthread_create(&t, NULL, making_thread, s))
        return;  // with the next look
    pthread_detach(t);
    s->making_whole = true;
    s->refs++;
    g->handshakes++;
}
