// An LMDB file looked at without LMDB: liblmdb takes what it reads in a tree for true, so a flipped bit there may make
// it read outside its map, or write over pages in use. Before it opens the file, every page of every tree is checked
// here: its number, kind and bounds, its nodes, the order of keys, the counts, and that no page is in two places. Its
// meta pages come first (native/lmdb_meta.c).
#include <errno.h>
#include <stdlib.h>
#include <sys/stat.h>

#include "lmdb_format.h"

#define AHEAD_PAGES (1ull << 22) /* a transaction may free pages behind the file's end */

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

static bool seen_now(struct walk *w, uint64_t page, uint64_t count) {
    if (page < 2 || page > w->last_page || count > w->last_page - page + 1)
        return lmdb_bad(w->report, w->table, page, "there is no such page");
    for (uint64_t i = page; i < page + count; i++) {
        if (w->seen[i / 8] >> i % 8 & 1)
            return lmdb_bad(w->report, w->table, i, "is in two places");
        w->seen[i / 8] |= (uint8_t)(1u << i % 8);
    }
    w->report->pages += count;
    return true;
}

static bool read_page(struct walk *w, uint64_t page, uint8_t *to, size_t bytes) {
    ssize_t n = lmdb_read(w->file, to, bytes, page * PAGE);

    if (n < 0)
        return lmdb_bad(w->report, w->table, page, "cannot be read: %s", strerror((int)-n));
    return (size_t)n == bytes ? true : lmdb_bad(w->report, w->table, page, "the file is too short");
}

static bool check_overflow(struct walk *w, uint64_t page, uint64_t bytes) {
    uint64_t count = lmdb_overflow_count(bytes);

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
    if (lmdb_word(head) != page || flags != OVERFLOW_PAGE || said != count)
        return lmdb_bad(w->report, w->table, page, "is not the start of a large value");
    return true;
}

// A list of free pages: how many, then their numbers.
static bool check_free_list(struct walk *w, uint64_t page, const uint8_t *list, uint64_t bytes) {
    uint64_t count = bytes >= 8 ? lmdb_word(list) : 0;

    if (bytes < 8 || bytes % 8 || count > bytes / 8 - 1)
        return lmdb_bad(w->report, w->table, page, "a list of free pages that cannot be");
    for (uint64_t i = 1; i <= count; i++) {
        if (i > 1 && lmdb_word(list + 8 * i) >= lmdb_word(list + 8 * (i - 1)))
            return lmdb_bad(w->report, w->table, page, "a list of free pages that is out of order");
        if (!seen_now(w, lmdb_word(list + 8 * i), 1))
            return false;
    }
    return true;
}

static bool check_free_value(struct walk *w, uint64_t page, const uint8_t *value, uint64_t bytes, bool big) {
    if (!big)
        return check_free_list(w, page, value, bytes);
    uint64_t at = lmdb_word(value);
    uint8_t *list = bytes <= PAGE * w->last_page ? malloc(bytes) : NULL;
    if (!list)
        return lmdb_bad(w->report, w->table, page, "a list of free pages of that length cannot be");
    ssize_t n = lmdb_read(w->file, list, bytes, at * PAGE + HEAD);
    bool sound = (uint64_t)n == bytes ? check_free_list(w, at, list, bytes)
                                      : lmdb_bad(w->report, w->table, at, "a list of free pages cannot be read");
    free(list);
    return sound;
}

static bool walk_page(struct walk *w, uint64_t page, unsigned level, unsigned depth, struct key from, struct key to);

static bool check_sub_tree(struct walk *w, uint64_t page, struct key name, const uint8_t *value, uint64_t bytes) {
    struct tree tree;
    struct edm_lmdb_report *report = w->report;

    if (bytes != sizeof tree || name.bytes >= sizeof report->tables[0].name || memchr(name.at, 0, name.bytes) ||
        report->table_count == EDM_LMDB_TABLES_MOST)
        return lmdb_bad(report, w->table, page, "a table that cannot be");
    struct edm_lmdb_table *table = &report->tables[report->table_count++];
    memcpy(table->name, name.at, name.bytes);
    table->name[name.bytes] = 0;
    memcpy(&tree, value, sizeof tree);
    if (tree.flags & ~INTEGER_KEY || tree.pad)
        return lmdb_bad(report, table->name, page, "a table of a kind that cannot be");
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
        return tree.root == UINT64_MAX ? lmdb_bad(report, table->name, page, "a table without pages") : false;
    table->entries = sub.entries;
    table->key_sum = sub.key_sum;
    table->least_bytes = sub.entries ? sub.least_bytes : 0;
    table->most_bytes = sub.most_bytes;
    return (tree.entries == sub.entries && tree.branches == sub.branches && tree.leaves == sub.leaves &&
            tree.overflows == sub.overflows) ||
           lmdb_bad(report, table->name, page, "its counts are not those of its pages");
}

static bool check_leaf(struct walk *w, uint64_t page, const struct node *node, struct key key, const uint8_t *value) {
    uint64_t bytes = lmdb_value_bytes(node);
    bool big = node->flags == BIG_DATA, sub = node->flags == SUB_TREE;

    w->entries++;
    w->key_sum += edm_crc32c(key.at, key.bytes);
    w->least_bytes = bytes < w->least_bytes ? bytes : w->least_bytes;
    w->most_bytes = bytes > w->most_bytes ? bytes : w->most_bytes;
    if (node->flags && !big && !(sub && w->is_main))
        return lmdb_bad(w->report, w->table, page, "a row of a kind that cannot be");
    if (w->is_main != sub)
        return lmdb_bad(w->report, w->table, page, "a row where only tables are, or the reverse");
    if (big && !check_overflow(w, lmdb_word(value), bytes))
        return false;
    if (w->is_free && lmdb_word(key.at) > w->report->transaction)
        return lmdb_bad(w->report, w->table, page, "pages that are free since a transaction that is not yet");
    if (w->is_free)
        return check_free_value(w, page, value, bytes, big);
    return sub ? check_sub_tree(w, page, key, value, bytes) : true;
}

// Where a node's key is, if the node lies in the page and on no other.
static bool node_at(struct walk *w, uint64_t page, const uint8_t *data, unsigned offset, bool leaf, uint8_t *taken,
                    struct node *node, unsigned *bytes) {
    const struct page_head *head = (const struct page_head *)data;

    if (offset % 2 || offset < head->upper || offset + NODE_HEAD > PAGE)
        return lmdb_bad(w->report, w->table, page, "a row outside the page");
    memcpy(node, data + offset, sizeof *node);
    uint64_t value = !leaf ? 0 : node->flags & BIG_DATA ? 8 : lmdb_value_bytes(node);
    uint64_t all = (NODE_HEAD + node->key_bytes + value + 1) & ~1ull;
    if (all > PAGE - offset)
        return lmdb_bad(w->report, w->table, page, "a row longer than the page");
    for (unsigned i = offset / 2; i < (offset + all) / 2; i++) {
        if (taken[i])
            return lmdb_bad(w->report, w->table, page, "rows that overlap");
        taken[i] = 1;
    }
    *bytes += (unsigned)all;
    return true;
}

static bool check_key(struct walk *w, uint64_t page, struct key key, struct key from, struct key to) {
    if (w->integer_keys && key.bytes != 8)
        return lmdb_bad(w->report, w->table, page, "a key of another size");
    if ((from.at && lmdb_order(key, from, w->integer_keys) < 0) || (to.at && lmdb_order(key, to, w->integer_keys) >= 0))
        return lmdb_bad(w->report, w->table, page, "a key in the wrong place");
    return true;
}

static bool page_is_sound(struct walk *w, uint64_t page, const uint8_t *data, bool leaf, struct key *keys,
                          struct node *nodes, unsigned *count, struct key from, struct key to) {
    const struct page_head *head = (const struct page_head *)data;
    uint8_t taken[PAGE / 2] = {0};
    unsigned bytes = 0;

    if (head->number != page || head->flags != (leaf ? LEAF : BRANCH))
        return lmdb_bad(w->report, w->table, page, "is another page than it should be");
    if (head->lower <= HEAD || head->lower % 2 || head->lower > head->upper || head->upper > PAGE)
        return lmdb_bad(w->report, w->table, page, "its bounds cannot be");
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
        if (i > !leaf && lmdb_order(keys[i - 1], keys[i], w->integer_keys) >= 0)
            return lmdb_bad(w->report, w->table, page, "keys out of order");
    }
    return bytes == PAGE - head->upper || lmdb_bad(w->report, w->table, page, "rows that do not fill their room");
}

static bool walk_page(struct walk *w, uint64_t page, unsigned level, unsigned depth, struct key from, struct key to) {
    uint8_t *data = w->levels + PAGE * level;
    struct key keys[PAGE / 2 / NODE_HEAD * 2];
    struct node nodes[PAGE / 2 / NODE_HEAD * 2];
    unsigned count = 0;
    bool leaf = depth == 1, sound = true;

    if (!depth || level + depth > DEPTH_MOST)
        return lmdb_bad(w->report, w->table, page, "a tree of a depth that cannot be");
    if (!seen_now(w, page, 1) || !read_page(w, page, data, PAGE))
        return false;
    *(leaf ? &w->leaves : &w->branches) += 1;
    if (((const struct page_head *)data)->lower > HEAD + sizeof keys / sizeof *keys * 2)
        return lmdb_bad(w->report, w->table, page, "more rows than a page holds");
    if (!page_is_sound(w, page, data, leaf, keys, nodes, &count, from, to))
        return false;
    for (unsigned i = 0; i < count; i++) {
        if (leaf) {
            sound &= check_leaf(w, page, &nodes[i], keys[i], keys[i].at + keys[i].bytes);
            continue;
        }
        sound &= walk_page(w, lmdb_child(&nodes[i]), level + 1, depth - 1, i ? keys[i] : from,
                           i + 1 < count ? keys[i + 1] : to);
    }
    return sound;
}

static bool walk_tree(struct walk *w, const struct tree *tree, unsigned meta_page) {
    if (tree->root == UINT64_MAX)
        return !tree->entries || lmdb_bad(w->report, w->table, meta_page, "a tree without pages");
    if (!walk_page(w, tree->root, 0, tree->depth, (struct key){0}, (struct key){0}))
        return false;
    return (tree->entries == w->entries && tree->branches == w->branches && tree->leaves == w->leaves &&
            tree->overflows == w->overflows) ||
           lmdb_bad(w->report, w->table, meta_page, "its counts are not those of its pages");
}

int edm_lmdb_check(int file, int lost_power, int deep, struct edm_lmdb_report *report) {
    struct meta meta;
    struct stat status;

    memset(report, 0, sizeof *report);
    if (fstat(file, &status))
        return -errno;
    int failed = lmdb_check_metas(file, lost_power, &meta, report);
    if (failed < -1)
        return failed;
    if (failed)
        return 0;
    if (meta.last_page > (uint64_t)status.st_size / PAGE + AHEAD_PAGES) {
        lmdb_bad(report, "meta", meta.transaction & 1, "more pages than the file has");
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
        lmdb_bad(report, "meta", meta.transaction & 1, "damaged");
    free(seen);
    free(levels);
    return 0;
}
