// Pages the kernel would not move: pinned, locked, or not writable, as those that a collector has protected to hear of
// writes. They count against the budget all the same. Asking for each of them again is most of what a program pays that
// has many: those that refuse again are left alone for twice as long, and beyond what they take of the budget there is
// always a part for the other pages, or each of those would have to wait until somebody has found that none can leave.
#include "engine.h"

#define REFUSED_MS 20    // left alone for so long; after each further refusal for twice as long, 2.56 s at most
#define MOST_REFUSALS 7  // in a row, that are counted
#define OTHERS_PART 8    // of the budget is for pages that can leave, whatever the others take

static uint16_t now_ms(void) { return (uint16_t)(now_ns() / 1000000u); }

uint64_t refused_lately(const struct leaf *l) {
    if (!l->refused || (uint16_t)(now_ms() - l->refused_at) <= REFUSED_MS << l->refusals)
        return l->refused;
    return l->refused & ((1ull << l->retry) - 1);
}

static void asked_again(struct leaf *l, uint64_t mask) {
    int next = LEAF_PAGES - __builtin_clzll(mask);
    if (next < LEAF_PAGES && l->refused >> next) {
        l->retry = (uint16_t)next & (LEAF_PAGES - 1);
        return;
    }
    l->retry = 0;
    l->refused_at = now_ms();
    l->refusals += l->refusals < MOST_REFUSALS;
}

// Of those that were asked for, the pages of `mask` would not move. A batch may have room for a few of a leaf only:
// their rest lasts from when the last of them has been asked for, so that all of them are.
void refused_note(struct edm_engine *g, struct leaf *l, uint64_t mask) {
    mask &= l->resident;
    uint64_t again = mask & l->refused, first = mask & ~l->refused;
    if (again)
        asked_again(l, again);
    if (!l->refused) {
        l->refused_at = now_ms();
        l->refusals = l->retry = 0;
    }
    l->refused |= first;
    g->refused += (uint64_t)__builtin_popcountll(first);
    g->count.move_refused += (uint64_t)__builtin_popcountll(mask);
}

// It has moved, or was given up, after all.
void refused_forget(struct edm_engine *g, struct leaf *l, uint64_t bit) {
    if (!(l->refused & bit))
        return;
    l->refused &= ~bit;
    l->refusals = 0;
    g->refused--;
}

// Pages by which the budget is exceeded, that others than those may be here.
uint64_t refused_over(const struct edm_engine *g) {
    uint64_t most = g->limit - g->limit / OTHERS_PART;
    return g->limit && g->refused > most ? g->refused - most : 0;
}
