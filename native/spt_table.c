// The SPT in memory: pages in leaves of sixteen, found by one hash table, linked per region for what concerns a range.
//
// Every change first takes the memory it may need, and then cannot fail: -ENOMEM means that nothing changed.
#include "spt_table.h"

#include <errno.h>
#include <malloc.h>
#include <stdlib.h>
#include <string.h>

#define LEAST_LEAVES 64u
#define TRIM_LEAVES 4096u     // 1.6 MB
#define KEEP_GONE (1u << 16)  // room for as many slots is kept from call to call
#define NUMBER(index) ((index) / SPT_LEAF_PAGES)
#define OFFSET(index) ((unsigned)((index) % SPT_LEAF_PAGES))

struct edm_spt *edm_spt_new(void) { return calloc(1, sizeof(struct edm_spt)); }

void edm_spt_free(struct edm_spt *spt) {
    if (!spt)
        return;
    uint64_t id, region;
    for (size_t i = 0; i < spt->leaf_capacity; i++)
        free(spt->leaves[i]);
    for (size_t at = 0; spt_map_next(&spt->regions, &at, &id, &region);)
        free((void *)(uintptr_t)region);
    spt_map_free(&spt->regions);
    spt_map_free(&spt->shared);
    spt_map_free(&spt->notes);
    free(spt->leaves);
    free(spt->gone);
    free(spt);
}

// ---- regions and leaves

static struct spt_region *region_of(const struct edm_spt *spt, uint64_t id) {
    uint64_t region = 0;

    spt_map_get(&spt->regions, id, &region);
    return (struct spt_region *)(uintptr_t)region;
}

static struct spt_region *region_make(struct edm_spt *spt, uint64_t id) {
    struct spt_region *region = region_of(spt, id);

    if (region || spt_map_reserve(&spt->regions, 1))
        return region;
    region = calloc(1, sizeof *region);
    if (region) {
        region->id = id;
        spt_map_set(&spt->regions, id, (uintptr_t)region);
    }
    return region;
}

static size_t leaf_place(const struct edm_spt *spt, const struct spt_region *region, uint64_t number) {
    uint64_t hash = (number + region->id * 0x9e3779b97f4a7c15ull) * 0xff51afd7ed558ccdull;
    size_t mask = spt->leaf_capacity - 1, at = (hash ^ hash >> 32) & mask;

    while (spt->leaves[at] && (spt->leaves[at]->region != region || spt->leaves[at]->number != number))
        at = (at + 1) & mask;
    return at;
}

static struct spt_leaf *leaf_of(const struct edm_spt *spt, const struct spt_region *region, uint64_t number) {
    return region && spt->leaf_count ? spt->leaves[leaf_place(spt, region, number)] : NULL;
}

static int resize_leaves(struct edm_spt *spt, size_t capacity) {
    size_t old = spt->leaf_capacity;
    struct spt_leaf **before = spt->leaves, **bigger = calloc(capacity, sizeof *bigger);
    if (!bigger)
        return -ENOMEM;
    spt->leaves = bigger;
    spt->leaf_capacity = capacity;
    for (size_t i = 0; i < old; i++)
        if (before[i])
            bigger[leaf_place(spt, before[i]->region, before[i]->number)] = before[i];
    free(before);
    return 0;
}

static int grow_leaves(struct edm_spt *spt) {
    if (2 * (spt->leaf_count + 1) <= spt->leaf_capacity)
        return 0;
    return resize_leaves(spt, spt->leaf_capacity ? 2 * spt->leaf_capacity : LEAST_LEAVES);
}

static struct spt_leaf *leaf_make(struct edm_spt *spt, struct spt_region *region, uint64_t number) {
    struct spt_leaf *leaf = leaf_of(spt, region, number);

    if (leaf || grow_leaves(spt))
        return leaf;
    leaf = calloc(1, sizeof *leaf);
    if (!leaf)
        return NULL;
    leaf->region = region;
    leaf->number = number;
    leaf->next = region->first;
    if (leaf->next)
        leaf->next->previous = leaf;
    region->first = leaf;
    region->leaves++;
    spt->leaves[leaf_place(spt, region, number)] = leaf;
    spt->leaf_count++;
    return leaf;
}

static void leaf_drop(struct edm_spt *spt, struct spt_leaf *leaf) {
    size_t mask = spt->leaf_capacity - 1, at = leaf_place(spt, leaf->region, leaf->number);

    spt->leaves[at] = NULL;
    spt->leaf_count--;
    for (size_t next = (at + 1) & mask; spt->leaves[next]; next = (next + 1) & mask) {
        struct spt_leaf *moved = spt->leaves[next];
        spt->leaves[next] = NULL;
        spt->leaves[leaf_place(spt, moved->region, moved->number)] = moved;
    }
    if (leaf->previous)
        leaf->previous->next = leaf->next;
    else
        leaf->region->first = leaf->next;
    if (leaf->next)
        leaf->next->previous = leaf->previous;
    leaf->region->leaves--;
    free(leaf);
    spt->leaves_freed++;
}

// After much was dropped: what it took, back to the system. The table stays as large as it is where memory is short.
static void give_back(struct edm_spt *spt) {
    size_t capacity = spt->leaf_capacity;

    if (spt->leaves_freed < TRIM_LEAVES || spt->leaves_freed < spt->leaf_count)
        return;
    while (capacity > LEAST_LEAVES && capacity > 8 * spt->leaf_count)
        capacity /= 2;
    if (capacity < spt->leaf_capacity)
        (void)resize_leaves(spt, capacity);
    spt->leaves_freed = 0;
#ifdef __GLIBC__
    malloc_trim(0);
#endif
}

// ---- slots that are let go of

static int reserve_gone(struct edm_spt *spt, size_t more) {
    if (spt->gone_count + more <= spt->gone_capacity)
        return 0;
    size_t capacity = 2 * (spt->gone_count + more);
    uint64_t *bigger = realloc(spt->gone, capacity * sizeof *bigger);
    if (!bigger)
        return -ENOMEM;
    spt->gone = bigger;
    spt->gone_capacity = capacity;
    return 0;
}

static void let_go(struct edm_spt *spt, uint64_t slot) {
    uint64_t more;

    if (!spt_map_get(&spt->shared, slot, &more))
        spt->gone[spt->gone_count++] = slot;
    else if (more > 1)
        spt_map_set(&spt->shared, slot, more - 1);
    else
        spt_map_remove(&spt->shared, slot);
}

size_t edm_spt_gone(struct edm_spt *spt, uint64_t *out) {
    size_t count = spt->gone_count;

    if (out) {
        memcpy(out, spt->gone, count * sizeof *out);
        spt->gone_count = 0;
        if (spt->gone_capacity > KEEP_GONE) {
            free(spt->gone);
            spt->gone = NULL;
            spt->gone_capacity = 0;
        }
    }
    return count;
}

// ---- single pages

static void page_set(struct edm_spt *spt, struct spt_leaf *leaf, unsigned at, uint64_t slot, uint64_t version,
                     uint32_t checksum) {
    if (leaf->present >> at & 1) {
        let_go(spt, leaf->slots[at]);
    } else {
        leaf->present |= 1u << at;
        leaf->region->pages++;
        spt->pages++;
    }
    leaf->slots[at] = slot;
    leaf->versions[at] = version;
    leaf->checksums[at] = checksum;
}

static void page_forget(struct edm_spt *spt, struct spt_leaf *leaf, unsigned at) {
    leaf->present &= ~(1u << at);
    leaf->region->pages--;
    spt->pages--;
}

size_t edm_spt_lookup(const struct edm_spt *spt, struct edm_page_ref *refs, size_t n, uint64_t *slots) {
    const struct spt_region *region = NULL;
    const struct spt_leaf *leaf = NULL;
    size_t found = 0;

    for (size_t i = 0; i < n; i++) {
        struct edm_page_ref *ref = &refs[i];
        if (!region || region->id != ref->region) {
            region = region_of(spt, ref->region);
            leaf = NULL;
        }
        if (!leaf || leaf->number != NUMBER(ref->index))
            leaf = leaf_of(spt, region, NUMBER(ref->index));
        unsigned at = OFFSET(ref->index);
        bool present = leaf && leaf->present >> at & 1;
        slots[i] = present ? leaf->slots[at] : 0;
        ref->version = present ? leaf->versions[at] : 0;
        ref->checksum = present ? leaf->checksums[at] : 0;
        ref->status = present;
        found += present;
    }
    return found;
}

int edm_spt_record(struct edm_spt *spt, const struct edm_page_ref *refs, const uint64_t *slots, size_t n) {
    if (reserve_gone(spt, n))
        return -ENOMEM;
    // An empty leaf left behind where memory ends does no harm; the second pass finds them all.
    for (int pass = 0; pass < 2; pass++) {
        struct spt_leaf *leaf = NULL;
        for (size_t i = 0; i < n; i++) {
            const struct edm_page_ref *ref = &refs[i];
            if (!leaf || leaf->region->id != ref->region || leaf->number != NUMBER(ref->index)) {
                struct spt_region *region = region_make(spt, ref->region);
                leaf = region ? leaf_make(spt, region, NUMBER(ref->index)) : NULL;
                if (!leaf)
                    return -ENOMEM;
            }
            if (pass)
                page_set(spt, leaf, OFFSET(ref->index), slots[i], ref->version, ref->checksum);
        }
    }
    return 0;
}

// ---- ranges

struct page {
    uint64_t index, slot, version;
    uint32_t checksum;
};

static int by_index(const void *a, const void *b) {
    const struct page *one = a, *other = b;

    return (one->index > other->index) - (one->index < other->index);
}

static size_t leaf_pages(const struct spt_leaf *leaf, uint64_t start, uint64_t end, struct page *out) {
    size_t count = 0;

    for (unsigned at = 0; at < SPT_LEAF_PAGES; at++) {
        uint64_t index = leaf->number * SPT_LEAF_PAGES + at;
        if (leaf->present >> at & 1 && index >= start && index < end)
            out[count++] = (struct page){index, leaf->slots[at], leaf->versions[at], leaf->checksums[at]};
    }
    return count;
}

// The region's pages in [start, end), in index order; *out is malloc'ed. -ENOMEM.
static int range_pages(const struct edm_spt *spt, const struct spt_region *region, uint64_t start, uint64_t end,
                       struct page **out, size_t *count) {
    uint64_t first = NUMBER(start), last = end ? NUMBER(end - 1) : 0;
    bool probe = last - first < region->leaves;
    uint64_t leaves = probe ? last - first + 1 : region->leaves;

    *count = 0;
    *out = malloc((leaves * SPT_LEAF_PAGES + 1) * sizeof **out);
    if (!*out)
        return -ENOMEM;
    if (probe) {
        for (uint64_t number = first; number <= last; number++) {
            const struct spt_leaf *leaf = leaf_of(spt, region, number);
            if (leaf)
                *count += leaf_pages(leaf, start, end, *out + *count);
        }
        return 0;
    }
    for (const struct spt_leaf *leaf = region->first; leaf; leaf = leaf->next)
        *count += leaf_pages(leaf, start, end, *out + *count);
    qsort(*out, *count, sizeof **out, by_index);
    return 0;
}

static uint64_t range_end(uint64_t start, uint64_t count) {
    return count > UINT64_MAX - start ? UINT64_MAX : start + count;
}

// Their leaves stay, empty or not, so that putting pages elsewhere needs no memory.
static void remove_pages(struct edm_spt *spt, struct spt_region *region, const struct page *pages, size_t count,
                         bool keep_slots) {
    for (size_t i = 0; i < count; i++) {
        if (!keep_slots)
            let_go(spt, pages[i].slot);
        page_forget(spt, leaf_of(spt, region, NUMBER(pages[i].index)), OFFSET(pages[i].index));
    }
}

// Free the leaves of pages moved by `shift` that hold nothing any more.
static void drop_empty(struct edm_spt *spt, struct spt_region *region, const struct page *pages, size_t count,
                       uint64_t shift) {
    for (size_t i = 0; i < count; i++) {
        struct spt_leaf *leaf = leaf_of(spt, region, NUMBER(pages[i].index + shift));
        if (leaf && !leaf->present)
            leaf_drop(spt, leaf);
    }
}

int edm_spt_create(struct edm_spt *spt, uint64_t region) { return region_make(spt, region) ? 0 : -ENOMEM; }

int edm_spt_drop(struct edm_spt *spt, uint64_t id, uint64_t start, uint64_t count) {
    struct spt_region *region = region_of(spt, id);
    struct page *pages;
    size_t found;

    if (!region || !count)
        return 0;
    if (range_pages(spt, region, start, range_end(start, count), &pages, &found))
        return -ENOMEM;
    int failed = reserve_gone(spt, found);
    if (!failed) {
        remove_pages(spt, region, pages, found, false);
        drop_empty(spt, region, pages, found, 0);
    }
    free(pages);
    give_back(spt);
    return failed;
}

int edm_spt_drop_region(struct edm_spt *spt, uint64_t id) {
    struct spt_region *region = region_of(spt, id);

    if (!region)
        return 0;
    if (reserve_gone(spt, region->pages))
        return -ENOMEM;
    while (region->first) {
        struct spt_leaf *leaf = region->first;
        for (unsigned at = 0; at < SPT_LEAF_PAGES; at++)
            if (leaf->present >> at & 1) {
                let_go(spt, leaf->slots[at]);
                page_forget(spt, leaf, at);
            }
        leaf_drop(spt, leaf);
    }
    spt_map_remove(&spt->regions, id);
    free(region);
    give_back(spt);
    return 0;
}

// Put pages at `shift` (modulo 2^64) from where they were; their leaves are there, gone and shared have room.
static void insert_pages(struct edm_spt *spt, struct spt_region *region, const struct page *pages, size_t count,
                         uint64_t shift) {
    for (size_t i = 0; i < count; i++) {
        uint64_t index = pages[i].index + shift;
        page_set(spt, leaf_of(spt, region, NUMBER(index)), OFFSET(index), pages[i].slot, pages[i].version,
                 pages[i].checksum);
    }
}

static int make_leaves(struct edm_spt *spt, struct spt_region *region, const struct page *pages, size_t count,
                       uint64_t shift) {
    for (size_t i = 0; i < count; i++)
        if (!leaf_make(spt, region, NUMBER(pages[i].index + shift)))
            return -ENOMEM;
    return 0;
}

static void share(struct edm_spt *spt, const struct page *pages, size_t count) {
    for (size_t i = 0; i < count; i++) {
        uint64_t more = 0;
        spt_map_get(&spt->shared, pages[i].slot, &more);
        spt_map_set(&spt->shared, pages[i].slot, more + 1);
    }
}

int edm_spt_clone(struct edm_spt *spt, uint64_t id, uint64_t into_id) {
    struct spt_region *region = region_of(spt, id), *into = region_make(spt, into_id);
    struct page *pages = NULL, *before = NULL;
    size_t count = 0, before_count = 0;
    int failed = into ? 0 : -ENOMEM;

    if (id == into_id || failed)
        return failed;
    if (region)
        failed = range_pages(spt, region, 0, UINT64_MAX, &pages, &count);
    if (!failed)
        failed = range_pages(spt, into, 0, UINT64_MAX, &before, &before_count);
    if (!failed)
        failed = spt_map_reserve(&spt->shared, count);
    if (!failed)
        failed = reserve_gone(spt, before_count);
    if (!failed)
        failed = make_leaves(spt, into, pages, count, 0);
    if (!failed) {
        // Slots that `into` held already stay: the new references come first.
        share(spt, pages, count);
        remove_pages(spt, into, before, before_count, false);
        insert_pages(spt, into, pages, count, 0);
    }
    drop_empty(spt, into, pages, count, 0);
    drop_empty(spt, into, before, before_count, 0);
    free(pages);
    free(before);
    return failed;
}

int edm_spt_move(struct edm_spt *spt, uint64_t id, uint64_t start, uint64_t to, uint64_t count) {
    struct spt_region *region = region_of(spt, id);
    struct page *moved = NULL, *target = NULL;
    size_t moved_count = 0, target_count = 0;

    if (!region || !count || start == to)
        return 0;
    int failed = range_pages(spt, region, start, range_end(start, count), &moved, &moved_count);
    if (!failed)
        failed = range_pages(spt, region, to, range_end(to, count), &target, &target_count);
    if (!failed)
        failed = reserve_gone(spt, target_count);
    if (!failed)
        failed = make_leaves(spt, region, moved, moved_count, to - start);
    if (!failed) {
        // Of a target that overlaps the source, only what was not moved away is let go of.
        size_t left = 0;
        for (size_t i = 0; i < target_count; i++)
            if (target[i].index < start || target[i].index - start >= count)
                target[left++] = target[i];
        remove_pages(spt, region, moved, moved_count, true);
        remove_pages(spt, region, target, left, false);
        insert_pages(spt, region, moved, moved_count, to - start);
        drop_empty(spt, region, target, left, 0);
    }
    drop_empty(spt, region, moved, moved_count, to - start);
    drop_empty(spt, region, moved, moved_count, 0);
    free(moved);
    free(target);
    return failed;
}

// ---- what is there

size_t edm_spt_regions(const struct edm_spt *spt, uint64_t *ids, uint64_t *pages, size_t max) {
    uint64_t id, region;
    size_t count = 0;

    for (size_t at = 0; spt_map_next(&spt->regions, &at, &id, &region); count++)
        if (count < max) {
            ids[count] = id;
            pages[count] = ((struct spt_region *)(uintptr_t)region)->pages;
        }
    return count;
}

int64_t edm_spt_pages(const struct edm_spt *spt, uint64_t id, struct edm_page_ref *refs, uint64_t *slots, size_t max) {
    struct spt_region *region = region_of(spt, id);
    struct page *pages;
    size_t count;

    if (!region)
        return 0;
    if (range_pages(spt, region, 0, UINT64_MAX, &pages, &count))
        return -ENOMEM;
    for (size_t i = 0; i < count && i < max; i++) {
        refs[i] = (struct edm_page_ref){
            .region = id, .index = pages[i].index, .version = pages[i].version, .checksum = pages[i].checksum};
        slots[i] = pages[i].slot;
    }
    free(pages);
    return (int64_t)count;
}

size_t edm_spt_shares(const struct edm_spt *spt, uint64_t *pairs, size_t max) {
    size_t count = 0;
    uint64_t slot, more;

    for (size_t at = 0; spt_map_next(&spt->shared, &at, &slot, &more); count++)
        if (count < max) {
            pairs[2 * count] = slot;
            pairs[2 * count + 1] = more;
        }
    return count;
}

int edm_spt_share(struct edm_spt *spt, const uint64_t *pairs, size_t count) {
    if (spt_map_reserve(&spt->shared, count))
        return -ENOMEM;
    for (size_t i = 0; i < count; i++)
        spt_map_set(&spt->shared, pairs[2 * i], pairs[2 * i + 1]);
    return 0;
}

int edm_spt_note(struct edm_spt *spt, uint64_t key, uint64_t value) {
    if (spt_map_reserve(&spt->notes, 1))
        return -ENOMEM;
    spt_map_set(&spt->notes, key, value);
    return 0;
}

size_t edm_spt_notes(const struct edm_spt *spt, uint64_t *pairs, size_t max) {
    size_t count = 0;
    uint64_t key, value;

    for (size_t at = 0; spt_map_next(&spt->notes, &at, &key, &value); count++)
        if (count < max) {
            pairs[2 * count] = key;
            pairs[2 * count + 1] = value;
        }
    return count;
}

uint64_t edm_spt_count(const struct edm_spt *spt) { return spt->pages; }

uint64_t edm_spt_memory(const struct edm_spt *spt) {
    return spt->leaf_count * (sizeof(struct spt_leaf) + 16) + spt->leaf_capacity * sizeof(struct spt_leaf *) +
           (spt->regions.capacity + spt->shared.capacity + spt->notes.capacity) * 2 * sizeof(uint64_t) +
           spt->gone_capacity * sizeof(uint64_t);
}
