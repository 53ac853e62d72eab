// The replayed program and the part of a kernel that userfaultfd plays for it, all in this process. replay.c is the
// kernel's side (`struct source_ops`), replay_program.c the program's (touches, address-space changes, fork).
#pragma once
#include "engine.h"

enum page_bits {
    RP_PRESENT = 1,
    RP_PROTECTED = 2,   // userfaultfd's write protection
    RP_REGISTERED = 4,  // faults here are reported; else the page is zero-filled by itself
    RP_PINNED = 8,
    RP_SHARED = 16,  // with a forked process, until written to
    RP_POISONED = 32,
};

// A thread that waits for its page, or a system call that waits until its event has been read. Lives on the stack of
// whoever waits.
struct waiter {
    struct waiter *next;
    struct uffd_msg msg;
    bool read, woken;
    pthread_cond_t wake;
};

struct edm_replay {
    struct edm_engine *engine;
    struct space *space;  // NULL before its fork event was applied, and after it was retired
    pthread_mutex_t mu;   // taken after the engine's, never before it
    _Atomic int refs;     // the caller's handle, and the space
    uint64_t pages, present;
    uint8_t *arena, *bits;
    uint8_t *staging;                // where pages move to
    struct waiter *faults, *events;  // oldest first
    uint32_t changing;               // address-space changes under way: mmap_changing in fs/userfaultfd.c
    int readable;                    // eventfd
    bool attached, gone;
    pthread_cond_t attach;
    struct edm_replay *newborn;  // children whose fork event has not been applied, linked by `newborn`
    struct {
        uint32_t after, count;
        int error;
    } fail[EDM_REPLAY_CALLS];
};

struct edm_replay *replay_new(struct edm_engine *g, uint64_t pages);
void replay_unref(struct edm_replay *r);
// Make the reader's file descriptor say whether there is something unread.
void replay_signal(struct edm_replay *r);
// Append w and wait until `woken` (a fault) or `read` (an event). 0, -ESHUTDOWN or -ESRCH. r's lock is held.
int replay_wait(struct edm_replay *r, struct waiter **list, struct waiter *w, bool event);
void replay_append(struct edm_replay *r, struct waiter **list, struct waiter *w);
void replay_drop(struct edm_replay *r, uint64_t a, uint64_t n, bool unmap);
