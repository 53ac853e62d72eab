// What the program has registered with userfaultfds of its own, as far as it is seen here: a hint.
#pragma once
#include <stdbool.h>
#include <stdint.h>

// The kernel has registered, or taken out, [a, b) with the userfaultfd `fd` of this process's memory.
void own_range_add(int fd, uint64_t a, uint64_t b);
void own_range_del(uint64_t a, uint64_t b);

// `fd` is a new one.
void own_range_new(int fd);

// Whether `fd` is one that has registered memory; and whether none of those has [a, b): then it may be EDM's.
bool own_range_file(int fd);
bool own_range_lacks(uint64_t a, uint64_t b);
