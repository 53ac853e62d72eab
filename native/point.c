// What happens at an armed fault point.
#include "point.h"

#include <errno.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "edm_abi.h"

#define HOLD_MS 30000
#define DELAY_MS 200

int point_armed;
static int action;
static _Atomic int after;
static char flag[256];

static const char *const names[] = {
    "",
#define EDM_POINT(name) #name,
#include "points.h"
#undef EDM_POINT
};

const char *edm_point_name(int number) { return number > 0 && number < POINT_COUNT ? names[number] : NULL; }

int edm_point_arm(const char *name, int what, int times, const char *flag_file) {
    if (what < EDM_POINT_KILL || what > EDM_POINT_HOLD || strlen(flag_file) >= sizeof flag)
        return -EINVAL;
    for (int i = 1; i < POINT_COUNT; i++)
        if (!strcmp(names[i], name)) {
            strcpy(flag, flag_file);
            action = what;
            atomic_store(&after, times);
            point_armed = i;
            return i;
        }
    return -ENOENT;
}

static void sleep_ms(int ms) {
    struct timespec t = {ms / 1000, (long)(ms % 1000) * 1000000};
    nanosleep(&t, NULL);
}

bool point_reached(enum edm_point which) {
    if (atomic_fetch_sub(&after, 1) > 0)
        return false;
    point_armed = POINT_NONE;
    (void)which;
    unlink(flag);  // whoever is started in our place goes past it
    switch (action) {
    case EDM_POINT_KILL:
        kill(getpid(), SIGKILL);
        return false;
    case EDM_POINT_DELAY:
        sleep_ms(DELAY_MS);
        return false;
    case EDM_POINT_HOLD:
        // The test has seen the file go, does what it wants to, and puts it back.
        for (int i = 0; i < HOLD_MS / 5 && access(flag, F_OK); i++)
            sleep_ms(5);
        return false;
    default:
        return true;
    }
}
