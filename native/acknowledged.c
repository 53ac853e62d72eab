// Which pages the DMS has, by the names it knows them by: a bit a page in the segment of state.h, set and cleared when
// the DMS has acknowledged what makes it so, in its order. A DM-Handler that takes over knows of a page that is not in
// the program neither version nor checksum; but with its bit set, "new page" is not the answer for it (faults.c).
//
// A table of (region, 64 pages) → bits, open to the next free entry. Killed between any two instructions the next
// DM-Handler finds no bit more than there should be: the outbox item is still there, and is done again.
#include "engine.h"

#include <string.h>
#include <sys/mman.h>

#define LEAST 9
#define GROUP(page) ((page) / LEAF_PAGES)
#define BIT(page) (1ull << ((page) % LEAF_PAGES))

static struct state_known *table_of(const struct edm_engine *g, uint32_t power) {
    return g->known_pages + ((uint64_t)1 << power);
}

static struct state_known *table(const struct edm_engine *g) { return table_of(g, g->state->known_power); }

static uint64_t entries(const struct edm_engine *g) { return (uint64_t)1 << g->state->known_power; }

static uint64_t place(uint64_t region, uint64_t group, uint64_t size) {
    uint64_t x = (region * 0x9e3779b97f4a7c15u) ^ (group * 0xbf58476d1ce4e5b9u);
    x = (x ^ x >> 32) * 0x94d049bb133111ebu;
    return (x ^ x >> 29) & (size - 1);
}

// The entry of a group, or the free one where it would be.
static struct state_known *find(struct state_known *t, uint64_t size, uint64_t region, uint64_t group) {
    uint64_t i = place(region, group, size);
    while (t[i].region && (t[i].region != region || t[i].group != group))
        i = (i + 1) & (size - 1);
    return &t[i];
}

// Into a table of another size, without the entries that have no bit left.
static bool rebuild(struct edm_engine *g, uint64_t wanted) {
    struct state_known *from = table(g), *into;
    uint64_t n = entries(g);
    uint32_t power = LEAST, old = g->state->known_power;
    while (power < STATE_KNOWN_MOST && (uint64_t)1 << power < 4 * wanted)
        power++;
    if (power == old)
        power++;
    uint64_t size = (uint64_t)1 << power;
    if (power > STATE_KNOWN_MOST || wanted > size / 2)
        return false;  // 8 million groups, 2 TiB where they are full: nothing more is noted
    into = table_of(g, power);
    madvise(into, size * sizeof *into, MADV_REMOVE);  // what a DM-Handler that was killed here has left
    uint64_t used = 0;
    for (uint64_t i = 0; i < n; i++)
        if (from[i].bits) {
            *find(into, size, from[i].region, from[i].group) = from[i];
            used++;
        }
    STATE_BARRIER();
    g->state->known_power = power;
    g->known_used = used;
    madvise(from, n * sizeof *from, MADV_REMOVE);
    return true;
}

// Room for `more` groups that are not there yet: until then no entry changes its place.
static bool reserve(struct edm_engine *g, uint64_t more) {
    if (g->known_used + more <= entries(g) / 2)
        return true;
    uint64_t n = more;
    for (uint64_t i = 0; i < entries(g); i++)
        n += table(g)[i].bits != 0;
    return rebuild(g, n);
}

static void add(struct edm_engine *g, uint64_t region, uint64_t group, uint64_t bits) {
    struct state_known *e = find(table(g), entries(g), region, group);
    if (!e->region) {
        *e = (struct state_known){.group = group};
        STATE_BARRIER();
        e->region = region;
        g->known_used++;
    }
    e->bits |= bits;
}

// Those bits of an entry that are of pages [a, b).
static uint64_t within(const struct state_known *e, uint64_t a, uint64_t b) {
    uint64_t base = e->group * LEAF_PAGES, bits = e->bits;
    if (base >= b || base + LEAF_PAGES <= a)
        return 0;
    if (a > base)
        bits &= ~0ull << (a - base);
    if (b < base + LEAF_PAGES)
        bits &= BIT(b) - 1;
    return bits;
}

// The next entry that has pages of [a, b): by name where these are few, or else by looking at all. NULL at the end.
static struct state_known *next(struct edm_engine *g, uint64_t region, uint64_t a, uint64_t b, uint64_t *at) {
    uint64_t n = entries(g), groups = GROUP(b - 1) - GROUP(a) + 1;
    if (groups >= n) {
        for (struct state_known *e; *at < n;)
            if ((e = table(g) + (*at)++)->region == region && within(e, a, b))
                return e;
        return NULL;
    }
    while (*at < groups) {
        struct state_known *e = find(table(g), n, region, GROUP(a) + (*at)++);
        if (e->region && within(e, a, b))
            return e;
    }
    return NULL;
}

static void drop(struct edm_engine *g, uint64_t region, uint64_t a, uint64_t b) {
    struct state_known *e;
    for (uint64_t at = 0; a < b && (e = next(g, region, a, b, &at));)
        e->bits &= ~within(e, a, b);
}

// Each page has its new name before it has the old one no more. What was at the new one is no more.
static void move(struct edm_engine *g, uint64_t region, uint64_t from, uint64_t to, uint64_t count) {
    struct state_known *e;
    uint64_t n = 0;
    if (!count || from == to)
        return;
    drop(g, region, to, to + count);
    for (uint64_t at = 0; (e = next(g, region, from, from + count, &at));)
        n += 2;
    bool room = reserve(g, n);
    for (uint64_t at = 0; (e = next(g, region, from, from + count, &at));) {
        uint64_t bits = within(e, from, from + count), base = e->group * LEAF_PAGES;
        for (uint64_t m = room ? bits : 0; m; m &= m - 1) {
            uint64_t page = base + (uint64_t)__builtin_ctzll(m) - from + to;
            add(g, region, GROUP(page), BIT(page));
        }
        STATE_BARRIER();
        e->bits &= ~bits;
    }
}

static void copy(struct edm_engine *g, uint64_t region, uint64_t into) {
    struct state_known *e;
    uint64_t n = 0;
    for (uint64_t at = 0; (e = next(g, region, 0, LSPT_MAX_PAGE, &at));)
        n++;
    if (!reserve(g, n))
        return;
    for (uint64_t at = 0; (e = next(g, region, 0, LSPT_MAX_PAGE, &at));)
        add(g, into, e->group, e->bits);
}

void acknowledged_note(struct edm_engine *g, const struct outbox_item *o) {
    switch (o->kind) {
    case EDM_OUT_EVICT:
        if (reserve(g, 1))
            add(g, o->region, GROUP(o->a), BIT(o->a));
        break;
    case EDM_OUT_CLONE:
        copy(g, o->a, o->region);
        break;
    case EDM_OUT_MOVE:
        move(g, o->region, o->a, o->b, o->c);
        break;
    case EDM_OUT_DROP:
        drop(g, o->region, o->a, o->a + o->b);
        break;
    case EDM_OUT_DROP_REGION:
        drop(g, o->region, 0, LSPT_MAX_PAGE);
        break;
    default:
        break;
    }
}

bool acknowledged_has(const struct edm_engine *g, uint64_t region, uint64_t page) {
    const struct state_known *e = find(table(g), entries(g), region, GROUP(page));
    return e->region && e->bits & BIT(page);
}

void acknowledged_again(struct edm_engine *g) {
    g->known_used = 0;
    if (!g->state->known_power)
        g->state->known_power = LEAST;
    for (uint64_t i = 0; i < entries(g); i++)
        g->known_used += table(g)[i].region != 0;
}
