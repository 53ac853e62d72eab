// What outlives a DM-Handler: a shared segment that the holder keeps, from which the next one goes on (adopt.c). It has
// only what cannot be had from the kernel or the DMS: which programs there are, the outbox with its pages, numbers that
// must not be given twice, and what was under way. The LSPT is not in it.
//
// A DM-Handler may be killed between any two instructions, so whatever belongs together becomes valid with one store:
// `committed`. Outbox items with a later sequence have not been, nor has what goes with them.
#pragma once
#include <linux/userfaultfd.h>
#include <stdbool.h>
#include <stdint.h>

#include "sidecar.h"

#define STATE_MAGIC 0x31545345u /* EST1 */
#define STATE_SPACES 65536
#define STATE_EVENTS 256
#define STATE_LATE 64
#define STATE_ITEMS (1u << 22)
#define STATE_KNOWN_MOST 24  // the largest table of acknowledged.c has so many bits of entries
#define EVENT_AT 65536u
#define NOT_YET ((1ull << 48) - 1)  // a sequence that is never committed

struct state_space {
    uint32_t used;
    int32_t pid;              // 0: a forked child that has not faulted yet
    int32_t uffd[2], ctl[2];  // descriptors, by the head's `turn`
    uint64_t region, anchor;
    uint64_t born;           // the outbox sequence it is valid from
    uint32_t forked, apart;  // apart: as in struct space
    // Pages moving to staging: since sequence `moved_from`, unless that is past.
    uint32_t moving, windows;
    uint64_t moved_from;
    struct state_window {
        uint64_t base, clean;
    } window[EDM_WINDOWS];
    // Messages read. Those before number `event_mark % EVENT_AT` have been applied; that one too, if `committed` is
    // past `event_mark / EVENT_AT`.
    uint64_t event_mark;
    struct uffd_msg event[STATE_EVENTS];
    // Remaps read before what made room for them (order.c), and sources of remaps whose unmap has not been read yet.
    struct uffd_msg late[STATE_LATE];
    uint64_t late_mark;  // as event_mark, of the one being applied: that has been, if `committed` is past it
    struct state_source {
        uint64_t a, n;
    } source[STATE_LATE];
};

struct state_head {
    uint32_t magic, version;
    uint32_t turn;  // which of each pair of descriptors is the living DM-Handler's
    int32_t holder[2], segment[2], listen[2], dev[2];
    uint32_t instance, next_region;
    uint32_t slots, spaces, items;  // in use or used before, of the tables below
    uint64_t committed;             // outbox sequence
    uint64_t page_version;
    uint32_t known_power;  // the table of acknowledged.c in use has 2^known_power entries
};

// 64 pages of a region: bit n, the DMS has page group * 64 + n.
struct state_known {
    uint64_t region, group, bits;
};

struct edm_engine;
struct space;
int state_create(struct edm_engine *g, uint32_t slots);
void state_close(struct edm_engine *g);
// All outbox items so far are valid, and what goes with them.
void state_commit(struct edm_engine *g);
void state_settle(struct edm_engine *g);  // taking over, before anything is committed
struct state_space *state_space_new(struct edm_engine *g);
void state_space_gone(struct edm_engine *g, struct space *s);

#define STATE_BARRIER() __atomic_signal_fence(__ATOMIC_SEQ_CST)
