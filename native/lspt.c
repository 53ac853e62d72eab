// The LSPT: which page of a captured program is where. A three-level radix tree over page numbers whose leaves hold
// 64 entries of 15 bytes; only what was touched has a leaf. Also sorted page ranges.
#include <stdlib.h>
#include <string.h>

#include "engine.h"

#define LEAF_NUMBER(page) ((page) / LEAF_PAGES)
#define I0(n) ((n) >> (2 * RADIX_BITS) & (RADIX_SIZE - 1))
#define I1(n) ((n) >> RADIX_BITS & (RADIX_SIZE - 1))
#define I2(n) ((n) & (RADIX_SIZE - 1))

struct leaf *lspt_leaf(const struct lspt *t, uint64_t page) {
    if (page >= LSPT_MAX_PAGE)
        return NULL;
    uint64_t n = LEAF_NUMBER(page);
    struct radix1 *r1 = t->root[I0(n)];
    struct radix2 *r2 = r1 ? r1->next[I1(n)] : NULL;
    return r2 ? r2->leaf[I2(n)] : NULL;
}

struct leaf *lspt_leaf_make(struct lspt *t, struct space *s, uint64_t page) {
    uint64_t n = LEAF_NUMBER(page);
    struct radix1 **r1 = &t->root[I0(n)];
    if (!*r1)
        *r1 = xcalloc(1, sizeof **r1);
    struct radix2 **r2 = &(*r1)->next[I1(n)];
    if (!*r2) {
        *r2 = xcalloc(1, sizeof **r2);
        (*r1)->used++;
    }
    struct leaf **l = &(*r2)->leaf[I2(n)];
    if (!*l) {
        *l = xcalloc(1, sizeof **l);
        (*l)->space = s;
        (*l)->base = n * LEAF_PAGES;
        (*r2)->used++;
        t->leaves++;
    }
    return *l;
}

struct lspt_entry *lspt_entry(const struct lspt *t, uint64_t page) {
    struct leaf *l = lspt_leaf(t, page);
    return l ? &l->e[page % LEAF_PAGES] : NULL;
}

struct lspt_entry *lspt_entry_make(struct lspt *t, struct space *s, uint64_t page) {
    return &lspt_leaf_make(t, s, page)->e[page % LEAF_PAGES];
}

struct leaf *lspt_next(const struct lspt *t, uint64_t page) {
    if (page >= LSPT_MAX_PAGE)
        return NULL;
    uint64_t n = LEAF_NUMBER(page), end = LEAF_NUMBER(LSPT_MAX_PAGE);
    while (n < end) {
        struct radix1 *r1 = t->root[I0(n)];
        if (!r1) {
            n = ((n >> (2 * RADIX_BITS)) + 1) << (2 * RADIX_BITS);
            continue;
        }
        struct radix2 *r2 = r1->next[I1(n)];
        if (!r2) {
            n = ((n >> RADIX_BITS) + 1) << RADIX_BITS;
            continue;
        }
        if (r2->leaf[I2(n)])
            return r2->leaf[I2(n)];
        n++;
    }
    return NULL;
}

void lspt_leaf_free(struct lspt *t, struct leaf *leaf) {
    uint64_t n = LEAF_NUMBER(leaf->base);
    struct radix1 *r1 = t->root[I0(n)];
    struct radix2 *r2 = r1->next[I1(n)];
    r2->leaf[I2(n)] = NULL;
    free(leaf);
    t->leaves--;
    if (--r2->used)
        return;
    r1->next[I1(n)] = NULL;
    free(r2);
    if (--r1->used)
        return;
    t->root[I0(n)] = NULL;
    free(r1);
}

// ---- ranges

// Index of the first range that ends after `page`.
static uint32_t ranges_find(const struct ranges *r, uint64_t page) {
    uint32_t lo = 0, hi = r->n;
    while (lo < hi) {
        uint32_t mid = (lo + hi) / 2;
        if (r->v[mid].b <= page)
            lo = mid + 1;
        else
            hi = mid;
    }
    return lo;
}

static void ranges_insert(struct ranges *r, uint32_t at, uint64_t a, uint64_t b) {
    if (r->n == r->cap) {
        r->cap = r->cap ? r->cap * 2 : 64;
        r->v = xrealloc(r->v, r->cap * sizeof *r->v);
    }
    memmove(r->v + at + 1, r->v + at, (r->n - at) * sizeof *r->v);
    r->v[at] = (struct range){a, b};
    r->n++;
}

void ranges_append(struct ranges *r, uint64_t a, uint64_t b) { ranges_insert(r, r->n, a, b); }

static void ranges_erase(struct ranges *r, uint32_t at, uint32_t count) {
    memmove(r->v + at, r->v + at + count, (r->n - at - count) * sizeof *r->v);
    r->n -= count;
}

void ranges_add(struct ranges *r, uint64_t a, uint64_t b) {
    if (a >= b)
        return;
    uint32_t i = ranges_find(r, a), j;
    if (i > 0 && r->v[i - 1].b == a)
        i--;
    for (j = i; j < r->n && r->v[j].a <= b; j++) {
        if (r->v[j].a < a)
            a = r->v[j].a;
        if (r->v[j].b > b)
            b = r->v[j].b;
    }
    if (j == i) {
        ranges_insert(r, i, a, b);
        return;
    }
    r->v[i] = (struct range){a, b};
    ranges_erase(r, i + 1, j - i - 1);
}

void ranges_del(struct ranges *r, uint64_t a, uint64_t b) {
    if (a >= b)
        return;
    uint32_t i = ranges_find(r, a);
    while (i < r->n && r->v[i].a < b) {
        struct range x = r->v[i];
        if (x.a < a && x.b > b) {
            r->v[i].b = a;
            ranges_insert(r, i + 1, b, x.b);
            return;
        }
        if (x.a < a) {
            r->v[i].b = a;
            i++;
        } else if (x.b > b) {
            r->v[i].a = b;
            return;
        } else {
            ranges_erase(r, i, 1);
        }
    }
}

const struct range *ranges_at(const struct ranges *r, uint64_t page) {
    uint32_t i = ranges_find(r, page);
    return i < r->n && r->v[i].a <= page ? &r->v[i] : NULL;
}

bool ranges_has(const struct ranges *r, uint64_t page) { return ranges_at(r, page) != NULL; }

bool ranges_touch(const struct ranges *r, uint64_t a, uint64_t b) {
    uint32_t i = ranges_find(r, a);
    return a < b && i < r->n && r->v[i].a < b;
}

bool ranges_gap(const struct ranges *r, uint64_t *a, uint64_t b, uint64_t *e) {
    while (*a < b) {
        uint32_t i = ranges_find(r, *a);
        if (i == r->n || r->v[i].a >= b) {
            *e = b;
            return true;
        }
        if (r->v[i].a > *a) {
            *e = r->v[i].a;
            return true;
        }
        *a = r->v[i].b;
    }
    return false;
}

void ranges_within(const struct ranges *r, uint64_t a, uint64_t b, struct ranges *out) {
    while (a < b) {
        uint64_t from = a, e;
        bool gap = ranges_gap(r, &from, b, &e);
        ranges_add(out, a, gap ? from : b);
        a = gap ? e : b;
    }
}

void ranges_free(struct ranges *r) {
    free(r->v);
    *r = (struct ranges){0};
}
