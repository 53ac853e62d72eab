// What happens at an armed fault point.
#include "point.h"

#include <errno.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "edm_abi.h"

#define HOLD_MS 30000
#define DELAY_MS 200

_Atomic int point_armed;
static int action;
static _Atomic int after;
static char flag[256];

static const struct edm_point_text texts[] = {
    {0},
#define EDM_POINT(name, what, fails, damaged) {#name, what, fails, damaged},
#include "points.h"
#undef EDM_POINT
};

const struct edm_point_text *edm_point_text(int number) {
    return number > 0 && number < POINT_COUNT ? &texts[number] : NULL;
}

static bool can(const struct edm_point_text *t, int what) {
    return what == EDM_POINT_FAIL ? t->fails != NULL : what != EDM_POINT_CORRUPT || t->damaged;
}

int edm_point_arm(const char *name, int what, int times, const char *flag_file) {
    if (what < EDM_POINT_KILL || what > EDM_POINT_CORRUPT || strlen(flag_file) >= sizeof flag)
        return -EINVAL;
    for (int i = 1; i < POINT_COUNT; i++)
        if (!strcmp(texts[i].name, name)) {
            if (!can(&texts[i], what))
                return -EINVAL;
            strcpy(flag, flag_file);
            action = what;
            atomic_store(&after, times);
            atomic_store_explicit(&point_armed, i, memory_order_release);
            return i;
        }
    return -ENOENT;
}

static void sleep_ms(int ms) {
    struct timespec t = {ms / 1000, (long)(ms % 1000) * 1000000};
    nanosleep(&t, NULL);
}

int point_reached(enum edm_point which) {
    // Of threads that are here together, one takes it.
    if (atomic_fetch_sub(&after, 1) != 0)
        return 0;
    atomic_store(&point_armed, POINT_NONE);
    (void)which;
    struct stat found;
    // Gone, or put back empty by a test: whoever has the same point in Python has acted. Whoever is started in our
    // place goes past it.
    if (stat(flag, &found) || !found.st_size || unlink(flag))
        return 0;
    switch (action) {
    case EDM_POINT_KILL:
        kill(getpid(), SIGKILL);
        return 0;
    case EDM_POINT_DELAY:
        sleep_ms(DELAY_MS);
        return 0;
    case EDM_POINT_HOLD:
        // The test has seen the file go, does what it wants to, and puts it back.
        for (int i = 0; i < HOLD_MS / 5 && access(flag, F_OK); i++)
            sleep_ms(5);
        return 0;
    default:
        return action;
    }
}

bool point_failed(enum edm_point which, uint8_t *page) {
    int does = point_reached(which);
    if (does == EDM_POINT_CORRUPT)
        page[0] ^= 1;
    return does == EDM_POINT_FAIL;
}
