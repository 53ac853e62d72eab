// Rows of a table, found in LMDB's map without LMDB: what stands before a large value says how many pages go free with
// it, and liblmdb takes that for true. So it is looked at before the value is deleted or written over.
//
// Between transactions only, in the process that writes: then what the newest meta page says is what the next one
// finds.
#include "lmdb_format.h"

struct map {
    const uint8_t *at;
    uint64_t pages;  // that the meta page speaks of, and the map holds
};
enum found { MISSING, FOUND, BROKEN };

static bool is_page(const struct map *map, uint64_t page) { return page > 1 && page < map->pages; }

static bool node_of(const uint8_t *page, unsigned i, struct node *node, struct key *key) {
    uint16_t offset;

    memcpy(&offset, page + HEAD + 2 * i, sizeof offset);
    if (offset > PAGE - NODE_HEAD)
        return false;
    memcpy(node, page + offset, sizeof *node);
    *key = (struct key){page + offset + NODE_HEAD, node->key_bytes};
    return offset + NODE_HEAD + node->key_bytes <= PAGE;
}

// The last row of a page that is not behind the key; of a branch its first at least. -1: none; -2: the page is broken.
static int last_not_behind(const uint8_t *page, bool leaf, struct key key, bool integer, struct node *node,
                           struct key *there) {
    struct page_head head;

    memcpy(&head, page, sizeof head);
    if (head.flags != (leaf ? LEAF : BRANCH) || head.lower <= HEAD || head.lower > PAGE)
        return -2;
    int low = leaf ? -1 : 0, high = (head.lower - (int)HEAD) / 2;
    while (high - low > 1) {
        int middle = (low + high) / 2;
        if (!node_of(page, (unsigned)middle, node, there))
            return -2;
        if (lmdb_order(*there, key, integer) <= 0)
            low = middle;
        else
            high = middle;
    }
    return low < 0 ? -1 : node_of(page, (unsigned)low, node, there) ? low : -2;
}

static enum found find(const struct map *map, const struct tree *tree, struct key key, bool integer, struct node *node,
                       const uint8_t **value) {
    uint64_t page = tree->root;
    struct key there;

    if (tree->root == UINT64_MAX)
        return MISSING;
    for (unsigned depth = tree->depth; depth; depth--) {
        if (!is_page(map, page))
            return BROKEN;
        const uint8_t *data = map->at + page * PAGE;
        int at = last_not_behind(data, depth == 1, key, integer, node, &there);
        if (at < 0)
            return at == -1 ? MISSING : BROKEN;
        page = lmdb_child(node);
        if (depth > 1)
            continue;
        if (lmdb_order(there, key, integer))
            return MISSING;
        *value = there.at + there.bytes;
        uint64_t bytes = node->flags & BIG_DATA ? 8 : lmdb_value_bytes(node);
        return bytes <= (uint64_t)(data + PAGE - *value) ? FOUND : BROKEN;
    }
    return BROKEN;
}

static bool value_sound(const struct map *map, const struct node *node, const uint8_t *value) {
    uint64_t page = lmdb_word(value);
    struct page_head head;
    uint32_t said;

    if (!is_page(map, page))
        return false;
    memcpy(&head, map->at + page * PAGE, sizeof head);
    memcpy(&said, map->at + page * PAGE + 12, sizeof said);
    return head.number == page && head.flags == OVERFLOW_PAGE && said == lmdb_overflow_count(lmdb_value_bytes(node));
}

size_t edm_lmdb_unsound(const char *table, const uint64_t *keys, size_t n, uintptr_t map_at, size_t map_bytes) {
    struct map map = {(const uint8_t *)map_at, map_bytes / PAGE};
    struct meta metas[2];
    struct tree tree;
    struct node node;
    const uint8_t *value;

    if (map.pages < 2)
        return map_bytes ? 0 : n;
    for (unsigned i = 0; i < 2; i++)
        memcpy(&metas[i], map.at + i * PAGE, sizeof metas[i]);
    const struct meta *meta = &metas[metas[1].transaction > metas[0].transaction];
    if (meta->last_page < map.pages)
        map.pages = meta->last_page + 1;
    struct key name = {(const uint8_t *)table, (unsigned)strlen(table)};
    if (find(&map, &meta->main, name, false, &node, &value) != FOUND || node.flags != SUB_TREE ||
        lmdb_value_bytes(&node) != sizeof tree)
        return 0;
    memcpy(&tree, value, sizeof tree);
    for (size_t i = 0; i < n; i++) {
        struct key key = {(const uint8_t *)&keys[i], sizeof keys[i]};
        enum found found = find(&map, &tree, key, true, &node, &value);
        if (found == BROKEN || (found == FOUND && node.flags & BIG_DATA && !value_sound(&map, &node, value)))
            return i;
    }
    return n;
}
