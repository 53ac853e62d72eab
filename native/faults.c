// What becomes of a fault: resolved here where the engine knows the answer (new page, rescue, first write), asked for
// where the DMS must tell [5], and installed when the answer is there [12-15].
#include "engine.h"

#include <errno.h>
#include <string.h>
#include <unistd.h>

#include "crc32c.h"

#define MAX_TRIES 4
#define STATUS_ERROR 2  // edm.types.GetStatus
#define STATUS_LOST 3

static bool room(struct edm_engine *g, const struct space *s, uint64_t page) {
    if (!g->limit || local_pages(g) < g->limit || space_whole(s) || ranges_has(&s->wanted, page))
        return true;
    bool let_in = local_pages(g) < local_most(g) + g->grace;
    g->count.over_limit += let_in;
    return let_in;
}

static void over_high(struct edm_engine *g) {
    if (g->high && local_pages(g) > g->high + refused_over(g))
        pthread_cond_signal(&g->lpet_wake);
}

static void remember_recent(struct edm_engine *g, struct space *s, uint64_t page) {
    g->recent[g->recent_at % RECENT_FAULTS].space = s;
    g->recent[g->recent_at % RECENT_FAULTS].page = page;
    g->recent_at++;
}

static void installed(struct edm_engine *g, struct space *s, uint64_t page, uint8_t flags) {
    struct leaf *l = lspt_leaf_make(&s->lspt, s, page);
    struct lspt_entry *e = &l->e[page % LEAF_PAGES];
    e->flags = flags;
    entry_arrived(s, l, e, page);
    remember_recent(g, s, page);
    traced(g, s, page, EDM_TRACE_LISTED, 0);
    over_high(g);
}

// A result that does not depend on which call gave it. True when the fault is settled.
static bool settle(struct edm_engine *g, struct fault f, int r, const char *call) {
    switch (r) {
    case -EAGAIN:  // an address-space event is on its way: the fault is looked at again after it
        g->count.again++;
        queue_fault(&g->retry, f);
        return true;
    case -ENOENT:  // nothing registered there any more: let the thread look again for itself
    case -EINVAL:
        traced(g, f.space, f.page, EDM_TRACE_LISTED, 0);
        f.space->ops->wake(f.space, f.page, 1);
        return true;
    case -ESRCH:  // the address space is gone; its pidfd or a sweep retires it
        return true;
    default:
        engine_error(g, "%s of page %#lx: errno %d", call, (unsigned long)f.page, -r);
        queue_push(&g->retry, f.space, f.page, f.flags);  // -ENOMEM and the like: the thread waits, nothing is lost
        return true;
    }
}

// A writer gets memory at once: of the kernel's page of zeros it would have to make a copy, in another fault.
static int fill_new(struct edm_engine *g, struct fault f) {
    if (f.flags & UFFD_PAGEFAULT_FLAG_WRITE)
        return f.space->ops->copy(f.space, f.page, 1, g->zeros, false);
    return f.space->ops->zero(f.space, f.page, 1);
}

static void take_new(struct edm_engine *g, struct fault f, bool believed_resident) {
    if (!believed_resident && !space_asks(f.space))
        ahead_fill(g, f);
    f.thread = 0;
    int r = point_fails(POINT_new_page, NULL) ? -ENOMEM : fill_new(g, f);
    point(POINT_new_page_filled);
    if (r == 1) {
        g->count.zero_fills++;
        traced(g, f.space, f.page, EDM_TRACE_DONE, EDM_TRACE_ZERO);
        installed(g, f.space, f.page, 0);
    } else if (r == -EEXIST) {
        // Two threads faulted on it, or it was touched before its mapping was captured. EEXIST wakes nobody.
        g->count.repeats++;
        traced(g, f.space, f.page, EDM_TRACE_DONE, EDM_TRACE_THERE);
        if (!believed_resident)
            installed(g, f.space, f.page, 0);
        f.space->ops->wake(f.space, f.page, 1);
        traced(g, f.space, f.page, EDM_TRACE_LISTED, 0);
    } else {
        settle(g, f, r, "zero-fill");
    }
}

static void take_protected(struct edm_engine *g, struct fault f, struct lspt_entry *e) {
    int r = f.space->ops->unprotect(f.space, f.page);
    if (r == 0) {
        point(POINT_unprotected);
        g->count.write_protects++;
        f.space->protects_in_vain++;
        e->flags &= ~PF_CLEAN;
        traced(g, f.space, f.page, EDM_TRACE_DONE, EDM_TRACE_WRITABLE);
        traced(g, f.space, f.page, EDM_TRACE_LISTED, 0);
    } else {
        settle(g, f, r, "unprotect");
    }
}

bool staged_intact(struct edm_engine *g, const struct outbox_item *o) {
    return edm_crc32c(write_slot_data(g, o->slot), PAGE_SIZE_) == o->checksum;
}

// Not what left the program any more, and there is no other copy: SIGBUS there, never other bytes. False: not yet.
bool staged_lost(struct edm_engine *g, struct space *s, uint64_t page, struct lspt_entry *e) {
    struct outbox_item *o = outbox_item_at(g, e->where);
    uint32_t sum = edm_crc32c(write_slot_data(g, o->slot), PAGE_SIZE_);
    int r = s->ops->poison(s, page);
    if (r && r != -EEXIST)
        return false;
    g->count.lost++;
    s->lost++;
    engine_error(g, "page %#lx of region %#lx is lost: checksum %#x instead of %#x in the write-back buffer",
                 (unsigned long)page, (unsigned long)s->region, sum, o->checksum);
    outbox_cancel(g, e->where);
    e->state = PS_NEW;
    e->where = 0;
    return true;
}

static void take_staged(struct edm_engine *g, struct fault f, struct lspt_entry *e) {
    uint64_t id = e->where;
    struct outbox_item *o = outbox_item_at(g, id);
    uint8_t *data = write_slot_data(g, o->slot);
    bool fails = point_fails(POINT_rescue_begun, data);
    if (!staged_intact(g, o)) {
        if (!staged_lost(g, f.space, f.page, e))
            queue_fault(&g->retry, f);
        return;
    }
    o->rescuing = true;
    STATE_BARRIER();
    int r = fails ? -ENOMEM : f.space->ops->copy(f.space, f.page, 1, data, false);
    point(POINT_rescue_copied);
    if (r != 1)
        o->rescuing = false;
    if (r == 1) {
        uint8_t flags = (e->flags & PF_STORED) | (o->state == OB_SENT ? PF_STORED : 0);
        g->count.rescues++;
        traced(g, f.space, f.page, EDM_TRACE_DONE, EDM_TRACE_RESCUED);
        outbox_cancel(g, id);
        point(POINT_rescue_done);
        installed(g, f.space, f.page, flags);
    } else if (r == -EEXIST) {
        engine_error(g, "page %#lx is both in the program and in the buffer", (unsigned long)f.page);
        f.space->ops->wake(f.space, f.page, 1);
    } else {
        settle(g, f, r, "rescue");
    }
}

static int fetch_slot_get(struct edm_engine *g) {
    if (!g->free_fetch)
        return -1;
    uint32_t i = g->free_fetch - 1;
    g->free_fetch = g->fetch[i].next_free;
    return (int)i;
}

static void fetch_slot_put(struct edm_engine *g, uint32_t i) {
    space_unref(g->fetch[i].space);
    g->fetch[i] = (struct fetch_slot){.next_free = g->free_fetch};
    g->free_fetch = i + 1;
    g->inbound--;
}

void fetch_cancel(struct edm_engine *g, uint32_t slot) { g->fetch[slot].cancelled = true; }

#define PROTECTS_JUDGED 256
#define UNPROTECTED_SAMPLE 16  // where writes follow, one fault in so many protects all the same, to notice a change

// Whether what a fault brings is to be installed write-protected, so that it can be dropped while it stays clean.
static bool protect_wanted(struct edm_engine *g, struct space *s, uint32_t flags) {
    if (!g->cfg.track_writes || flags & UFFD_PAGEFAULT_FLAG_WRITE || space_merges(s))
        return false;
    if (s->writes_follow && ++s->unprotected % UNPROTECTED_SAMPLE)
        return false;
    if (++s->protects >= PROTECTS_JUDGED) {
        s->writes_follow = s->protects_in_vain * 2 > s->protects;
        s->protects = s->protects_in_vain = 0;
    }
    return true;
}

// Put a page into the worker's batch; false if there is no place.
bool fetch_ask(struct edm_engine *g, struct worker *w, struct space *s, uint64_t page, struct lspt_entry *e,
               uint32_t flags, bool protect) {
    int i = w && w->n < MAX_FETCH ? fetch_slot_get(g) : -1;
    if (i < 0)
        return false;
    struct fetch_slot *fs = &g->fetch[i];
    *fs = (struct fetch_slot){.space = s,
                              .page = page,
                              .version = entry_version(e),
                              .checksum = e->checksum,
                              .flags = flags,
                              .used = true,
                              .protect = protect};
    s->refs++;
    g->inbound++;
    if (e->state == PS_REMOTE)
        g->count.remote--;
    e->state = PS_FETCHING;
    e->where = (uint32_t)i;
    w->refs[w->n] = (struct edm_page_ref){
        .region = s->region, .index = page, .version = fs->version, .checksum = fs->checksum, .status = 2};
    w->slot[w->n++] = (uint32_t)i;
    traced(g, s, page, EDM_TRACE_ASKED, 0);
    return true;
}

// Ask the DMS: into this worker's batch, or to the next free worker where there is none, or no place.
static void take_remote(struct edm_engine *g, int worker, struct fault f, struct lspt_entry *e) {
    if (f.space->barrier > g->done_seq) {
        queue_fault(&g->retry, f);
        return;
    }
    struct worker *w = worker >= 0 ? &g->worker[worker] : NULL;
    if (!fetch_ask(g, w, f.space, f.page, e, f.flags, protect_wanted(g, f.space, f.flags))) {
        queue_fault(&g->ready, f);
        if (worker < 0)
            engine_kick(g);
        return;
    }
    if (!g->cfg.ask)
        ahead_fetch(g, w, f);
}

// mlockall(2) populates staging too, and whoever reads all of a program's memory comes by it. Never in the middle of a
// batch: what is there then has been moved there.
static void take_in_staging(struct edm_engine *g, struct fault f) {
    if (f.space->batch_busy) {
        queue_fault(&g->retry, f);
        return;
    }
    f.space->staging_touched = true;
    int r = f.space->ops->zero(f.space, f.page, 1);
    if (r == -EEXIST)
        f.space->ops->wake(f.space, f.page, 1);
    else if (r != 1)
        settle(g, f, r, "zero-fill in staging");
}

// Decide one fault. Called with the lock held, by fault workers and (worker -1) by the LPET when room has come.
void fault_take(struct edm_engine *g, int worker, struct fault f) {
    struct space *s = f.space;
    if (s->dead)
        return;
    if (f.page >= LSPT_MAX_PAGE) {
        s->ops->zero(s, f.page, 1);
        s->ops->wake(s, f.page, 1);
        return;
    }
    if (s->staging && f.page - (s->staging >> PAGE_SHIFT) < EDM_STAGING_PAGES) {
        take_in_staging(g, f);
        return;
    }
    if (ranges_has(&s->foreign, f.page)) {  // read or put off before that: nobody waits for us any more
        traced(g, s, f.page, EDM_TRACE_LISTED, 0);
        s->ops->wake(s, f.page, 1);
        return;
    }
    struct leaf *l = lspt_leaf(&s->lspt, f.page);
    struct lspt_entry *e = l ? &l->e[f.page % LEAF_PAGES] : NULL;
    enum page_state state = e ? (enum page_state)e->state : PS_NEW;
    if (l && l->moving && (state != PS_RESIDENT || !(f.flags & UFFD_PAGEFAULT_FLAG_WP))) {
        e->flags |= PF_WAITED | (f.flags & UFFD_PAGEFAULT_FLAG_WRITE ? PF_WRITER : 0);
        return;
    }
    if (order_waits(s, f.page)) {
        queue_fault(&g->retry, f);
        return;
    }
    if (state == PS_RESIDENT) {
        if (f.flags & UFFD_PAGEFAULT_FLAG_WP)
            take_protected(g, f, e);
        else
            take_new(g, f, true);
        return;
    }
    if (state == PS_FETCHING) {
        struct fetch_slot *fs = &g->fetch[e->where];
        fs->flags &= ~FAULT_AHEAD;
        if (f.flags & UFFD_PAGEFAULT_FLAG_WRITE) {
            fs->flags |= UFFD_PAGEFAULT_FLAG_WRITE;
            fs->protect = false;
        }
        return;
    }
    if (state_new(state) && space_asks(s) && f.flags & UFFD_PAGEFAULT_FLAG_WP) {
        // Of an adopted program, and a child it forked before the first sweep: there, write-protected by the one who
        // was before us, and not in the table yet. The sweep that finds it may have to wait for this very thread.
        int r = s->ops->unprotect(s, f.page);
        if (r)
            settle(g, f, r, "unprotect");
        return;
    }
    bool hint = f.flags & FAULT_AHEAD;
    if (hint && state_new(state))
        return;
    if (!room(g, s, f.page)) {
        if (hint)
            return;
        g->count.waited++;
        queue_fault(&g->waiting, f);
        pthread_cond_signal(&g->lpet_wake);
        return;
    }
    if (state == PS_STAGED) {
        take_staged(g, f, e);
    } else if (state == PS_REMOTE) {
        take_remote(g, worker, f, e);
    } else if (space_asks(s)) {
        take_remote(g, worker, f, lspt_entry_make(&s->lspt, s, f.page));
    } else {
        take_new(g, f, false);
    }
}

// Back to where it was before the request.
static void unfetch(struct edm_engine *g, struct lspt_entry *e, const struct fetch_slot *fs) {
    e->where = 0;
    e->state = fs->version ? PS_REMOTE : PS_NEW;
    if (fs->version)
        g->count.remote++;
}

static void say_lost(struct edm_engine *g, const struct fetch_slot *fs, const struct edm_page_ref *ref, uint32_t sum) {
    static const char *const why[] = {"the memory server has nothing of it", "what came is not what was evicted",
                                      "the memory server cannot read it"};
    if (ref->status == STATUS_LOST) {
        engine_error(g, "page %#lx of region %#lx is lost: the memory server did not answer in time",
                     (unsigned long)fs->page, (unsigned long)fs->space->region);
        return;
    }
    engine_error(g, "page %#lx of region %#lx is lost: %s (evicted: version %lu, CRC-32C %08x; came: %lu, %08x)",
                 (unsigned long)fs->page, (unsigned long)fs->space->region, why[ref->status < 3 ? ref->status : 2],
                 (unsigned long)fs->version, fs->version ? fs->checksum : ref->checksum, (unsigned long)ref->version,
                 sum);
}

static void fetched_wrong(struct edm_engine *g, struct fetch_slot *fs, struct lspt_entry *e,
                          const struct edm_page_ref *ref, const uint8_t *data) {
    struct space *s = fs->space;
    uint16_t status = ref->status;
    g->count.stale++;
    unfetch(g, e, fs);
    if (fs->flags & FAULT_AHEAD)
        return;  // whoever needs it will ask, and be told
    // An answer may be overtaken by a rename in the outbox: ask again, and give up on the page only when the DMS
    // keeps answering so. Then the page is lost: the program gets SIGBUS there, never other bytes.
    if (status != STATUS_LOST && (fs->flags / FAULT_TRY + 1 < MAX_TRIES || s->barrier > g->done_seq)) {
        queue_push(&g->retry, s, fs->page, fs->flags + FAULT_TRY);
        return;
    }
    g->count.lost++;
    traced(g, s, fs->page, EDM_TRACE_DONE, EDM_TRACE_LOST);
    traced(g, s, fs->page, EDM_TRACE_LISTED, 0);
    say_lost(g, fs, ref, status == 1 ? edm_crc32c(data, PAGE_SIZE_) : 0);
    int r = s->ops->poison(s, fs->page);
    s->lost += r == 0;
    if (r && r != -EEXIST)
        settle(g, (struct fault){s, fs->page, fs->flags, 0}, r, "poison");
}

// Copy one page, reading address-space events that stand in the way; 1, or a negative errno.
static int copy_through_events(struct edm_engine *g, struct fetch_slot *fs, const uint8_t *data, bool protect) {
    struct space *s = fs->space;
    for (int tries = 0;; tries++) {
        if (s->dead || fs->cancelled)
            return -ECANCELED;
        int r = s->ops->copy(s, fs->page, 1, data, protect);
        if (r != -EAGAIN || tries == 100)
            return r;
        g->count.again++;
        space_read(g, s, -1);
        pthread_mutex_unlock(&g->mu);
        usleep(20);
        pthread_mutex_lock(&g->mu);
    }
}

static void fetched(struct edm_engine *g, struct fetch_slot *fs, const struct edm_page_ref *ref, const uint8_t *data,
                    bool intact) {
    struct space *s = fs->space;
    // Of an adopted program's page only the DMS knows the version.
    bool known = ref->version == fs->version && ref->checksum == fs->checksum;
    bool existing = ref->status == 1 && intact && (known || (s->asks && !fs->version && ref->version));
    struct lspt_entry *e = lspt_entry(&s->lspt, fs->page);
    // A page that the DMS had has not become a new one; the answer for another name, before a remap, says nothing.
    bool new_page =
        !fs->version && ref->status == 0 && ref->index == fs->page && !acknowledged_has(g, s->region, fs->page);
    if (new_page && ranges_has(&s->wanted, fs->page)) {  // it stays missing; who waits there is woken with the rest
        unfetch(g, e, fs);
        ranges_add(&s->blank, fs->page, fs->page + 1);
        return;
    }
    if (new_page) {
        unfetch(g, e, fs);
        take_new(g, (struct fault){s, fs->page, fs->flags, 0}, false);
        return;
    }
    if (!existing) {
        fetched_wrong(g, fs, e, ref, data);
        return;
    }
    bool protect = fs->protect;
    int r = copy_through_events(g, fs, data, protect);
    if (r == -ECANCELED)
        return;
    e = lspt_entry(&s->lspt, fs->page);
    if (r == 1) {
        g->count.fetches++;
        traced(g, s, fs->page, EDM_TRACE_DONE, EDM_TRACE_FETCHED);
        e->where = 0;
        entry_set_version(e, ref->version);
        e->checksum = ref->checksum;
        installed(g, s, fs->page, PF_STORED | (protect ? PF_CLEAN : 0));
        return;
    }
    unfetch(g, e, fs);
    if (r == -EEXIST) {
        engine_error(g, "page %#lx is both in the program and at the memory server", (unsigned long)fs->page);
        s->ops->wake(s, fs->page, 1);
        return;
    }
    settle(g, (struct fault){s, fs->page, fs->flags, 0}, r, "copy");
}

static bool leaf_moving(const struct space *s, uint64_t page) {
    const struct leaf *l = lspt_leaf(&s->lspt, page);
    return l && l->moving;
}

// The answer is what was asked for, and nothing stands in the way of installing it.
static bool plain(struct edm_engine *g, const struct worker *w, uint32_t i, const bool *intact) {
    const struct fetch_slot *fs = &g->fetch[w->slot[i]];
    const struct edm_page_ref *ref = &w->refs[i];
    return !fs->cancelled && !fs->space->dead && !fs->space->applying && intact[i] && ref->status == 1 &&
           ref->version == fs->version && ref->checksum == fs->checksum && !leaf_moving(fs->space, fs->page);
}

static uint32_t run_length(struct edm_engine *g, const struct worker *w, uint32_t i, const bool *intact) {
    if (!plain(g, w, i, intact))
        return 0;
    const struct fetch_slot *first = &g->fetch[w->slot[i]];
    uint32_t n = 1;
    for (; i + n < w->n; n++) {
        const struct fetch_slot *fs = &g->fetch[w->slot[i + n]];
        if (fs->space != first->space || fs->page != first->page + n || fs->protect != first->protect ||
            !plain(g, w, i + n, intact))
            break;
    }
    return n;
}

// Neighbours in one call; returns how many are there now. What is left is looked at page by page.
static uint32_t fetched_run(struct edm_engine *g, struct worker *w, uint32_t i, uint32_t n) {
    const struct fetch_slot *first = &g->fetch[w->slot[i]];
    struct space *s = first->space;
    int done = s->ops->copy(s, first->page, n, w->pages + (size_t)i * PAGE_SIZE_, first->protect);
    for (int k = 0; k < done; k++)
        traced(g, s, first->page + (uint64_t)k, EDM_TRACE_DONE, EDM_TRACE_FETCHED);
    for (int k = 0; k < done; k++) {
        uint64_t page = first->page + (uint64_t)k;
        struct leaf *l = lspt_leaf(&s->lspt, page);
        struct lspt_entry *e = &l->e[page % LEAF_PAGES];
        e->flags = PF_STORED | (first->protect ? PF_CLEAN : 0);
        entry_arrived(s, l, e, page);
        traced(g, s, page, EDM_TRACE_LISTED, 0);
    }
    if (done <= 0)
        return 0;
    g->count.fetches += (uint64_t)done;
    remember_recent(g, s, first->page);
    for (int k = 0; k < done; k++)
        fetch_slot_put(g, w->slot[i + (uint32_t)k]);
    over_high(g);
    return (uint32_t)done;
}

static void fetched_one(struct edm_engine *g, struct worker *w, uint32_t i, bool intact) {
    struct fetch_slot *fs = &g->fetch[w->slot[i]];
    struct space *s = fs->space;
    while (!s->dead && !atomic_load(&g->stop) && (s->applying || leaf_moving(s, fs->page)))
        pthread_cond_wait(&s->idle, &g->mu);  // a batch that moves waits for no fault worker
    if (!fs->cancelled && !s->dead)
        fetched(g, fs, &w->refs[i], w->pages + (size_t)i * PAGE_SIZE_, intact);
    if (fs->cancelled && !s->dead && !(fs->flags & FAULT_AHEAD))
        // The page went away while it was fetched; whoever waits there is answered by what is there now.
        queue_push(&g->ready, s, fs->page, fs->flags & ~UFFD_PAGEFAULT_FLAG_WP);
    fetch_slot_put(g, w->slot[i]);
}

int edm_resolve(struct edm_engine *g, int worker, int n) {
    if (worker < 0 || worker >= MAX_WORKERS || n < 0 || (uint32_t)n != g->worker[worker].n)
        return -EINVAL;
    struct worker *w = &g->worker[worker];
    bool intact[MAX_FETCH];
    if (point_fails(POINT_fetch_answered, w->pages))
        w->refs[0].status = STATUS_ERROR;
    for (int i = 0; i < n; i++)
        intact[i] =
            w->refs[i].status != 1 || edm_crc32c(w->pages + (size_t)i * PAGE_SIZE_, PAGE_SIZE_) == w->refs[i].checksum;
    pthread_mutex_lock(&g->mu);
    for (int i = 0; i < n; i++)
        traced(g, g->fetch[w->slot[i]].space, g->fetch[w->slot[i]].page, EDM_TRACE_ANSWERED, 0);
    for (uint32_t i = 0; i < (uint32_t)n;) {
        uint32_t run = run_length(g, w, i, intact);
        uint32_t done = run > 1 ? fetched_run(g, w, i, run) : 0;
        if (!done)
            fetched_one(g, w, i, intact[i]);
        i += done ? done : 1;
        point(POINT_fetch_copied);
    }
    w->n = 0;
    pthread_mutex_unlock(&g->mu);
    return 0;
}
