// In which order pages leave. The engine keeps leaves in queues and evicts from the first on, coldest first; a policy
// says where a leaf stands (edm_ops.h, "edm.policy_ops"). Three are built in; edm/plugins/policy_* are their models.
#include "engine.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <unistd.h>

// ---- queues ---------------------------------------------------------------------------------------------------

static uint32_t leaf_pages(const struct leaf *l) { return (uint32_t)__builtin_popcountll(l->resident); }

void leaf_unlist(struct edm_engine *g, struct leaf *l) {
    if (!l->listed)
        return;
    struct leaf_queue *q = &g->queue[l->queue];
    *(l->older ? &l->older->newer : &q->coldest) = l->newer;
    *(l->newer ? &l->newer->older : &q->hottest) = l->older;
    l->older = l->newer = NULL;
    l->listed = false;
    q->pages -= leaf_pages(l);
}

static void leaf_enlist(struct edm_engine *g, struct leaf *l, uint32_t queue) {
    struct leaf_queue *q = &g->queue[queue];
    if (l->listed && l == q->hottest)
        return;
    leaf_unlist(g, l);
    l->older = q->hottest;
    *(q->hottest ? &q->hottest->newer : &q->coldest) = l;
    q->hottest = l;
    l->queue = queue % EDM_POLICY_QUEUES;
    l->listed = true;
    q->pages += leaf_pages(l);
}

void leaf_cold(struct edm_engine *g, struct leaf *l) {
    leaf_unlist(g, l);
    struct leaf_queue *q = &g->queue[0];
    l->newer = q->coldest;
    *(q->coldest ? &q->coldest->older : &q->hottest) = l;
    q->coldest = l;
    l->queue = 0;
    l->listed = true;
    q->pages += leaf_pages(l);
}

void leaf_pass(struct edm_engine *g, struct leaf *l) { leaf_enlist(g, l, l->queue); }

// ---- what a policy is asked -----------------------------------------------------------------------------------

static struct edm_policy_view view(const struct edm_engine *g) {
    struct edm_policy_view v = {.capacity = g->limit};
    for (uint32_t i = 0; i < EDM_POLICY_QUEUES; i++)
        v.pages[i] = g->queue[i].pages;
    return v;
}

static struct edm_policy_leaf described(const struct edm_engine *g, const struct leaf *l, bool back) {
    return (struct edm_policy_leaf){.queue = l->listed ? l->queue : EDM_POLICY_NOWHERE,
                                    .pages = leaf_pages(l),
                                    .away = l->left_at ? g->evicted - l->left_at : UINT64_MAX,
                                    .back = back};
}

// Not more often than there are leaves to move: a policy that never has enough must not hold everything up.
static void balance(struct edm_engine *g) {
    const struct edm_policy_ops *p = g->policy;
    uint32_t from = 0, to = 0;
    for (int i = 0; p->balance && i < LEAF_PAGES; i++) {
        struct edm_policy_view v = view(g);
        if (!p->balance(p->self, &v, &from, &to) || from >= EDM_POLICY_QUEUES || to >= EDM_POLICY_QUEUES ||
            !g->queue[from].coldest)
            return;
        leaf_enlist(g, g->queue[from].coldest, to);
    }
}

void leaf_arrived(struct edm_engine *g, struct leaf *l, bool back) {
    const struct edm_policy_ops *p = g->policy;
    struct edm_policy_view v = view(g);
    struct edm_policy_leaf t = described(g, l, back);
    uint32_t queue = p->arrived(p->self, &v, &t);
    if (queue < EDM_POLICY_QUEUES)
        leaf_enlist(g, l, queue);
    else if (!l->listed)
        leaf_enlist(g, l, 0);
    if (p->balance)
        balance(g);
}

void leaf_left(struct edm_engine *g, struct leaf *l) {
    if (!++g->evicted)
        g->evicted = 1;  // 0 says that nothing ever left
    l->left_at = g->evicted;
}

bool leaf_may_leave(struct edm_engine *g, struct leaf *l) {
    const struct edm_policy_ops *p = g->policy;
    if (!p->leaving)
        return true;
    struct edm_policy_view v = view(g);
    struct edm_policy_leaf t = described(g, l, false);
    uint32_t queue = p->leaving(p->self, &v, &t, p->looks ? leaf_idle(g, l) : EDM_POLICY_UNKNOWN);
    if (queue >= EDM_POLICY_QUEUES)
        return true;
    leaf_enlist(g, l, queue);
    return false;
}

int edm_engine_policy(struct edm_engine *g, const void *ops, const char *idle_bits) {
    const struct edm_policy_ops *p = ops;
    if (p->version != EDM_OPS_VERSION || p->bytes < sizeof *p || !p->arrived)
        return -EINVAL;
    pthread_mutex_lock(&g->mu);
    g->policy = p;
    if (p->looks && g->idle_fd < 0)
        g->idle_fd = open(idle_bits, O_RDWR | O_CLOEXEC);
    int r = p->looks && g->idle_fd < 0 ? errno : 0;
    pthread_mutex_unlock(&g->mu);
    return r;
}

// ---- idle bits ------------------------------------------------------------------------------------------------

// Source: Documentation/admin-guide/mm/idle_page_tracking.rst: a bit a frame; writing ones marks frames idle, and the
// kernel clears a bit when the frame is accessed. A frame shared with others is idle only if none of them accessed it.
enum edm_policy_idle leaf_idle(struct edm_engine *g, struct leaf *l) {
    struct space *s = l->space;
    bool known = false, touched = false;
    if (g->idle_fd < 0 || !s->ops->pfn)
        return EDM_POLICY_UNKNOWN;
    for (uint64_t m = l->resident; m; m &= m - 1) {
        uint64_t pfn = s->ops->pfn(s, l->base + (uint64_t)__builtin_ctzll(m)), word = 0;
        off_t at = (off_t)(pfn / 64 * sizeof word);
        if (!pfn || pread(g->idle_fd, &word, sizeof word, at) != (ssize_t)sizeof word)
            continue;
        uint64_t bit = 1ull << (pfn % 64);
        known = true;
        touched |= !(word & bit);
        if (pwrite(g->idle_fd, &bit, sizeof bit, at) != (ssize_t)sizeof bit)
            known = false;
    }
    return !known ? EDM_POLICY_UNKNOWN : touched ? EDM_POLICY_TOUCHED : EDM_POLICY_IDLE;
}

// ---- fifo, clock, scan ----------------------------------------------------------------------------------------

static uint32_t in_order_of_arrival(void *self, const struct edm_policy_view *v, const struct edm_policy_leaf *l) {
    (void)self;
    (void)v;
    return l->queue == EDM_POLICY_NOWHERE ? 0 : EDM_POLICY_STAY;
}

static uint32_t second_chance(void *self, const struct edm_policy_view *v, const struct edm_policy_leaf *l, int idle) {
    (void)self;
    (void)v;
    (void)l;
    return idle == EDM_POLICY_TOUCHED ? 0 : EDM_POLICY_LEAVE;
}

enum { PROBATION, KEPT };

struct edm_policy {
    struct edm_policy_ops ops;
    uint32_t kept_percent;
};

// The refault distance: so many pages have left since this one did. See edm/plugins/policy_scan.
static uint32_t scan_arrived(void *self, const struct edm_policy_view *v, const struct edm_policy_leaf *l) {
    (void)self;
    if (l->back && l->away <= v->capacity)
        return KEPT;
    return l->queue == EDM_POLICY_NOWHERE ? PROBATION : l->queue;
}

static int scan_balance(void *self, const struct edm_policy_view *v, uint32_t *from, uint32_t *to) {
    const struct edm_policy *p = self;
    *from = KEPT;
    *to = PROBATION;
    return v->pages[KEPT] * 100 > v->capacity * p->kept_percent;
}

static struct edm_policy *policy_new(struct edm_policy_ops ops, uint32_t kept_percent) {
    struct edm_policy *p = calloc(1, sizeof *p);
    if (!p)
        return NULL;
    p->ops = ops;
    p->ops.version = EDM_OPS_VERSION;
    p->ops.bytes = sizeof p->ops;
    p->ops.self = p;
    p->kept_percent = kept_percent;
    return p;
}

struct edm_policy *edm_policy_fifo(void) {
    return policy_new((struct edm_policy_ops){.arrived = in_order_of_arrival}, 0);
}

struct edm_policy *edm_policy_clock(bool idle_bits) {
    return policy_new(
        (struct edm_policy_ops){.looks = idle_bits, .arrived = in_order_of_arrival, .leaving = second_chance}, 0);
}

struct edm_policy *edm_policy_scan(uint32_t kept_percent) {
    return policy_new((struct edm_policy_ops){.arrived = scan_arrived, .balance = scan_balance}, kept_percent);
}

void edm_policy_free(struct edm_policy *p) { free(p); }
