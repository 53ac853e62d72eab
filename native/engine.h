// The fault engine's own declarations; what Python sees of it is in edm_abi.h.
//
// One mutex, `engine.mu`, guards every table here. It is held across the short ioctls that resolve a fault, so that
// state and page never disagree, and released while pages move out (see reclaim.c) and while a DMS is asked.
#pragma once
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <linux/userfaultfd.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "edm_abi.h"
#include "edm_ops.h"
#include "point.h"
#include "sidecar.h"
#include "state.h"
#include "streams.h"

#define PAGE_SHIFT 12
#define PAGE_SIZE_ 4096ul
#define LEAF_PAGES 64
#define MAX_WORKERS 16
#define MAX_FETCH 64
#define RECENT_FAULTS 8
#define MAX_SEATS 4

// ---- LSPT -----------------------------------------------------------------------------------------------------

enum page_state {
    PS_NEW = EDM_PAGE_NEW,  // nothing stored anywhere: resolve with zeros
    PS_RESIDENT,            // in the app; `where` is its frame number, 0 if not known
    PS_FETCHING,            // asked from the DMS; `where` is the fetch slot
    PS_EVICTING,            // being moved to staging by the LPET
    PS_STAGED,              // only copy in the write-back buffer; `where` is the outbox item
    PS_REMOTE,              // acknowledged by the DMS; version and checksum say what must come back
    PS_ZERO,                // as PS_NEW, but the program had touched it: it was zeros when it left
};
static inline bool state_new(enum page_state state) { return state == PS_NEW || state == PS_ZERO; }

enum page_flag {
    PF_CLEAN = 1,   // resident, write-protected, and the DMS holds exactly this version
    PF_STORED = 2,  // the DMS may hold something under this page's id
    PF_WAITED = 4,  // a thread faulted on it while its leaf was being evicted
    PF_WRITER = 8,  // … to write to it
    PF_AHEAD = 16,  // filled with zeros before anybody asked for it, and perhaps not touched since
};

// 15 bytes a page, and 16 with its share of the leaf.
struct __attribute__((packed)) lspt_entry {
    uint8_t state : 3, flags : 5;
    uint32_t where, checksum, version_low;
    uint16_t version_high;
};
_Static_assert(sizeof(struct lspt_entry) == 15, "the LSPT costs 16 bytes a page");

static inline uint64_t entry_version(const struct lspt_entry *e) {
    return (uint64_t)e->version_high << 32 | e->version_low;
}
static inline void entry_set_version(struct lspt_entry *e, uint64_t v) {
    e->version_low = (uint32_t)v;
    e->version_high = (uint16_t)(v >> 32);
}
// What does not fit is not known: 32 bits are 16 TiB of frames.
static inline uint32_t entry_pfn(uint64_t pfn) { return pfn >> 32 ? 0 : (uint32_t)pfn; }

struct space;

// 64 neighbouring pages (256 KiB): the unit of memory in the LSPT and of the LPET's order.
struct leaf {
    struct space *space;
    struct leaf *older, *newer;  // the LPET's queue: see policy.c
    uint64_t base;               // page number of entry 0
    uint64_t resident;           // bitmap of PS_RESIDENT entries
    uint64_t refused;            // bitmap: the kernel would not move these when last asked; see refused.c
    uint32_t left_at;            // the engine's `evicted` when a page of it left last; 0: none has
    uint16_t refused_at;         // milliseconds, when all of those had been asked for last
    uint16_t refusals : 3;       // how often in a row they were
    uint16_t retry : 6;          // before this page they have been asked for again
    uint16_t queue : 4;
    bool listed : 1;
    bool moving : 1;  // pages of it are moving out: none may be installed meanwhile
    struct lspt_entry e[LEAF_PAGES];
};
_Static_assert(sizeof(struct leaf) + sizeof(struct leaf *) <= 16 * LEAF_PAGES, "the LSPT costs 16 bytes a page");

#define RADIX_BITS 10
#define RADIX_SIZE (1 << RADIX_BITS)
struct radix2 {
    struct leaf *leaf[RADIX_SIZE];
    uint32_t used;
};
struct radix1 {
    struct radix2 *next[RADIX_SIZE];
    uint32_t used;
};
struct lspt {
    struct radix1 *root[RADIX_SIZE];
    uint64_t leaves;
};

// Page numbers below 2^35 (47-bit addresses) are in the table.
#define LSPT_MAX_PAGE (1ull << 35)
struct leaf *lspt_leaf(const struct lspt *t, uint64_t page);
struct leaf *lspt_leaf_make(struct lspt *t, struct space *s, uint64_t page);
struct lspt_entry *lspt_entry(const struct lspt *t, uint64_t page);
struct lspt_entry *lspt_entry_make(struct lspt *t, struct space *s, uint64_t page);
// First leaf that has pages at or after `page`; NULL at the end.
struct leaf *lspt_next(const struct lspt *t, uint64_t page);
void lspt_leaf_free(struct lspt *t, struct leaf *leaf);

// ---- address ranges -------------------------------------------------------------------------------------------

// Sorted, disjoint page ranges [a, b): what of a space is registered with its uffd.
struct ranges {
    struct range {
        uint64_t a, b;
    } *v;
    uint32_t n, cap;
};
void ranges_add(struct ranges *r, uint64_t a, uint64_t b);
void ranges_del(struct ranges *r, uint64_t a, uint64_t b);
bool ranges_has(const struct ranges *r, uint64_t page);
// First stretch of [*a, b) that is not in r: sets [*a, *e) and returns true, or false.
bool ranges_gap(const struct ranges *r, uint64_t *a, uint64_t b, uint64_t *e);
const struct range *ranges_at(const struct ranges *r, uint64_t page);  // NULL: in none
void ranges_append(struct ranges *r, uint64_t a, uint64_t b);          // behind all others; joined with none
bool ranges_touch(const struct ranges *r, uint64_t a, uint64_t b);
// Adds to `out` what of [a, b) is in r.
void ranges_within(const struct ranges *r, uint64_t a, uint64_t b, struct ranges *out);
void ranges_free(struct ranges *r);

// ---- where faults come from -----------------------------------------------------------------------------------

// Pages on their way out of one space. Window k lies in staging at page k * 64.
struct move_batch {
    uint32_t n;
    uint32_t generation;  // of the space's events when the batch was chosen
    struct move_window {
        struct leaf *leaf;
        uint64_t base;
        uint64_t mask;             // asked for
        uint64_t pass;             // not there when the batch was chosen: a move may reach across them
        uint64_t clean;            // of those asked for: need not be read, the DMS has them
        uint64_t moved;            // out: left the app, asked for or not
        uint64_t busy;             // out: the kernel refused (pinned, locked, shared)
        uint64_t waited, writers;  // faults met meanwhile
    } w[EDM_WINDOWS];
    uint32_t nread;          // pages that moved and must be read
    uint8_t **into;          // where each of them goes, in order of window and page
    uint32_t *slot, *check;  // its write-back slot and CRC-32C
};
static inline uint64_t move_to_read(const struct move_window *w) { return w->moved & ~w->clean; }

// Every call returns 0, or a negative errno that the caller decides on.
struct source_ops {
    int (*read)(struct space *s, struct uffd_msg *msgs, int max);  // number read; -EAGAIN: none
    // Pages in a row; how many were done, or a negative errno if none was.
    int (*zero)(struct space *s, uint64_t page, uint32_t count);
    int (*copy)(struct space *s, uint64_t page, uint32_t count, const void *data, bool protect);
    int (*unprotect)(struct space *s, uint64_t page);
    int (*wake)(struct space *s, uint64_t page, uint64_t count);
    int (*poison)(struct space *s, uint64_t page);
    int (*move_out)(struct space *s, struct move_batch *b);
    void (*read_out)(struct space *s, struct move_batch *b);  // what moved and is not clean, into b->into
    void (*drop_out)(struct space *s, uint32_t windows);      // empty staging; does not wait for it
    void (*settle)(struct space *s);                          // … but this does, without the engine's lock; or NULL
    uint64_t (*pfn)(struct space *s, uint64_t page);          // 0: may not be read; the call may be NULL
    int (*forked)(struct space *child, const struct uffd_msg *msg);
    bool (*gone)(struct space *s);
    // Where events of several threads may come in another order than what they tell of; all NULL elsewhere.
    bool (*mapped)(struct space *s, uint64_t page);
    // Adds to `out` what of [a, b) the kernel has registered now; false if that cannot be told. Slow.
    bool (*registered)(struct space *s, uint64_t a, uint64_t b, struct ranges *out);
    bool (*changing)(struct space *s);  // an event is unread, or its system call has not gone on
    void (*retire)(struct space *s);
};
extern const struct source_ops uffd_ops;

// ---- spaces: one captured address space each ------------------------------------------------------------------

struct space {
    struct edm_engine *engine;
    const struct source_ops *ops;
    uint64_t region;  // its name at the DMS
    struct space *parent;
    struct state_space *state;  // what outlives this process; NULL once it is dead
    uint32_t late;              // remaps that were put off, see order.c
    bool unquiet;               // there may be events that are unread, or owed
    bool unsure;                // since it was quiet last, an event was read that could have meant something else
    bool young;                 // forked since its parent was quiet last
    struct ranges at_fork;      // while it is: what its parent was known to have at the fork
    bool adopting;
    bool forked;     // its uffd came with a FORK event
    bool inherited;  // … when some of the parent's pages were away, or stored and perhaps the same as here
    bool unwatched;  // … and no worker is told of its faults yet
    bool asks;       // adopted: only the DMS knows what it has of the pages that are not there
    struct lspt lspt;
    struct ranges known;     // registered
    struct ranges doubtful;  // of those, registered while an event was unread
    struct ranges removed;   // had a REMOVE lately: pages there may predate it, see removed.c
    uint64_t removed_at_ns;
    struct suspect {
        int tid;
        uint64_t user_ticks;
    } *suspect;  // threads that may still be in the system call the last REMOVE came from
    uint32_t nsuspects;
    bool suspects_taken;
    struct ranges stack_tops;  // of thread stacks: never evicted, see sweep.c
    struct ranges exits;       // nor these, see exits.c
    struct ranges given;       // … pipes.c
    uint32_t given_seen;
    // For userfaultfds of the program's own, see foreign.c
    struct ranges wanted;    // asked for: nothing leaves from there, nor is it registered, until that is settled
    struct ranges foreign;   // another has it, or may have: no fault there is ours
    struct ranges blank;     // adopted: of what is wanted, what the DMS has nothing of
    struct range untouched;  // of what was filled ahead there, pages of zeros are to leave
    bool giving, own_uffd;
    bool lacks;      // pages went with the parent: it must not read what it would find there
    uint32_t apart;  // its PID namespace, if that is not ours; own: its number there, where it was not found here
    int own;
    uint32_t stacks_seen, stacks_told;
    bool making_whole;  // for a fork, see whole.c; asked for so often by then
    uint32_t whole_asked;
    uint64_t resident;
    uint64_t barrier;  // outbox sequence that must be done before a page of this space is fetched
    uint32_t refs;     // outbox items, fetch slots and waiting faults that point here
    bool dead;
    _Atomic bool ready;    // its sidecar can be asked; the LPET finds out that it has died without the lock
    bool batch_busy;       // the LPET is moving pages out of it
    bool dropping;         // staging is being emptied
    bool draining;         // the LPET waits for that; the control page stays mapped till then
    bool staging_touched;  // pages came there that no batch has moved: it must be emptied before the next
    bool applying;         // events have been read and not yet applied: nothing else may touch the table
    pthread_cond_t idle;   // batch_busy, draining or applying fell, or the space died
    // uffd
    int sidecar_cpu;         // where it was put; -1: nowhere in particular
    cpu_set_t sidecar_cpus;  // where it may run, before it was
    int uffd, ctl_fd, pid, pidfd, sidecar_pid, sidecar_fd, pagemap_fd, statm_fd, ksm_fd, mem_fd;
    uint32_t generation;  // address-space events read so far
    uint32_t request;     // sidecar requests so far
    struct edm_ctl *ctl;
    uint64_t staging, anchor;
    uint64_t vsz, changed_ns, swept_ns;
    uint64_t bare_ns;       // when its sidecar was first seen to have gone; 0: it has not
    uint64_t put_off;       // pages seen, and left unregistered for now
    struct ranges waiting;  // which, a range a mapping: see growth.c
    bool held_seen;         // adopted: what was registered before is known
    uint64_t lost;          // pages poisoned
    bool sweep_soon;
    struct streams streams;
    // madvise(2), see hints.c
    struct ranges random, sequential;
    struct range needed;   // what of WILLNEED has not been brought yet
    uint64_t needed_most;  // pages of it, at most
    uint32_t hints_seen;
    bool merges;  // KSM was seen to look at its pages, see merging.c
    // Of pages installed write-protected, how many were then written to: where most are, protecting them only costs.
    uint32_t protects, protects_in_vain, unprotected;
    bool writes_follow;
    // replay
    struct edm_replay *replay;
};

struct fault {
    struct space *space;
    uint64_t page;
    uint32_t flags;   // UFFD_PAGEFAULT_FLAG_*, FAULT_AHEAD, and from FAULT_TRY on how often it was fetched in vain
    uint32_t thread;  // that faulted; 0: not known, or its stream has been told already
};

#define FAULT_AHEAD 0x80u  // nobody has asked for it yet
#define FAULT_TRY 0x100u

struct fault_queue {
    struct fault *v;
    uint32_t head, n, cap;
};

// ---- outbox: what the DMS must be told, in order --------------------------------------------------------------

enum outbox_state { OB_FREE = 0, OB_QUEUED, OB_SENT, OB_CANCELLED_IN_FLIGHT };

// In the segment of state.h: `space`, `page` and `next` mean something only to the process that set them.
struct outbox_item {
    struct space *space;
    uint64_t seq, region, page, version;
    uint64_t a, b, c;  // structural requests: see edm_outbox in edm_abi.h
    uint32_t slot, checksum;
    uint32_t next;  // index + 1
    uint8_t kind, state;
    bool rescuing;  // its page is being copied back, or has been
};

struct write_slot {
    uint32_t refs, next_free;
};

struct fetch_slot {
    struct space *space;
    uint64_t page, version;
    uint32_t checksum, flags, next_free;
    bool used, cancelled, protect;
};

struct worker {
    const struct edm_channel_ops *channel;  // NULL: Python fetches
    struct edm_page_ref *refs;
    uint8_t *pages;
    uint32_t slot[MAX_FETCH];
    uint32_t n;
    uint64_t served_ns;       // when it last had something to do
    struct space *last;       // where it read last; it may be gone
    uint32_t yields;          // tries in a row of faults that were put off, without sleep
    uint32_t misses;          // reads there in a row that found nothing
    uint32_t in_a_row;        // reads there without a look at the others
    uint32_t faults;          // since the faulting thread's CPU was last looked at
    uint32_t patience;        // faults until it is looked at again
    uint64_t looked_ns;       // when it was
    int cpu, seen_cpu;        // where this worker is, and where it saw the program last; -1: anywhere
    uint32_t seen;            // how often in a row
    bool beside;              // the program was on this CPU when it was seen last
    uint32_t crowded, crowd;  // waits to come that do not spin; of the last time
    uint64_t turn_ns;         // when somebody else last took the offered CPU for a whole turn
    int stat_tid, stat_fd;    // the thread that was looked at last, and its /proc/TID/stat
};

struct edm_engine {
    pthread_mutex_t mu;
    struct edm_engine_config cfg;
    struct edm_counters count;
    struct state_head *state;  // with the outbox items and the write-back slots: see state.h
    struct state_space *state_space;
    struct state_known *known_pages;
    uint64_t known_used;  // entries of it
    int state_fd;
    uint32_t state_hint;  // no free entry of state_space is before it
    uint32_t turn;        // our half of the pairs of descriptors in the segment
    bool adopted;
    int former[2];  // pidfds of the holders it was adopted from; -1
    uint32_t instance;
    _Atomic int stop;
    int epoll, kick;
    char error[256];

    struct space **space;
    uint32_t nspaces, cap_spaces;

    // budget, in pages; see budget.c
    uint64_t resident, inbound, limit, high, low, batch_pages;
    uint64_t put_off;  // pages of the spaces that wait to be registered: see growth.c
    uint64_t grace;    // faults let through above the limit since nothing could be evicted
    uint64_t refused;  // resident pages that would not move when last asked

    struct leaf_queue {
        struct leaf *coldest, *hottest;
        uint64_t pages;
    } queue[EDM_POLICY_QUEUES];
    const struct edm_policy_ops *policy;
    struct edm_policy *own_policy;  // while no other was chosen
    uint32_t evicted;               // pages, so far
    uint64_t page_out;              // pages that a program wants evicted now
    int idle_fd;                    // the kernel's idle bits; -1
    uint32_t reclaim_round;
    struct {
        struct space *space;
        uint64_t page;
    } recent[RECENT_FAULTS];
    uint32_t recent_at;

    struct fault_queue waiting;  // resident is at the limit
    struct fault_queue retry;    // the kernel said EAGAIN, or a barrier is not yet passed
    struct fault_queue ready;    // for the fault workers, from other threads

    struct worker worker[MAX_WORKERS];
    struct fetch_slot *fetch;
    uint32_t nfetch, free_fetch;

    // write-back buffer
    uint8_t *slots;
    struct write_slot *slot;
    uint32_t nslots, free_slot, slots_used;
    uint32_t nslots_all, spare_slot;  // with those beyond the buffer; the next of these to look at
    bool slot_wanted;                 // the LPET waits for one
    struct outbox_item *item;
    uint32_t nitems, free_item;
    uint32_t head, tail, queued;
    uint64_t seq, done_seq;
    uint64_t first_queued_ns;
    bool outbox_urgent;
    const struct edm_channel_ops *out_channel;  // NULL: Python carries
    struct edm_page_ref *out_refs;
    uint8_t *out_pages;
    uint32_t out_item[EDM_OUTBOX_BATCH], out_n;

    pthread_cond_t lpet_wake, outbox_wake;
    pthread_t lpet, capture;
    bool lpet_running, capture_running;
    struct move_batch *batch;  // the LPET's
    uint8_t *zeros;            // MAX_FETCH pages, to fill new ones with
    _Atomic int home;          // CPU where the engine's threads are to run; -1: anywhere
    cpu_set_t cpus;            // where this process may run
    _Atomic uint64_t crowded_until, crowded_over, crowded_ns;  // others want all CPUs: until when, since when no more
    int lpet_cpu, out_cpu;
    struct seat {
        struct edm_engine *engine;
        pthread_t thread;
        int cpu;
        _Atomic int turn;  // a futex
        _Atomic bool asleep;
    } seat[MAX_SEATS];  // see idle.c
    uint32_t nseats, beside_thread, idle_row;
    uint64_t idle_last, beside_alone;
    _Atomic uint64_t idle_until;
    int latency_fd;            // of /dev/cpu_dma_latency, or -1
    bool awake, idle_refused;  // CPUs are kept from sleeping; that did not work
    int listen_fd, dev_fd, admit_below;
    bool no_forks, user_mode;   // the kernel tells us of no forks; of no faults of its own
    char sock[EDM_SOCK_BYTES];  // where it listens
    struct edm_trace *trace;    // NULL: faults are not recorded
    int handshakes;
    pthread_cond_t handshake_done;
};

// ---- engine.c
uint64_t now_ns(void);
void engine_error(struct edm_engine *g, const char *format, ...) __attribute__((format(printf, 2, 3)));
void engine_kick(struct edm_engine *g);
void queue_push(struct fault_queue *q, struct space *s, uint64_t page, uint32_t flags);
void queue_fault(struct fault_queue *q, struct fault f);
bool queue_pop(struct fault_queue *q, struct fault *out);
struct edm_engine *engine_alloc(const struct edm_engine_config *config);
int engine_make(struct edm_engine *g);
// `g`; or NULL with errno set, and `g` freed, if r is a negative errno.
struct edm_engine *engine_or_errno(struct edm_engine *g, int r);
int lpet_start(struct edm_engine *g);
void *xcalloc(size_t n, size_t size);
void *xrealloc(void *p, size_t size);

// ---- space.c
struct space *space_new(struct edm_engine *g, const struct source_ops *ops);
struct space *space_fork(struct space *parent);
void space_retire(struct space *s);
void space_unref(struct space *s);
void space_wait_idle(struct space *s);
void entry_resident(struct space *s, struct leaf *l, struct lspt_entry *e, uint64_t page);
// [14] … and it has just come: note its frame number as well.
void entry_arrived(struct space *s, struct leaf *l, struct lspt_entry *e, uint64_t page);
void entry_leave(struct leaf *l, struct lspt_entry *e);  // no longer resident, state set by the caller
// Forget pages [a, b): what is stored of them is dropped at the DMS.
void space_forget(struct space *s, uint64_t a, uint64_t b);
void space_drop_stored(struct space *s, uint64_t page, uint64_t count);
void space_move(struct space *s, uint64_t from, uint64_t to, uint64_t count);
// … without telling the DMS; whether it may hold any of them.
bool space_rename(struct space *s, uint64_t from, uint64_t to, uint64_t count);
// The space as the segment has it.
struct space *space_again(struct edm_engine *g, const struct source_ops *ops, struct state_space *state);
static inline uint64_t local_pages(const struct edm_engine *g);
static inline bool space_asks(const struct space *s);

// ---- events.c [3-5]
// Messages read.
int space_read(struct edm_engine *g, struct space *s, int worker);
void event_remap(struct edm_engine *g, struct space *s, const struct uffd_msg *m);
void event_remove(struct space *s, uint64_t a, uint64_t b);
void event_unmap(struct space *s, uint64_t a, uint64_t b);
// order.c
bool mappings_flagged(int pid, const char *flag, uint64_t a, uint64_t b, struct ranges *out);
bool order_put_off(struct space *s, const struct uffd_msg *m);
bool order_swapped(struct space *s, uint32_t at, uint32_t n);
void order_again(struct space *s);
bool order_has(const struct space *s, const struct uffd_msg *m);
bool order_put_off_removal(struct space *s, uint64_t a, uint64_t b, const struct uffd_msg *m);
bool order_waits(const struct space *s, uint64_t page);
void order_moved(struct space *s, uint64_t from, uint64_t n);
void order_unmap(struct space *s, uint64_t a, uint64_t b);
void order_catch_up(struct edm_engine *g, struct space *s, bool all);
void order_settle(struct edm_engine *g, struct space *s);
// Whether a message is an address-space event of the program's own: not the sidecar's drops of staging.
bool space_event(const struct space *s, const struct uffd_msg *m);
// The descriptor that came with a FORK event.
int event_uffd(const struct edm_engine *g, const struct uffd_msg *m);
void event_uffd_again(const struct edm_engine *g, struct uffd_msg *m, int fd);
// What another DM-Handler had read and not applied, and what is there to be read; faults are left to be raised again.
void events_again(struct edm_engine *g, struct space *s);
bool events_fork_left(const struct space *s);  // read, and not applied

// ---- faults.c [5, 12-15]
void fault_take(struct edm_engine *g, int worker, struct fault f);
bool staged_intact(struct edm_engine *g, const struct outbox_item *o);
bool staged_lost(struct edm_engine *g, struct space *s, uint64_t page, struct lspt_entry *e);
bool fetch_ask(struct edm_engine *g, struct worker *w, struct space *s, uint64_t page, struct lspt_entry *e,
               uint32_t flags, bool protect);
void fetch_cancel(struct edm_engine *g, uint32_t slot);
// The calling thread, or a sidecar, goes where the engine's threads are to be; `cpu` is where it was put.
void thread_home(struct edm_engine *g, int *cpu);
void sidecar_home(struct space *s);
bool cpus_crowded(const struct edm_engine *g);
void cpus_found_crowded(struct edm_engine *g);
void worker_follow(struct edm_engine *g, int worker, int tid);
void worker_forget_thread(struct worker *w);

// ---- idle.c
void idle_start(struct edm_engine *g);
void idle_stop(struct edm_engine *g);
void idle_fault(struct edm_engine *g, uint32_t thread);
void idle_rest(struct edm_engine *g);

// ---- whole.c: before a fork of which no event will tell
struct space *space_alive(struct edm_engine *g, int pid);
int space_make_whole(struct edm_engine *g, int pid);
// One round of bringing what of [a, b) is not in the program, `zeros` or not; true: all is there, or is lost. Else the
// lock was let go for a moment.
#define BRING_ROUND_US 500
struct bringing {
    uint32_t round, asked, still;
    uint64_t before;
};
bool space_bring(struct edm_engine *g, struct space *s, uint64_t a, uint64_t b, bool zeros, struct bringing *w);
void whole_look(struct edm_engine *g, struct space *s);
// The program is about to fork so: nothing may leave, whatever the budget. In the control page, for a DM-Handler that
// takes over must know as well.
static inline bool space_whole(const struct space *s);

// ---- namespaces.c: the PID namespace that a process is in, or its children will be in; 0: ours
#define APART_SOMEWHERE 1u  // not ours, and without a number as yet
uint32_t process_apart(int pid);
uint32_t children_apart(int pid);
// The number here of one that has `number` there, or of one that has it for the program `pid`; 0: there is none. It is
// looked for among the children of `parent` first.
int process_here(int parent, uint32_t apart, int number);
int number_here(int pid, int number);
// The process that a thread of that number is one of; `number` itself, where there is none.
int process_of_thread(int number);

// ---- foreign.c: memory for a userfaultfd of the program's own
void foreign_serve(struct edm_engine *g, int sock, int pid);
// For the LPET: whether pages are to leave that were filled ahead and never touched, and at most `most` of them.
bool foreign_waits(const struct edm_engine *g);
struct space *foreign_select(struct edm_engine *g, struct move_batch *b, uint64_t most);
// A sweep begins to try what is foreign anew.
void foreign_again(struct space *s);

// ---- ahead.c
void ahead_fetch(struct edm_engine *g, struct worker *w, struct fault f);
void ahead_fill(struct edm_engine *g, struct fault f);

// ---- trace.c
void trace_begin(struct edm_engine *g, const struct fault *f, uint32_t thread);
void trace_step(struct edm_engine *g, const struct space *s, uint64_t page, int step, int outcome);
void trace_forget(struct edm_engine *g, const struct space *s);
void trace_free(struct edm_engine *g);
static inline void traced(struct edm_engine *g, const struct space *s, uint64_t page, int step, int outcome) {
    if (__builtin_expect(g->trace != NULL, 0))
        trace_step(g, s, page, step, outcome);
}

// ---- writeback.c
int write_slot_get(struct edm_engine *g);
int write_slot_spare(struct edm_engine *g);
void write_slot_put(struct edm_engine *g, uint32_t slot);
uint8_t *write_slot_data(struct edm_engine *g, uint32_t slot);
uint32_t outbox_push(struct edm_engine *g, int kind, struct space *s);
struct outbox_item *outbox_item_at(struct edm_engine *g, uint64_t id);
void outbox_cancel(struct edm_engine *g, uint64_t id);
// Take the segment's outbox over; its items have no `space` yet.
void outbox_again(struct edm_engine *g);

// ---- acknowledged.c: what the DMS has; called for each outbox item that it has carried out, in their order
void acknowledged_note(struct edm_engine *g, const struct outbox_item *o);
bool acknowledged_has(const struct edm_engine *g, uint64_t region, uint64_t page);
void acknowledged_again(struct edm_engine *g);

// ---- moveout.c: one batch of the LPET
uint64_t batch_carry_out(struct edm_engine *g, struct space *s, struct move_batch *b);
struct move_batch *batch_new(void);
void batch_free(struct move_batch *b);
bool page_is_zero(const uint8_t *page);

// ---- refused.c: pages the kernel would not move
uint64_t refused_lately(const struct leaf *l);  // bitmap: not to be asked for yet
void refused_note(struct edm_engine *g, struct leaf *l, uint64_t mask);
void refused_forget(struct edm_engine *g, struct leaf *l, uint64_t bit);
uint64_t refused_over(const struct edm_engine *g);

// ---- reclaim.c (LPET)
void *lpet_thread(void *engine);
bool can_move_out(const struct space *s);
void batch_choose(struct move_batch *b, struct leaf *l, uint64_t mask, uint64_t pass);
void budget_set(struct edm_engine *g);

// ---- exits.c: what the kernel writes to when threads exit
void exits_look(struct space *s, struct ranges *out);
// What is not there is an error, not a fault: a fault would wait for us.
bool space_peek(const struct space *s, uint64_t at, void *into, size_t bytes);
void exits_forget(struct space *s, uint64_t a, uint64_t b);

// ---- pipes.c: what the program has given to pipes
void pipes_look(struct space *s);

// ---- hints.c: madvise(2) of the programs
uint32_t hints_given(const struct space *s);
// Follow those given before that number was read; swept: since then the space was looked at.
void hints_look(struct edm_engine *g, struct space *s, uint32_t given, bool swept);
void hints_forget(struct space *s, uint64_t a, uint64_t b);
void hints_fork(const struct space *parent, struct space *child);

// ---- merging.c: KSM; guards.c: guard pages of madvise(2)
void merging_look(struct space *s);
uint64_t merging_unprotect(struct leaf *l, uint64_t mask);
bool guards_hidden(void);
uint32_t guards_until(const struct space *s, uint64_t from, uint32_t n, bool backwards);

// ---- policy.c
// A page came into the leaf; `back`: it had been evicted.
void leaf_arrived(struct edm_engine *g, struct leaf *l, bool back);
void leaf_left(struct edm_engine *g, struct leaf *l);       // a page of it was evicted
bool leaf_may_leave(struct edm_engine *g, struct leaf *l);  // or it stands elsewhere now
void leaf_pass(struct edm_engine *g, struct leaf *l);       // to the hot end of its queue
void leaf_unlist(struct edm_engine *g, struct leaf *l);
void leaf_cold(struct edm_engine *g, struct leaf *l);  // the next to leave
enum edm_policy_idle leaf_idle(struct edm_engine *g, struct leaf *l);

// ---- uffd.c, sidecar.c
int uffd_open_api(struct edm_engine *g, int fd);
int uffd_access(bool *no_forks);
int uffd_register(struct space *s, uint64_t a, uint64_t b);
int uffd_unregister(struct space *s, uint64_t a, uint64_t b);
int uffd_unprotect(struct space *s, uint64_t a, uint64_t b);
int uffd_watch(struct space *s);
void sidecar_lock(struct space *s);
void sidecar_unlock(struct space *s);
int sidecar_move_out(struct space *s, struct move_batch *b);
void sidecar_read_out(struct space *s, struct move_batch *b);
void sidecar_drop_out(struct space *s, uint32_t windows);
void sidecar_settle(struct space *s);
bool sidecar_idle(const struct space *s);  // not while a batch is under way: it has done what it was asked for
void sidecar_end(struct space *s);
void sidecar_kill(struct space *s);  // which is seen in its pidfd, later
bool pidfd_dead(int pidfd);

// ---- removed.c: a REMOVE event has been read; and whether what it told of has happened
void removed_note(struct space *s, uint64_t a, uint64_t b);
bool removed_settled(struct space *s);
// Any REMOVE may have been read by another DM-Handler: nothing is joined before its threads have been looked at.
void removed_unknown(struct space *s);

// ---- adopt.c, state.c
void adopt_spaces(struct edm_engine *g);
int state_take_over(struct edm_engine *g, int fd);

// ---- capture.c: new programs; sweep.c: their mappings
void *capture_thread(void *engine);
int space_attach(struct space *s, struct edm_ctl *c, int ctl_fd, int pid);
void space_detach(struct space *s);
struct edm_ctl *ctl_map(int fd);
bool space_sweep(struct space *s);

// Memory of one mapping that is not registered; heap: it grows by brk(2); foreign: another uffd had it lately.
struct unregistered {
    struct stretch {
        uint64_t a, b;
        bool heap, foreign;
    } *v;
    uint32_t n, cap;
};
void growth_put_off(struct space *s, struct unregistered *u);  // leaves in `u` what is to be registered now
void space_prune_unmapped(struct space *s);
void holder_note(struct edm_engine *g);

// ---- asking.c: who reads a program's memory from outside; until it hangs up
void asking_serve(struct edm_engine *g, int sock, int asker, uint32_t user);

static inline bool space_whole(const struct space *s) {
    return s->ctl && __atomic_load_n(&s->ctl->forking, __ATOMIC_ACQUIRE);
}

static inline bool space_merges(const struct space *s) {
    return s->merges || (s->ctl && __atomic_load_n(&s->ctl->merges, __ATOMIC_ACQUIRE));
}

// The program has opened a userfaultfd of its own: pages it never touched must not be filled.
static inline bool space_own_uffd(const struct space *s) {
    return s->own_uffd || (s->ctl && __atomic_load_n(&s->ctl->own_uffd, __ATOMIC_ACQUIRE));
}

// What counts against the budget.
static inline uint64_t local_pages(const struct edm_engine *g) { return g->resident + g->inbound + g->put_off; }

// … and what may, with what cannot leave.
static inline uint64_t local_most(const struct edm_engine *g) { return g->limit ? g->limit + refused_over(g) : 0; }

static inline bool space_asks(const struct space *s) { return s->asks || s->engine->cfg.ask; }
