// Fault points: named places where a test stops, ends, delays or fails this process. Off, each costs one comparison.
#pragma once
#include <stdbool.h>

enum edm_point {
    POINT_NONE = 0,
#define EDM_POINT(name) POINT_##name,
#include "points.h"
#undef EDM_POINT
    POINT_COUNT
};

extern int point_armed;
// What the armed point does; true: the caller is to fail.
bool point_reached(enum edm_point which);

static inline bool point(enum edm_point which) {
    return __builtin_expect(point_armed == (int)which, 0) && point_reached(which);
}
