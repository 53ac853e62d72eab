// An LMDB file as LMDB 0.9 writes it (mdb.c: MDB_page, MDB_node, MDB_db, MDB_meta), little endian, 64 bits, 4096 bytes;
// and what native/lmdb_*.c share.
#pragma once

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <sys/types.h>

#include "edm_abi.h"

#define PAGE 4096u
#define HEAD 16u
#define NODE_HEAD 8u
#define DEPTH_MOST 32
#define BRANCH 1
#define LEAF 2
#define OVERFLOW_PAGE 4
#define META 8
#define BIG_DATA 1
#define SUB_TREE 2
#define INTEGER_KEY 8
#define META_BYTES 152u

struct page_head {
    uint64_t number;
    uint16_t pad, flags, lower, upper;
};
struct node {
    uint16_t low, high, flags, key_bytes;
};
struct tree {
    uint32_t pad;
    uint16_t flags, depth;
    uint64_t branches, leaves, overflows, entries, root;
};
struct meta {
    struct page_head head;
    uint32_t magic, version;
    uint64_t address, map_bytes;
    struct tree free, main;
    uint64_t last_page, transaction;
};
struct key {
    const uint8_t *at;
    unsigned bytes;
};

_Static_assert(sizeof(struct meta) == META_BYTES && sizeof(struct tree) == 48, "as LMDB has them");

static inline uint64_t lmdb_word(const uint8_t *at) {
    uint64_t value;

    memcpy(&value, at, sizeof value);
    return value;
}

// Pages that a large value takes.
static inline uint64_t lmdb_overflow_count(uint64_t bytes) { return (HEAD - 1 + bytes) / PAGE + 1; }

// Which pages a branch's node or a leaf's is about.
static inline uint64_t lmdb_child(const struct node *node) {
    return node->low | (uint64_t)node->high << 16 | (uint64_t)node->flags << 32;
}
static inline uint64_t lmdb_value_bytes(const struct node *node) { return node->low | (uint64_t)node->high << 16; }

static inline int lmdb_order(struct key a, struct key b, bool integer) {
    if (integer && a.bytes == 8 && b.bytes == 8) {
        uint64_t x = lmdb_word(a.at), y = lmdb_word(b.at);
        return x < y ? -1 : x > y;
    }
    unsigned both = a.bytes < b.bytes ? a.bytes : b.bytes;
    int result = memcmp(a.at, b.at, both);
    return result ? result : (a.bytes > b.bytes) - (a.bytes < b.bytes);
}

// Note what is damaged, if there is room for it; false.
__attribute__((format(printf, 4, 5))) bool lmdb_bad(struct edm_lmdb_report *report, const char *table, uint64_t page,
                                                    const char *what, ...);
// How much was read, less only at the file's end; or -errno.
ssize_t lmdb_read(int file, void *to, size_t bytes, uint64_t at);
// Which meta page holds. 0; -1: none, and the report says why; else -errno.
int lmdb_check_metas(int file, int lost_power, struct meta *out, struct edm_lmdb_report *report);
