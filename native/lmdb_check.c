// An LMDB file looked at without LMDB: liblmdb takes what it reads in a tree for true, so a flipped bit there may make
// it read outside its map, or write over pages in use. Before it opens the file, every page of every tree is checked
// here: its number, kind and bounds, its nodes, the order of keys, the counts, and that no page is in two places.
//
// Meta pages: LMDB writes only the first 152 bytes of pages 0 and 1. At byte 2048 of each stands a guard of ours, which
// says what the meta page held after the last commit there: one that was damaged, or rolled back, does not fit.
//
// Source: the format of LMDB 0.9 (mdb.c: MDB_page, MDB_node, MDB_db, MDB_meta), little endian, 64 bits, 4096 bytes.
#include <errno.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

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
#define LMDB_MAGIC 0xbeefc0deu
#define META_BYTES 152u
#define GUARD_AT 2048u
#define GUARD_MAGIC 0x44524755444d4445ull /* "EDMDUGRD" */
#define AHEAD_PAGES (1ull << 22)          /* a transaction may free pages behind the file's end */

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
struct guard {
    uint64_t magic, transaction;
    uint32_t meta_sum;  // of all of the meta page's 152 bytes but the transaction
    uint32_t own_sum;
};
struct key {
    const uint8_t *at;
    unsigned bytes;
};
struct walk {
    int file, deep;
    uint64_t last_page;
    uint8_t *seen;  // bit: the page is somewhere
    uint8_t *levels;
    const char *table;
    bool integer_keys, is_main, is_free;
    uint64_t branches, leaves, overflows, entries, key_sum, least_bytes, most_bytes;
    struct edm_lmdb_report *report;
};

_Static_assert(sizeof(struct meta) == META_BYTES && sizeof(struct tree) == 48, "as LMDB has them");

__attribute__((format(printf, 4, 5))) static bool bad(struct edm_lmdb_report *report, const char *table, uint64_t page,
                                                      const char *what, ...) {
    if (report->bad_count < EDM_LMDB_BAD_MOST) {
        struct edm_lmdb_bad *one = &report->bad[report->bad_count++];
        va_list arguments;
        va_start(arguments, what);
        vsnprintf(one->what, sizeof one->what, what, arguments);
        va_end(arguments);
        snprintf(one->table, sizeof one->table, "%s", table);
        one->page = page;
    }
    return false;
}

static ssize_t read_whole(int file, void *to, size_t bytes, uint64_t at) {
    size_t done = 0;

    while (done < bytes) {
        ssize_t n = pread(file, (char *)to + done, bytes - done, (off_t)(at + done));
        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0)
            return -errno;
        if (!n)
            break;
        done += (size_t)n;
    }
    return (ssize_t)done;
}

// ---- meta pages and their guards

static uint32_t meta_sum(const struct meta *meta) { return edm_crc32c(meta, META_BYTES - 8); }

static uint32_t guard_sum(const struct guard *guard) { return edm_crc32c(guard, offsetof(struct guard, own_sum)); }

static int read_metas(int file, struct meta metas[2], struct guard guards[2]) {
    for (unsigned i = 0; i < 2; i++) {
        ssize_t n = read_whole(file, &metas[i], META_BYTES, i * PAGE);
        if (n >= 0 && n < (ssize_t)META_BYTES)
            return -ENODATA;
        if (n >= 0)
            n = read_whole(file, &guards[i], sizeof guards[i], i * PAGE + GUARD_AT);
        if (n < 0)
            return (int)n;
    }
    return 0;
}

enum guard_state { NONE, SOUND, DAMAGED };

static enum guard_state state_of(const struct guard *guard) {
    static const struct guard none;

    if (!memcmp(guard, &none, sizeof none))
        return NONE;
    return guard->magic == GUARD_MAGIC && guard->own_sum == guard_sum(guard) ? SOUND : DAMAGED;
}

static bool newest_is_guarded(const struct meta metas[2], const struct guard guards[2], const enum guard_state *states,
                              unsigned newest) {
    unsigned other = 1 - newest;
    const struct meta *meta = &metas[newest];

    if (states[newest] == SOUND && guards[newest].transaction == meta->transaction)
        return guards[newest].meta_sum == meta_sum(meta);
    if (states[newest] == DAMAGED || states[other] == DAMAGED)
        return true;  // which is told; one of the two is damaged, not both
    if (states[newest] == NONE && states[other] == NONE)
        return true;
    // A death between a commit and its guard: the guards are one transaction behind, and this is no older meta page.
    return states[other] == SOUND && guards[other].transaction + 1 == meta->transaction &&
           metas[other].transaction + 1 == meta->transaction && guards[other].meta_sum == meta_sum(&metas[other]) &&
           (states[newest] == NONE ||
            (guards[newest].transaction + 2 == meta->transaction && guards[newest].meta_sum != meta_sum(meta)));
}

// Which meta page holds; -1: none.
static int check_metas(int file, int lost_power, struct meta *out, struct edm_lmdb_report *report) {
    struct meta metas[2];
    struct guard guards[2] = {{0}};
    enum guard_state states[2];
    int failed = read_metas(file, metas, guards);

    if (failed)
        return failed == -ENODATA ? bad(report, "meta", 0, "the file is too short"), -1 : failed;
    unsigned newest = metas[1].transaction > metas[0].transaction;
    for (unsigned i = 0; i < 2; i++) {
        const struct meta *m = &metas[i];
        states[i] = state_of(&guards[i]);
        if (m->magic != LMDB_MAGIC || m->version != 1 || m->head.number != i || m->head.flags != META ||
            m->free.pad != PAGE || (m->transaction && (m->transaction & 1) != i))
            bad(report, "meta", i, "no meta page");
        else if (states[i] == SOUND && m->transaction < guards[i].transaction && !lost_power)
            bad(report, "meta", i, "transaction %llu is missing", (unsigned long long)guards[i].transaction);
        else if (states[i] == DAMAGED) {
            report->guards_damaged |= 1u << i;
        } else if (i != newest && states[i] == SOUND && m->transaction == guards[i].transaction &&
                   guards[i].meta_sum != meta_sum(m))
            report->older_meta_damaged = 1;
    }
    if (!report->bad_count && !lost_power && !newest_is_guarded(metas, guards, states, newest))
        bad(report, "meta", newest, "its checksum does not match");
    *out = metas[newest];
    report->transaction = out->transaction;
    return report->bad_count ? -1 : 0;
}

int edm_lmdb_guard(int file) {
    struct meta metas[2];
    struct guard guards[2];
    int failed = read_metas(file, metas, guards);

    for (unsigned i = 0; i < 2 && !failed; i++) {
        struct guard guard = {GUARD_MAGIC, metas[i].transaction, meta_sum(&metas[i]), 0};
        guard.own_sum = guard_sum(&guard);
        if (!memcmp(&guard, &guards[i], sizeof guard))
            continue;
        ssize_t n = pwrite(file, &guard, sizeof guard, i * PAGE + GUARD_AT);
        if (n != (ssize_t)sizeof guard)
            failed = n < 0 ? -errno : -EIO;
    }
    return failed;
}

// ---- trees

static bool seen_now(struct walk *w, uint64_t page, uint64_t count) {
    if (page < 2 || page > w->last_page || count > w->last_page - page + 1)
        return bad(w->report, w->table, page, "there is no such page");
    for (uint64_t i = page; i < page + count; i++) {
        if (w->seen[i / 8] >> i % 8 & 1)
            return bad(w->report, w->table, i, "is in two places");
        w->seen[i / 8] |= (uint8_t)(1u << i % 8);
    }
    w->report->pages += count;
    return true;
}

static bool read_page(struct walk *w, uint64_t page, uint8_t *to, size_t bytes) {
    ssize_t n = read_whole(w->file, to, bytes, page * PAGE);

    if (n < 0)
        return bad(w->report, w->table, page, "cannot be read: %s", strerror((int)-n));
    return (size_t)n == bytes ? true : bad(w->report, w->table, page, "the file is too short");
}

static int order(const struct walk *w, struct key a, struct key b) {
    if (w->integer_keys) {
        uint64_t x, y;
        memcpy(&x, a.at, 8);
        memcpy(&y, b.at, 8);
        return x < y ? -1 : x > y;
    }
    unsigned both = a.bytes < b.bytes ? a.bytes : b.bytes;
    int result = memcmp(a.at, b.at, both);
    return result ? result : (a.bytes > b.bytes) - (a.bytes < b.bytes);
}

static uint64_t word(const uint8_t *at) {
    uint64_t value;

    memcpy(&value, at, sizeof value);
    return value;
}

// Pages that a large value takes.
static uint64_t overflow_count(uint64_t bytes) { return (HEAD - 1 + bytes) / PAGE + 1; }

static bool check_overflow(struct walk *w, uint64_t page, uint64_t bytes) {
    uint64_t count = overflow_count(bytes);

    w->overflows += count;
    if (!seen_now(w, page, count))
        return false;
    if (!w->deep)
        return true;
    uint8_t head[HEAD];
    uint32_t said;
    if (!read_page(w, page, head, sizeof head))
        return false;
    memcpy(&said, head + 12, 4);
    uint16_t flags;
    memcpy(&flags, head + 10, 2);
    if (word(head) != page || flags != OVERFLOW_PAGE || said != count)
        return bad(w->report, w->table, page, "is not the start of a large value");
    return true;
}

int edm_lmdb_value_sound(const void *value, size_t bytes, uintptr_t map, size_t map_bytes) {
    uintptr_t at = (uintptr_t)value - HEAD;
    uint64_t number;
    uint16_t flags;
    uint32_t said;

    if (at - map >= map_bytes)
        return 1;  // written in this very transaction, and in no file yet
    memcpy(&number, (const uint8_t *)value - HEAD, 8);
    memcpy(&flags, (const uint8_t *)value - HEAD + 10, 2);
    memcpy(&said, (const uint8_t *)value - HEAD + 12, 4);
    return number == (at - map) / PAGE && flags == OVERFLOW_PAGE && said == overflow_count(bytes);
}

int edm_lmdb_values_sound(const void *const *values, const size_t *bytes, size_t n, uintptr_t map, size_t map_bytes) {
    for (size_t i = 0; i < n; i++)
        if (!edm_lmdb_value_sound(values[i], bytes[i], map, map_bytes))
            return 0;
    return 1;
}

// A list of free pages: how many, then their numbers.
static bool check_free_list(struct walk *w, uint64_t page, const uint8_t *list, uint64_t bytes) {
    uint64_t count = bytes >= 8 ? word(list) : 0;

    if (bytes < 8 || bytes % 8 || count > bytes / 8 - 1)
        return bad(w->report, w->table, page, "a list of free pages that cannot be");
    for (uint64_t i = 1; i <= count; i++) {
        if (i > 1 && word(list + 8 * i) >= word(list + 8 * (i - 1)))
            return bad(w->report, w->table, page, "a list of free pages that is out of order");
        if (!seen_now(w, word(list + 8 * i), 1))
            return false;
    }
    return true;
}

static bool check_free_value(struct walk *w, uint64_t page, const uint8_t *value, uint64_t bytes, bool big) {
    if (!big)
        return check_free_list(w, page, value, bytes);
    uint64_t at = word(value);
    uint8_t *list = bytes <= PAGE * w->last_page ? malloc(bytes) : NULL;
    if (!list)
        return bad(w->report, w->table, page, "a list of free pages of that length cannot be");
    ssize_t n = read_whole(w->file, list, bytes, at * PAGE + HEAD);
    bool sound = (uint64_t)n == bytes ? check_free_list(w, at, list, bytes)
                                      : bad(w->report, w->table, at, "a list of free pages cannot be read");
    free(list);
    return sound;
}

static bool walk_page(struct walk *w, uint64_t page, unsigned level, unsigned depth, struct key from, struct key to);

static bool check_sub_tree(struct walk *w, uint64_t page, struct key name, const uint8_t *value, uint64_t bytes) {
    struct tree tree;
    struct edm_lmdb_report *report = w->report;

    if (bytes != sizeof tree || name.bytes >= sizeof report->tables[0].name || memchr(name.at, 0, name.bytes) ||
        report->table_count == EDM_LMDB_TABLES_MOST)
        return bad(report, w->table, page, "a table that cannot be");
    struct edm_lmdb_table *table = &report->tables[report->table_count++];
    memcpy(table->name, name.at, name.bytes);
    table->name[name.bytes] = 0;
    memcpy(&tree, value, sizeof tree);
    if (tree.flags & ~INTEGER_KEY || tree.pad)
        return bad(report, table->name, page, "a table of a kind that cannot be");
    table->integer_key = tree.flags == INTEGER_KEY;
    struct walk sub = {.file = w->file,
                       .deep = w->deep,
                       .last_page = w->last_page,
                       .seen = w->seen,
                       .levels = w->levels + PAGE * DEPTH_MOST,
                       .table = table->name,
                       .integer_keys = table->integer_key,
                       .least_bytes = UINT64_MAX,
                       .report = report};
    if (tree.root == UINT64_MAX ? tree.depth || tree.entries
                                : !walk_page(&sub, tree.root, 0, tree.depth, (struct key){0}, (struct key){0}))
        return tree.root == UINT64_MAX ? bad(report, table->name, page, "a table without pages") : false;
    table->entries = sub.entries;
    table->key_sum = sub.key_sum;
    table->least_bytes = sub.entries ? sub.least_bytes : 0;
    table->most_bytes = sub.most_bytes;
    return (tree.entries == sub.entries && tree.branches == sub.branches && tree.leaves == sub.leaves &&
            tree.overflows == sub.overflows) ||
           bad(report, table->name, page, "its counts are not those of its pages");
}

static bool check_leaf(struct walk *w, uint64_t page, const struct node *node, struct key key, const uint8_t *value) {
    uint64_t bytes = node->low | (uint64_t)node->high << 16;
    bool big = node->flags == BIG_DATA, sub = node->flags == SUB_TREE;

    w->entries++;
    w->key_sum += edm_crc32c(key.at, key.bytes);
    w->least_bytes = bytes < w->least_bytes ? bytes : w->least_bytes;
    w->most_bytes = bytes > w->most_bytes ? bytes : w->most_bytes;
    if (node->flags && !big && !(sub && w->is_main))
        return bad(w->report, w->table, page, "a row of a kind that cannot be");
    if (w->is_main != sub)
        return bad(w->report, w->table, page, "a row where only tables are, or the reverse");
    if (big && !check_overflow(w, word(value), bytes))
        return false;
    if (w->is_free && word(key.at) > w->report->transaction)
        return bad(w->report, w->table, page, "pages that are free since a transaction that is not yet");
    if (w->is_free)
        return check_free_value(w, page, value, bytes, big);
    return sub ? check_sub_tree(w, page, key, value, bytes) : true;
}

// Where a node's key is, if the node lies in the page and on no other.
static bool node_at(struct walk *w, uint64_t page, const uint8_t *data, unsigned offset, bool leaf, uint8_t *taken,
                    struct node *node, unsigned *bytes) {
    const struct page_head *head = (const struct page_head *)data;

    if (offset % 2 || offset < head->upper || offset + NODE_HEAD > PAGE)
        return bad(w->report, w->table, page, "a row outside the page");
    memcpy(node, data + offset, sizeof *node);
    uint64_t value = !leaf ? 0 : node->flags & BIG_DATA ? 8 : node->low | (uint64_t)node->high << 16;
    uint64_t all = (NODE_HEAD + node->key_bytes + value + 1) & ~1ull;
    if (all > PAGE - offset)
        return bad(w->report, w->table, page, "a row longer than the page");
    for (unsigned i = offset / 2; i < (offset + all) / 2; i++) {
        if (taken[i])
            return bad(w->report, w->table, page, "rows that overlap");
        taken[i] = 1;
    }
    *bytes += (unsigned)all;
    return true;
}

static bool check_key(struct walk *w, uint64_t page, struct key key, struct key from, struct key to) {
    if (w->integer_keys && key.bytes != 8)
        return bad(w->report, w->table, page, "a key of another size");
    if ((from.at && order(w, key, from) < 0) || (to.at && order(w, key, to) >= 0))
        return bad(w->report, w->table, page, "a key in the wrong place");
    return true;
}

static bool page_is_sound(struct walk *w, uint64_t page, const uint8_t *data, bool leaf, struct key *keys,
                          struct node *nodes, unsigned *count, struct key from, struct key to) {
    const struct page_head *head = (const struct page_head *)data;
    uint8_t taken[PAGE / 2] = {0};
    unsigned bytes = 0;

    if (head->number != page || head->flags != (leaf ? LEAF : BRANCH))
        return bad(w->report, w->table, page, "is another page than it should be");
    if (head->lower <= HEAD || head->lower % 2 || head->lower > head->upper || head->upper > PAGE)
        return bad(w->report, w->table, page, "its bounds cannot be");
    *count = (head->lower - HEAD) / 2;
    for (unsigned i = 0; i < *count; i++) {
        uint16_t offset;
        memcpy(&offset, data + HEAD + 2 * i, 2);
        if (!node_at(w, page, data, offset, leaf, taken, &nodes[i], &bytes))
            return false;
        keys[i] = (struct key){data + offset + NODE_HEAD, nodes[i].key_bytes};
        // A branch's first key means nothing.
        if (!leaf && !i)
            continue;
        if (!check_key(w, page, keys[i], from, to))
            return false;
        if (i > !leaf && order(w, keys[i - 1], keys[i]) >= 0)
            return bad(w->report, w->table, page, "keys out of order");
    }
    return bytes == PAGE - head->upper || bad(w->report, w->table, page, "rows that do not fill their room");
}

static bool walk_page(struct walk *w, uint64_t page, unsigned level, unsigned depth, struct key from, struct key to) {
    uint8_t *data = w->levels + PAGE * level;
    struct key keys[PAGE / 2 / NODE_HEAD * 2];
    struct node nodes[PAGE / 2 / NODE_HEAD * 2];
    unsigned count = 0;
    bool leaf = depth == 1, sound = true;

    if (!depth || level + depth > DEPTH_MOST)
        return bad(w->report, w->table, page, "a tree of a depth that cannot be");
    if (!seen_now(w, page, 1) || !read_page(w, page, data, PAGE))
        return false;
    *(leaf ? &w->leaves : &w->branches) += 1;
    if (((const struct page_head *)data)->lower > HEAD + sizeof keys / sizeof *keys * 2)
        return bad(w->report, w->table, page, "more rows than a page holds");
    if (!page_is_sound(w, page, data, leaf, keys, nodes, &count, from, to))
        return false;
    for (unsigned i = 0; i < count; i++) {
        if (leaf) {
            sound &= check_leaf(w, page, &nodes[i], keys[i], keys[i].at + keys[i].bytes);
            continue;
        }
        uint64_t child = nodes[i].low | (uint64_t)nodes[i].high << 16 | (uint64_t)nodes[i].flags << 32;
        sound &= walk_page(w, child, level + 1, depth - 1, i ? keys[i] : from, i + 1 < count ? keys[i + 1] : to);
    }
    return sound;
}

static bool walk_tree(struct walk *w, const struct tree *tree, unsigned meta_page) {
    if (tree->root == UINT64_MAX)
        return !tree->entries || bad(w->report, w->table, meta_page, "a tree without pages");
    if (!walk_page(w, tree->root, 0, tree->depth, (struct key){0}, (struct key){0}))
        return false;
    return (tree->entries == w->entries && tree->branches == w->branches && tree->leaves == w->leaves &&
            tree->overflows == w->overflows) ||
           bad(w->report, w->table, meta_page, "its counts are not those of its pages");
}

int edm_lmdb_check(int file, int lost_power, int deep, struct edm_lmdb_report *report) {
    struct meta meta;
    struct stat status;

    memset(report, 0, sizeof *report);
    if (fstat(file, &status))
        return -errno;
    int failed = check_metas(file, lost_power, &meta, report);
    if (failed < -1)
        return failed;
    if (failed)
        return 0;
    if (meta.last_page > (uint64_t)status.st_size / PAGE + AHEAD_PAGES) {
        bad(report, "meta", meta.transaction & 1, "more pages than the file has");
        return 0;
    }
    uint8_t *seen = calloc(meta.last_page / 8 + 1, 1), *levels = malloc(2ul * DEPTH_MOST * PAGE);
    if (!seen || !levels) {
        free(seen);
        free(levels);
        return -ENOMEM;
    }
    struct walk walk = {
        .file = file, .deep = deep, .last_page = meta.last_page, .seen = seen, .levels = levels, .report = report};
    struct walk main_tree = walk, free_tree = walk;
    main_tree.table = "tables";
    main_tree.is_main = true;
    free_tree.table = "free pages";
    free_tree.is_free = free_tree.integer_keys = true;
    // Both, so that all that can be found is told; a tree that is broken off leaves no sure counts.
    bool sound = walk_tree(&main_tree, &meta.main, meta.transaction & 1);
    sound &= walk_tree(&free_tree, &meta.free, meta.transaction & 1);
    report->unaccounted = sound ? meta.last_page - 1 - report->pages : 0;
    if (!sound && !report->bad_count)
        bad(report, "meta", meta.transaction & 1, "damaged");
    free(seen);
    free(levels);
    return 0;
}
