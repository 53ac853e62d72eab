// Fault points: named places where a test stops, ends, delays, fails or damages something of this process. Off, each
// costs one comparison.
#pragma once
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

enum edm_point {
    POINT_NONE = 0,
#define EDM_POINT(name, what, fails, damaged) POINT_##name,
#include "points.h"
#undef EDM_POINT
    POINT_COUNT
};

extern _Atomic int point_armed;  // several threads may be at points while one is being taken
// Does what the armed point does; EDM_POINT_FAIL or _CORRUPT where that is the caller's to do, else 0.
int point_reached(enum edm_point which);

static inline bool point_armed_is(enum edm_point which) {
    return __builtin_expect(atomic_load_explicit(&point_armed, memory_order_relaxed) == (int)which, 0);
}

// Where nothing can fail.
static inline void point(enum edm_point which) {
    if (point_armed_is(which))
        point_reached(which);
}

// True: the caller is to fail. A bit of `page` is turned over where that is what the point does.
bool point_failed(enum edm_point which, uint8_t *page);

static inline bool point_fails(enum edm_point which, uint8_t *page) {
    return point_armed_is(which) && point_failed(which, page);
}
