// The LSPT, page ranges and fault queues against models that are too simple to be wrong.
#include "check.h"

#include <unistd.h>

#define SPAN 512  // page numbers the range model covers

static uint64_t seed = 42;

static uint64_t below(uint64_t n) { return next_random(&seed) % n; }

// ---- ranges

static void ranges_agree(const struct ranges *r, const bool *model) {
    for (uint32_t i = 0; i < r->n; i++) {
        CHECK(r->v[i].a < r->v[i].b);
        CHECK(!i || r->v[i - 1].b < r->v[i].a);  // sorted, disjoint, and neighbours are one
    }
    for (uint64_t p = 0; p < SPAN; p++)
        if (ranges_has(r, p) != model[p])
            FAIL("page %" PRIu64 " is %sin the ranges", p, model[p] ? "not " : "");
}

static void gaps_agree(const struct ranges *r, const bool *model) {
    uint64_t a = below(SPAN), b = a + below(SPAN - a + 1), at = a, e, next = a;
    while (ranges_gap(r, &at, b, &e)) {
        CHECK(at >= next && at < e && e <= b);
        for (; next < at; next++)
            CHECK(model[next]);
        for (; next < e; next++)
            CHECK(!model[next]);
        at = e;
    }
    for (; next < b; next++)
        CHECK(model[next]);
    struct ranges in = {0};
    ranges_within(r, a, b, &in);
    for (uint64_t p = 0; p < SPAN; p++)
        CHECK(ranges_has(&in, p) == (p >= a && p < b && model[p]));
    ranges_free(&in);
}

static void ranges_match_a_bitmap(void) {
    for (int round = 0; round < 50; round++) {
        struct ranges r = {0};
        bool model[SPAN] = {0};
        for (int k = 0; k < 60; k++) {
            uint64_t a = below(SPAN), b = a + below(1 + below(2) * 40 + 10);
            b = b < SPAN ? b : SPAN;
            bool add = below(3) > 0;
            if (add)
                ranges_add(&r, a, b);
            else
                ranges_del(&r, a, b);
            for (uint64_t p = a; p < b; p++)
                model[p] = add;
            ranges_agree(&r, model);
            gaps_agree(&r, model);
        }
        ranges_free(&r);
        CHECK(!r.n && !r.v);
    }
}

// ---- LSPT

#define FEW 96

struct model_page {
    uint64_t page, version;
};

static uint64_t random_page(const struct model_page *model, uint32_t n) {
    uint64_t near = n ? model[below(n)].page : 0;
    switch (below(4)) {
    case 0:
        return (near + below(130)) % LSPT_MAX_PAGE;
    case 1:
        return below(2) ? LSPT_MAX_PAGE - 1 - below(200) : below(200);
    case 2:
        return (near ^ 1ull << below(35)) % LSPT_MAX_PAGE;
    default:
        return below(LSPT_MAX_PAGE);
    }
}

static uint64_t leaves_of(const struct model_page *model, uint32_t n) {
    uint64_t leaves = 0;
    for (uint32_t i = 0; i < n; i++) {
        bool seen = false;
        for (uint32_t k = 0; k < i && !seen; k++)
            seen = model[k].page / LEAF_PAGES == model[i].page / LEAF_PAGES;
        leaves += !seen;
    }
    return leaves;
}

static void walk_agrees(const struct lspt *t, const struct model_page *model, uint32_t n, uint64_t from) {
    uint64_t found = 0, last = 0;
    for (struct leaf *l; (l = lspt_next(t, from)); from = l->base + LEAF_PAGES) {
        CHECK(l->base % LEAF_PAGES == 0 && (!found || l->base > last));
        CHECK(l->base + LEAF_PAGES > from);
        last = l->base;
        found++;
        bool known = false;
        for (uint32_t i = 0; i < n && !known; i++)
            known = model[i].page / LEAF_PAGES == l->base / LEAF_PAGES;
        CHECK(known);
    }
    if (!from)
        CHECK(found == t->leaves);
}

static void lspt_matches_a_list(void) {
    for (int round = 0; round < 15; round++) {
        struct lspt *t = xcalloc(1, sizeof *t);
        struct model_page model[FEW];
        uint32_t n = 0;
        for (int k = 0; k < 150; k++) {
            uint64_t page = random_page(model, n);
            uint32_t i = 0;
            while (i < n && model[i].page != page)
                i++;
            struct lspt_entry *e = lspt_entry(t, page);
            CHECK(i == n ? !e || entry_version(e) == 0 : e && entry_version(e) == model[i].version);
            if (i == n && n < FEW) {
                model[n] = (struct model_page){page, below(1ull << 47) + 1};
                entry_set_version(lspt_entry_make(t, NULL, page), model[n].version);
                n++;
            } else if (n && below(3) == 0) {  // forget the leaf of one
                struct leaf *l = lspt_leaf(t, model[below(n)].page);
                uint64_t base = l->base;
                lspt_leaf_free(t, l);
                for (i = 0; i < n;)
                    if (model[i].page / LEAF_PAGES == base / LEAF_PAGES)
                        model[i] = model[--n];
                    else
                        i++;
            }
            CHECK(t->leaves == leaves_of(model, n));
            walk_agrees(t, model, n, below(2) ? 0 : random_page(model, n));
        }
        CHECK(!lspt_leaf(t, LSPT_MAX_PAGE) && !lspt_next(t, LSPT_MAX_PAGE));
        for (struct leaf *l; (l = lspt_next(t, 0));)
            lspt_leaf_free(t, l);
        for (int i = 0; i < RADIX_SIZE; i++)
            CHECK(!t->root[i]);  // an empty table keeps no memory
        free(t);
    }
}

static void entry_keeps_its_fields_apart(void) {
    struct lspt_entry e = {.state = PS_REMOTE, .flags = 0xf, .where = 0xffffffff, .checksum = 0xffffffff};
    for (int i = 0; i < 48; i++) {
        entry_set_version(&e, 1ull << i);
        CHECK(entry_version(&e) == 1ull << i);
    }
    CHECK(e.state == PS_REMOTE && e.flags == 0xf && e.where == 0xffffffff && e.checksum == 0xffffffff);
}

// ---- fault queues

static void queue_is_first_in_first_out(void) {
    struct space s = {.refs = 1};
    struct fault_queue q = {0};
    uint64_t in = 0, out = 0;
    for (int k = 0; k < 20000; k++) {
        struct fault f;
        if (below(2 + (uint64_t)(k % 1000 > 500)) == 0) {
            queue_push(&q, &s, in, (uint32_t)in + 1);
            in++;
        } else if (queue_pop(&q, &f)) {
            CHECK(f.space == &s && f.page == out && f.flags == (uint32_t)out + 1);
            s.refs--;
            out++;
        } else {
            CHECK(in == out);
        }
        CHECK(q.n == in - out && s.refs == 1 + q.n);
    }
    free(q.v);
}

// ---- idle bits

static uint64_t frame_of(struct space *s, uint64_t page) { return s->region + page; }

// The file is the kernel's: a bit a frame, in words of 64.
static void idle_bits_are_read_and_set(void) {
    char path[] = "/tmp/edm-idle-XXXXXX";
    int fd = mkstemp(path);
    CHECK(fd >= 0 && unlink(path) == 0);
    struct source_ops ops = {.pfn = frame_of};
    struct space s = {.ops = &ops, .region = 1000};
    struct leaf l = {.space = &s, .base = 64, .resident = 1ull << 30 | 1};  // frames 1064 and 1094
    struct edm_engine g = {.idle_fd = fd};
    uint64_t word[18] = {0};
    CHECK(pwrite(fd, word, sizeof word, 0) == sizeof word);
    CHECK(leaf_idle(&g, &l) == EDM_POLICY_TOUCHED);
    CHECK(pread(fd, word, sizeof word, 0) == sizeof word);
    for (int i = 0; i < 18; i++)  // 1064 = 16 * 64 + 40, 1094 = 17 * 64 + 6
        CHECK(word[i] == (i == 16 ? 1ull << 40 : i == 17 ? 1ull << 6 : 0));
    CHECK(leaf_idle(&g, &l) == EDM_POLICY_IDLE);
    word[17] = 0;  // the kernel clears the bit of what was touched
    CHECK(pwrite(fd, word, sizeof word, 0) == sizeof word);
    CHECK(leaf_idle(&g, &l) == EDM_POLICY_TOUCHED);
    s.region = 1 << 20;  // frames that the file does not have
    CHECK(leaf_idle(&g, &l) == EDM_POLICY_UNKNOWN);
    g.idle_fd = -1;
    CHECK(leaf_idle(&g, &l) == EDM_POLICY_UNKNOWN);
    close(fd);
}

int main(void) {
    idle_bits_are_read_and_set();
    ranges_match_a_bitmap();
    lspt_matches_a_list();
    entry_keeps_its_fields_apart();
    queue_is_first_in_first_out();
    return 0;
}
