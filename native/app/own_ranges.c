// Few and large. Where there are more, or this thread has been interrupted in here by a signal, nothing is said to be
// lacking. What was moved, or mapped over, or belongs to a userfaultfd that has been closed, is believed to be there
// still.
#include "own_ranges.h"

#define MOST 64
#define TURNS 1000
#define MOST_FILES 1024

struct part {
    uint64_t a, b;
    int fd;
};

static struct part part[MOST];  // in any order
static int parts;
static bool too_many;
static uint64_t registers[MOST_FILES / 64];  // bit n: file n
static bool busy;

static bool enter(void) {
    bool was = true;
    for (int i = 0; i < TURNS && was; i++)
        was = __atomic_exchange_n(&busy, true, __ATOMIC_ACQUIRE);
    return !was;
}

static void leave(void) { __atomic_store_n(&busy, false, __ATOMIC_RELEASE); }

static void put(uint64_t a, uint64_t b, int fd) {
    if (parts == MOST)
        too_many = true;
    else if (a < b)
        part[parts++] = (struct part){a, b, fd};
}

static void cut(uint64_t a, uint64_t b) {
    for (int i = 0; i < parts;) {
        struct part was = part[i];
        if (was.b <= a || b <= was.a) {
            i++;
            continue;
        }
        part[i] = part[--parts];
        put(was.a, a, was.fd);
        put(b, was.b, was.fd);
    }
}

void own_range_add(int fd, uint64_t a, uint64_t b) {
    if (fd < 0 || fd >= MOST_FILES || !enter()) {
        __atomic_store_n(&too_many, true, __ATOMIC_RELAXED);
        return;
    }
    registers[fd / 64] |= 1ull << fd % 64;
    for (int i = 0; i < parts;)
        if (part[i].fd != fd || part[i].b < a || b < part[i].a)
            i++;
        else {
            a = part[i].a < a ? part[i].a : a;
            b = part[i].b > b ? part[i].b : b;
            part[i] = part[--parts];
            i = 0;
        }
    put(a, b, fd);
    leave();
}

void own_range_new(int fd) {
    if (!own_range_file(fd) || !enter())
        return;
    for (int i = 0; i < parts;)
        if (part[i].fd == fd)
            part[i] = part[--parts];
        else
            i++;
    leave();
}

void own_range_del(uint64_t a, uint64_t b) {
    if (!__atomic_load_n(&parts, __ATOMIC_RELAXED) || !enter())
        return;
    cut(a, b);
    leave();
}

bool own_range_file(int fd) {
    return fd >= 0 && fd < MOST_FILES && __atomic_load_n(&registers[fd / 64], __ATOMIC_RELAXED) >> fd % 64 & 1;
}

bool own_range_lacks(uint64_t a, uint64_t b) {
    if (!enter())
        return false;
    bool has = too_many;
    for (int i = 0; i < parts && !has; i++)
        has = part[i].a <= a && b <= part[i].b;
    leave();
    return !has;
}
