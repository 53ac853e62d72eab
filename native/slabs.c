// The page store `memory` and the page store `file` as C tables ("edm.page_store_ops"): reading only. The slabs are
// Python's; this knows where they are.
#include <errno.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "crc32c.h"
#include "edm_abi.h"
#include "edm_ops.h"

#define PAGE 4096ul

struct slab {
    const uint8_t *pages, *used;
    const uint32_t *sums;
};

struct edm_slabs {
    struct edm_page_store_ops ops;
    uint64_t slab_pages, n;
    struct slab *slab;
};

static int slabs_get(void *self, const uint64_t *slots, uint32_t n, void *into) {
    struct edm_slabs *s = self;
    for (uint32_t i = 0; i < n; i++) {
        uint64_t number = slots[i] / s->slab_pages, at = slots[i] % s->slab_pages;
        const struct slab *slab = number < s->n ? &s->slab[number] : NULL;
        if (!slab || !slab->pages || !slab->used[at])
            return -ENOENT;
        uint8_t *page = (uint8_t *)into + i * PAGE;
        memcpy(page, slab->pages + at * PAGE, PAGE);
        if (edm_crc32c(page, PAGE) != slab->sums[at])
            return -EBADMSG;
    }
    return 0;
}

struct edm_slabs *edm_slabs_new(uint64_t slab_pages) {
    struct edm_slabs *s = calloc(1, sizeof *s);
    if (s) {
        s->ops = (struct edm_page_store_ops){EDM_OPS_VERSION, sizeof s->ops, s, slabs_get};
        s->slab_pages = slab_pages;
    }
    return s;
}

void edm_slabs_free(struct edm_slabs *s) {
    if (s)
        free(s->slab);
    free(s);
}

const void *edm_slabs_table(const struct edm_slabs *s) { return &s->ops; }

int edm_slabs_set(struct edm_slabs *s, uint64_t number, const void *pages, const uint32_t *sums, const void *used) {
    if (number >= s->n) {
        uint64_t n = s->n ? s->n * 2 : 64;
        while (n <= number)
            n *= 2;
        struct slab *bigger = realloc(s->slab, n * sizeof *bigger);
        if (!bigger)
            return -ENOMEM;
        memset(bigger + s->n, 0, (n - s->n) * sizeof *bigger);
        s->slab = bigger;
        s->n = n;
    }
    s->slab[number] = (struct slab){pages, used, sums};
    return 0;
}

// ---- page files

static int files_get(void *self, const uint64_t *slots, uint32_t n, void *into) {
    return edm_pf_get(self, slots, n, into);
}

void *edm_pf_table_new(struct edm_pf *pf) {
    struct edm_page_store_ops *t = calloc(1, sizeof *t);
    if (t)
        *t = (struct edm_page_store_ops){EDM_OPS_VERSION, sizeof *t, pf, files_get};
    return t;
}

void edm_pf_table_free(void *table) { free(table); }
