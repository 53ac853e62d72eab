// The SPT's rows in LMDB: a page's key, and what stands behind it, with a checksum.
#include <endian.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "edm_abi.h"

#define AT_ONCE 64

// Odd factors: whatever single field changes, the hash does.
static uint64_t hash_of(const struct edm_page_ref *ref, uint64_t slot) {
    return ((ref->region * 0x9e3779b97f4a7c15ull ^ ref->index) * 0xc2b2ae3d27d4eb4full +
            (slot * 0x165667b19e3779f9ull ^ ref->version) * 0xd6e8feb86659fd93ull) ^
           ref->checksum * 0x9e3779b97f4a7c15ull;
}

uint64_t edm_lmdb_rows(const struct edm_page_ref *refs, const uint64_t *slots, size_t n, uint64_t *keys,
                       uint64_t *rows) {
    uint64_t sum = 0;

    for (size_t i = 0; i < n; i++, keys += 2, rows += 4) {
        uint64_t key[] = {htobe64(refs[i].region), htobe64(refs[i].index)};
        uint64_t hash = hash_of(&refs[i], slots[i]);
        uint64_t row[] = {htole64(slots[i]), htole64(refs[i].version), htole64(refs[i].checksum), htole64(hash)};
        memcpy(keys, key, sizeof key);
        memcpy(rows, row, sizeof row);
        sum += hash;
    }
    return sum;
}

int edm_lmdb_rows_there(const struct edm_spt *spt, const struct edm_page_ref *refs, size_t n, uint64_t *count,
                        uint64_t *sum) {
    struct edm_page_ref there[AT_ONCE];
    uint64_t slots[AT_ONCE];

    *count = *sum = 0;
    for (size_t i = 1; i < n; i++)
        if (refs[i].region != refs[i - 1].region || refs[i].index <= refs[i - 1].index)
            return 0;
    for (size_t at = 0; at < n; at += AT_ONCE) {
        size_t part = n - at < AT_ONCE ? n - at : AT_ONCE;
        memcpy(there, refs + at, part * sizeof *refs);
        *count += edm_spt_lookup(spt, there, part, slots);
        for (size_t i = 0; i < part; i++)
            if (there[i].status)
                *sum += hash_of(&there[i], slots[i]);
    }
    return 1;
}
