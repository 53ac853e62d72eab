// The table behind every SPT store [6, 9, 10]: region and page number → slot, version, checksum.
#ifndef EDM_SPT_TABLE_H
#define EDM_SPT_TABLE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "edm_abi.h"

#define SPT_LEAF_PAGES 16

struct spt_region;

// Sixteen neighbouring pages of one region: where pages come in clusters, 24 bytes each with the hash table above.
struct spt_leaf {
    struct spt_region *region;
    uint64_t number;  // page number / SPT_LEAF_PAGES
    struct spt_leaf *next, *previous;
    uint32_t present;  // bit i: page i is stored
    uint32_t checksums[SPT_LEAF_PAGES];
    uint64_t slots[SPT_LEAF_PAGES];
    uint64_t versions[SPT_LEAF_PAGES];
};

struct spt_region {
    uint64_t id;
    uint64_t pages;
    uint64_t leaves;
    struct spt_leaf *first;
};

// Open addressing over u64 keys and values; key 0 stands for itself plus one, so that 0 means empty.
struct spt_map {
    uint64_t *keys, *values;
    size_t capacity, used;
};

struct edm_spt {
    struct spt_leaf **leaves;  // open addressing, capacity a power of two
    size_t leaf_capacity, leaf_count, leaves_freed;
    struct spt_map regions;  // id → struct spt_region *
    struct spt_map shared;   // slot → references beyond the first
    struct spt_map notes;
    uint64_t *gone;
    size_t gone_count, gone_capacity;
    uint64_t pages;
};

bool spt_map_get(const struct spt_map *map, uint64_t key, uint64_t *value);
// Room for `more` further keys: what follows cannot fail.
int spt_map_reserve(struct spt_map *map, size_t more);
void spt_map_set(struct spt_map *map, uint64_t key, uint64_t value);
void spt_map_remove(struct spt_map *map, uint64_t key);
// The next used place from *at on; false at the end.
bool spt_map_next(const struct spt_map *map, size_t *at, uint64_t *key, uint64_t *value);
void spt_map_free(struct spt_map *map);

#endif
