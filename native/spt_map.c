// A small hash map from u64 to u64, for what the SPT table keeps beside its pages.
#include <errno.h>
#include <stdlib.h>

#include "spt_table.h"

// Keys are kept plus one; the one key that cannot be, UINT64_MAX, is no slot, region or note.
static size_t place(const struct spt_map *map, uint64_t key) {
    size_t at = (key + 1) * 0x9e3779b97f4a7c15ull >> 20 & (map->capacity - 1);

    while (map->keys[at] && map->keys[at] != key + 1)
        at = (at + 1) & (map->capacity - 1);
    return at;
}

bool spt_map_get(const struct spt_map *map, uint64_t key, uint64_t *value) {
    if (!map->used)
        return false;
    size_t at = place(map, key);
    if (!map->keys[at])
        return false;
    *value = map->values[at];
    return true;
}

int spt_map_reserve(struct spt_map *map, size_t more) {
    size_t wanted = 2 * (map->used + more) + 2, capacity = map->capacity ? map->capacity : 16;

    while (capacity < wanted)
        capacity *= 2;
    if (capacity == map->capacity)
        return 0;
    struct spt_map bigger = {calloc(capacity, sizeof(uint64_t)), calloc(capacity, sizeof(uint64_t)), capacity, 0};
    if (!bigger.keys || !bigger.values) {
        spt_map_free(&bigger);
        return -ENOMEM;
    }
    for (size_t i = 0; i < map->capacity; i++)
        if (map->keys[i])
            spt_map_set(&bigger, map->keys[i] - 1, map->values[i]);
    spt_map_free(map);
    *map = bigger;
    return 0;
}

void spt_map_set(struct spt_map *map, uint64_t key, uint64_t value) {
    size_t at = place(map, key);

    map->used += !map->keys[at];
    map->keys[at] = key + 1;
    map->values[at] = value;
}

void spt_map_remove(struct spt_map *map, uint64_t key) {
    if (!map->used)
        return;
    size_t at = place(map, key);
    if (!map->keys[at])
        return;
    map->keys[at] = 0;
    map->used--;
    // What stood behind it in the same run must be found again without it.
    for (size_t next = (at + 1) & (map->capacity - 1); map->keys[next]; next = (next + 1) & (map->capacity - 1)) {
        uint64_t moved = map->keys[next], value = map->values[next];
        map->keys[next] = 0;
        size_t to = place(map, moved - 1);
        map->keys[to] = moved;
        map->values[to] = value;
    }
}

bool spt_map_next(const struct spt_map *map, size_t *at, uint64_t *key, uint64_t *value) {
    for (; *at < map->capacity; ++*at)
        if (map->keys[*at]) {
            *key = map->keys[*at] - 1;
            *value = map->values[(*at)++];
            return true;
        }
    return false;
}

void spt_map_free(struct spt_map *map) {
    free(map->keys);
    free(map->values);
    *map = (struct spt_map){0};
}
