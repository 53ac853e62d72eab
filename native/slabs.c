// The page store `memory` [7]: pages in slabs of anonymous memory, with their checksums; and the C tables
// ("edm.page_store_ops") of it and of the page files.
#include <errno.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "page_file.h"
// Needs what that includes.
#include "edm_ops.h"

#define PAGE 4096ul
#define NONE UINT64_MAX

struct slab {
    uint8_t *pages;  // NULL: there is none of this number
    uint32_t *sums;
    uint64_t *used;  // bit i: page i is in use
    uint32_t used_pages;
};

struct edm_slabs {
    struct edm_page_store_ops ops;
    uint32_t slab_pages;
    uint64_t limit_pages, used_pages;
    struct slab *slab;  // by number, from `base` on
    uint64_t base, count, capacity, mapped;
    uint64_t current;  // the slab being filled, or NONE
    uint32_t cursor;
    uint64_t spare;  // an empty slab that is kept, or NONE
    uint64_t failed_slot;
};

static struct slab *slab_of(const struct edm_slabs *s, uint64_t slot) {
    uint64_t at = slot / s->slab_pages - s->base;  // huge for a number before the first

    return at < s->count && s->slab[at].pages ? &s->slab[at] : NULL;
}

static size_t slab_bytes(const struct edm_slabs *s) { return s->slab_pages * PAGE; }

static void slab_drop(struct edm_slabs *s, struct slab *slab) {
    munmap(slab->pages, slab_bytes(s));
    free(slab->sums);
    free(slab->used);
    *slab = (struct slab){0};
    s->mapped--;
}

// ---- which slots are free

// A number is never given twice: a page table may still speak of what a former server had there.
static int slab_make(struct edm_slabs *s) {
    if (s->count == s->capacity) {
        uint64_t capacity = s->capacity ? 2 * s->capacity : 64;
        struct slab *bigger = realloc(s->slab, capacity * sizeof *bigger);
        if (!bigger)
            return -ENOMEM;
        s->slab = bigger;
        s->capacity = capacity;
    }
    struct slab made = {.sums = calloc(s->slab_pages, 4), .used = calloc((s->slab_pages + 63) / 64, 8)};
    made.pages = mmap(NULL, slab_bytes(s), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (!made.sums || !made.used || made.pages == MAP_FAILED) {
        if (made.pages != MAP_FAILED)
            munmap(made.pages, slab_bytes(s));
        free(made.sums);
        free(made.used);
        return -ENOMEM;
    }
    s->slab[s->count] = made;
    s->current = s->count++;
    s->mapped++;
    return 0;
}

static uint32_t room(const struct edm_slabs *s, uint64_t number) {
    return s->slab[number].pages ? s->slab_pages - s->slab[number].used_pages : 0;
}

// The slab to fill next. One that is nearly full is left alone while there may be another: scattered slots make slow
// batches.
static int next_slab(struct edm_slabs *s) {
    uint64_t best = NONE;

    for (uint64_t i = 0; i < s->count; i++)
        if (room(s, i) > (best == NONE ? 0 : room(s, best)))
            best = i;
    int failed = best == NONE || room(s, best) < s->slab_pages / 8 + 1 ? slab_make(s) : 0;
    if (failed && best == NONE)
        return failed;
    if (failed || (best != NONE && room(s, best) >= s->slab_pages / 8 + 1))
        s->current = best;
    if (s->current == s->spare)
        s->spare = NONE;
    s->cursor = 0;
    return 0;
}

static uint32_t take_from_current(struct edm_slabs *s, uint64_t *slots, uint32_t n) {
    struct slab *slab = &s->slab[s->current];
    uint32_t taken = 0;

    while (taken < n && s->cursor < s->slab_pages && slab->used_pages < s->slab_pages) {
        uint64_t free_bits = ~slab->used[s->cursor / 64] >> s->cursor % 64;
        if (!free_bits) {
            s->cursor = (s->cursor / 64 + 1) * 64;
            continue;
        }
        s->cursor += (uint32_t)__builtin_ctzll(free_bits);
        if (s->cursor >= s->slab_pages)
            break;
        pf_set(slab->used, s->cursor);
        slab->used_pages++;
        slots[taken++] = (s->base + s->current) * s->slab_pages + s->cursor++;
    }
    s->used_pages += taken;
    return taken;
}

void edm_slabs_release(struct edm_slabs *s, const uint64_t *slots, size_t n) {
    for (size_t i = 0; i < n; i++) {
        struct slab *slab = slab_of(s, slots[i]);
        uint32_t at = (uint32_t)(slots[i] % s->slab_pages);
        if (!slab || !pf_bit(slab->used, at))
            continue;
        pf_clear(slab->used, at);
        slab->used_pages--;
        s->used_pages--;
        uint64_t number = (uint64_t)(slab - s->slab);
        if (slab->used_pages || number == s->current)
            continue;
        // One empty slab stays, or a store that shrinks and grows by one page would map and unmap all the time.
        if (s->spare == NONE)
            s->spare = number;
        else if (s->spare != number)
            slab_drop(s, slab);
    }
    // Most of what lies behind is free again: pages that are in memory, and in the CPU's caches, already.
    if (s->current != NONE && s->cursor / 2 > s->slab[s->current].used_pages + 64)
        s->cursor = 0;
}

// ---- batches

int edm_slabs_put(struct edm_slabs *s, const void *pages, const uint32_t *sums, size_t n, uint64_t *slots) {
    uint32_t taken = 0;

    s->failed_slot = NONE;
    if (n > s->limit_pages || s->used_pages > s->limit_pages - n)
        return -EDQUOT;
    while (taken < n) {
        if (s->current != NONE)
            taken += take_from_current(s, slots + taken, (uint32_t)n - taken);
        int failed = taken < n ? next_slab(s) : 0;
        if (failed) {
            edm_slabs_release(s, slots, taken);
            return failed;
        }
    }
    for (size_t i = 0; i < n; i++) {
        struct slab *slab = slab_of(s, slots[i]);
        size_t at = slots[i] % s->slab_pages;
        memcpy(slab->pages + at * PAGE, (const uint8_t *)pages + i * PAGE, PAGE);
        slab->sums[at] = sums[i];
    }
    return 0;
}

int edm_slabs_get(struct edm_slabs *s, const uint64_t *slots, const uint32_t *sums, size_t n, void *into) {
    for (size_t i = 0; i < n; i++) {
        struct slab *slab = slab_of(s, slots[i]);
        size_t at = slots[i] % s->slab_pages;
        s->failed_slot = slots[i];
        if (!slab || !pf_bit(slab->used, (uint32_t)at))
            return -ENOENT;
        if (edm_crc32c_copy((uint8_t *)into + i * PAGE, slab->pages + at * PAGE, PAGE) != slab->sums[at] ||
            (sums && sums[i] != slab->sums[at]))
            return -EBADMSG;
    }
    return 0;
}

uint64_t edm_slabs_failed(const struct edm_slabs *s) { return s->failed_slot; }

void edm_slabs_keep_off(struct edm_slabs *s, uint64_t slot) {
    uint64_t base = slot / s->slab_pages + 1;

    if (!s->count && base > s->base)
        s->base = base;
}

void *edm_slabs_page(const struct edm_slabs *s, uint64_t slot) {
    struct slab *slab = slab_of(s, slot);

    return slab ? slab->pages + slot % s->slab_pages * PAGE : NULL;
}

void edm_slabs_stat(const struct edm_slabs *s, struct edm_slabs_figures *out) {
    *out = (struct edm_slabs_figures){.pages = s->used_pages, .bytes = s->mapped * slab_bytes(s)};
}

// ---- the tables

static int slabs_get(void *self, const uint64_t *slots, uint32_t n, void *into) {
    return edm_slabs_get(self, slots, NULL, n, into);
}

static int slabs_get_known(void *self, const uint64_t *slots, const uint32_t *sums, uint32_t n, void *into) {
    return edm_slabs_get(self, slots, sums, n, into);
}

static int slabs_put(void *self, const void *pages, const uint32_t *sums, uint32_t n, uint64_t *slots) {
    return edm_slabs_put(self, pages, sums, n, slots);
}

static void slabs_release(void *self, const uint64_t *slots, uint32_t n) { edm_slabs_release(self, slots, n); }

struct edm_slabs *edm_slabs_new(uint32_t slab_pages, uint64_t limit_pages) {
    struct edm_slabs *s = calloc(1, sizeof *s);

    if (s) {
        s->ops = (struct edm_page_store_ops){EDM_OPS_VERSION, sizeof s->ops, s, slabs_get, slabs_get_known,
                                             slabs_put,       slabs_release};
        s->slab_pages = slab_pages;
        s->limit_pages = limit_pages;
        s->current = s->spare = NONE;
    }
    return s;
}

void edm_slabs_clear(struct edm_slabs *s) {
    for (uint64_t i = 0; i < s->count; i++)
        if (s->slab[i].pages)
            slab_drop(s, &s->slab[i]);
    s->current = s->spare = NONE;
    s->used_pages = 0;
}

void edm_slabs_free(struct edm_slabs *s) {
    if (!s)
        return;
    edm_slabs_clear(s);
    free(s->slab);
    free(s);
}

const void *edm_slabs_table(const struct edm_slabs *s) { return &s->ops; }

// ---- page files

static int files_get(void *self, const uint64_t *slots, uint32_t n, void *into) {
    return edm_pf_get(self, slots, n, into);
}

static int files_get_known(void *self, const uint64_t *slots, const uint32_t *sums, uint32_t n, void *into) {
    return pf_get(self, slots, sums, n, into);
}

static int files_put(void *self, const void *pages, const uint32_t *sums, uint32_t n, uint64_t *slots) {
    return edm_pf_put(self, pages, sums, n, slots);
}

static void files_release(void *self, const uint64_t *slots, uint32_t n) { edm_pf_release(self, slots, n); }

void *edm_pf_table_new(struct edm_pf *pf, int writes) {
    struct edm_page_store_ops *t = calloc(1, sizeof *t);

    if (t)
        *t = (struct edm_page_store_ops){EDM_OPS_VERSION,           sizeof *t,    pf, files_get, files_get_known,
                                         writes ? files_put : NULL, files_release};
    return t;
}

void edm_pf_table_free(void *table) { free(table); }
