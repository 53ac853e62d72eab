// The outbox and the write-back buffer on their own, against a list of what was put in: one order, refused writes again
// before anything newer, cancelled ones skipped, slots given back once.
#include "check.h"

#define PAGES 96
#define MOST 8000

struct put {
    int kind;
    uint64_t page;
    bool cancelled, flying, done;
};

static struct edm_engine *g;
static struct edm_replay *program;
static struct space *s;
static struct put put[MOST];
static uint32_t nputs;
static uint64_t seed = 7, sent, refused, cancelled;

static uint64_t below(uint64_t n) { return next_random(&seed) % n; }

static void fill(uint8_t *page, uint64_t n) {
    memset(page, 0, PAGE_SIZE_);
    memcpy(page, &n, sizeof n);
}

// What the LPET does with a page that has left the program; the version is the number of the put.
static void put_eviction(uint64_t page) {
    int slot = write_slot_get(g);
    if (slot < 0) {
        CHECK(g->slots_used == g->nslots);
        return;
    }
    uint8_t *data = write_slot_data(g, (uint32_t)slot);
    fill(data, nputs);
    uint32_t id = outbox_push(g, EDM_OUT_EVICT, s);
    struct outbox_item *o = outbox_item_at(g, id);
    o->page = o->a = page;
    o->version = nputs;
    o->checksum = edm_crc32c(data, PAGE_SIZE_);
    o->slot = (uint32_t)slot;
    struct lspt_entry *e = lspt_entry_make(&s->lspt, s, page);
    e->state = PS_STAGED;
    e->where = id;
    put[nputs++] = (struct put){.kind = EDM_OUT_EVICT, .page = page};
}

static void rescue(uint64_t page, struct lspt_entry *e) {
    struct outbox_item *o = outbox_item_at(g, e->where);
    CHECK(o->page == page);
    struct put *p = &put[o->version];
    p->cancelled = true;
    p->done |= !p->flying;
    cancelled++;
    outbox_cancel(g, e->where);
    e->state = PS_NEW;
    e->where = 0;
}

static void put_something(void) {
    uint64_t page = below(PAGES);
    if (nputs == MOST)
        return;
    pthread_mutex_lock(&g->mu);
    struct lspt_entry *e = lspt_entry(&s->lspt, page);
    if (below(20) == 0) {
        uint32_t id = outbox_push(g, EDM_OUT_DROP, s);
        outbox_item_at(g, id)->a = nputs;  // names this put; the engine does not look at it
        put[nputs++] = (struct put){.kind = EDM_OUT_DROP};
    } else if (e && e->state == PS_STAGED) {
        if (below(2))
            rescue(page, e);
    } else {
        put_eviction(page);
    }
    pthread_mutex_unlock(&g->mu);
}

static void all_done_before(uint32_t n, int kind) {
    for (uint32_t i = 0; i < n; i++)
        if (!put[i].done && (kind == EDM_OUT_DROP || put[i].kind == EDM_OUT_DROP))
            FAIL("%u was sent before %u was done", n, i);
}

static void check_eviction(const struct edm_outbox *out, int i) {
    uint64_t n = out->refs[i].version;
    uint8_t want[PAGE_SIZE_];
    fill(want, n);
    CHECK(n < nputs && put[n].kind == EDM_OUT_EVICT && out->refs[i].index == put[n].page);
    CHECK(!put[n].cancelled);
    CHECK(!put[n].done);
    CHECK(!memcmp(out->pages + (size_t)i * PAGE_SIZE_, want, PAGE_SIZE_));
    CHECK(out->refs[i].checksum == edm_crc32c(want, PAGE_SIZE_));
    CHECK(!i || out->refs[i - 1].version < n);
    all_done_before((uint32_t)n, EDM_OUT_EVICT);
    put[n].flying = true;
    sent++;
}

static void answer(struct edm_outbox *out, int i, uint32_t refuse) {
    struct put *p = &put[out->refs[i].version];
    p->flying = false;
    out->refs[i].status = below(100) < refuse;
    refused += out->refs[i].status;
    p->done = !out->refs[i].status || p->cancelled;  // nobody needs a refused write of a page that was rescued
}

// Takes one message; between the sending and the answer, pages may be rescued.
static bool carry(uint32_t refuse) {
    struct edm_outbox out;
    pthread_mutex_lock(&g->mu);
    g->outbox_urgent = true;
    pthread_mutex_unlock(&g->mu);
    if (edm_outbox_poll(g, &out, 0) != 1)
        return false;
    if (out.kind == EDM_OUT_DROP) {
        all_done_before((uint32_t)out.a, EDM_OUT_DROP);
        put[out.a].done = true;
    } else if (out.kind == EDM_OUT_EVICT) {
        for (int i = 0; i < out.n; i++)
            check_eviction(&out, i);
        for (int k = 0; k < 3; k++)
            put_something();
        for (int i = 0; i < out.n; i++)
            answer(&out, i, refuse);
    }
    edm_outbox_done(g, &out);
    return true;
}

static void check_table(void) {
    uint64_t staged = 0;
    for (uint64_t page = 0; page < PAGES; page++) {
        struct lspt_entry *e = lspt_entry(&s->lspt, page);
        if (!e || e->state == PS_NEW)
            continue;
        uint64_t n = e->state == PS_STAGED ? outbox_item_at(g, e->where)->version : entry_version(e);
        CHECK(put[n].page == page && put[n].done == (e->state == PS_REMOTE) && !put[n].cancelled);
        staged += e->state == PS_STAGED;
    }
    CHECK(g->slots_used == staged && g->slots_used <= g->nslots);
}

int main(void) {
    struct edm_engine_config config = {.write_back_pages = 48};
    g = edm_engine_new(&config);
    CHECK(g);
    watch(g, 60);
    program = edm_replay_open(g, 1, PAGES);
    CHECK(program);
    s = g->space[0];
    nputs = 1;  // version 0 is none
    put[0].done = true;
    while (nputs < MOST) {
        for (uint64_t k = below(30); k > 0 && nputs < MOST; k--)
            put_something();
        for (uint64_t k = below(4); k > 0; k--) {
            carry(20);
            check_table();
        }
    }
    while (carry(0))
        check_table();
    all_done_before(nputs, EDM_OUT_DROP);
    if (!refused || !cancelled || sent < MOST / 4)
        FAIL("sent %" PRIu64 ", refused %" PRIu64 ", cancelled %" PRIu64, sent, refused, cancelled);
    CHECK(g->head == 0 && g->tail == 0 && g->queued == 0 && g->slots_used == 0 && !g->error[0]);
    edm_replay_close(program);
    edm_engine_free(g);
    return 0;
}
