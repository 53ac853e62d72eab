// Address-space events of two threads in every order they may be read in: what belongs to one thread's pages must end
// where that thread has them, whichever event comes first. The kernel is a list of events and of what it has
// registered.
#include "check.h"

enum { A = 0x1000, B = 0x2000, C = 0x3000, D = 0x4000, N = 16 };  // places of N pages each

static struct edm_engine *g;
static struct space *s;
static struct uffd_msg queue[8];
static struct uffd_msg owed[8];  // by threads that wait for their first event to be read
static int queued, owing;
static bool changing_now;
static struct ranges kernel;  // registered
static int looks;

static int fake_read(struct space *x, struct uffd_msg *m, int max) {
    (void)x, (void)max;
    int n = queued;
    memcpy(m, queue, (size_t)n * sizeof *m);
    memcpy(queue, owed, (size_t)owing * sizeof *m);
    queued = owing;
    owing = 0;
    return n ? n : -EAGAIN;
}
static bool fake_changing(struct space *x) { return (void)x, changing_now || queued; }
static bool fake_mapped(struct space *x, uint64_t page) { return (void)x, ranges_has(&kernel, page); }
static int fake_wake(struct space *x, uint64_t page, uint64_t n) { return (void)x, (void)page, (void)n, 0; }
static void fake_retire(struct space *x) { (void)x; }

static bool fake_registered(struct space *x, uint64_t a, uint64_t b, struct ranges *out) {
    (void)x;
    looks++;
    for (uint64_t page = a; page < b && page < D + 2 * N; page++)
        if (ranges_has(&kernel, page))
            ranges_add(out, page, page + 1);
    return true;
}

static const struct source_ops fake = {.read = fake_read,
                                       .wake = fake_wake,
                                       .mapped = fake_mapped,
                                       .registered = fake_registered,
                                       .changing = fake_changing,
                                       .retire = fake_retire};

static void remap_comes(uint64_t from, uint64_t to) {
    struct uffd_msg *m = &queue[queued++];
    *m = (struct uffd_msg){.event = UFFD_EVENT_REMAP};
    m->arg.remap.from = from << PAGE_SHIFT;
    m->arg.remap.to = to << PAGE_SHIFT;
    m->arg.remap.len = (uint64_t)N << PAGE_SHIFT;
}

static struct uffd_msg unmap_of(uint64_t a) {
    struct uffd_msg m = {.event = UFFD_EVENT_UNMAP};
    m.arg.remove.start = a << PAGE_SHIFT;
    m.arg.remove.end = (a + N) << PAGE_SHIFT;
    return m;
}

static void unmap_comes(uint64_t a) { queue[queued++] = unmap_of(a); }
static void unmap_is_owed(uint64_t a) { owed[owing++] = unmap_of(a); }

static void events_are_read(void) {
    pthread_mutex_lock(&g->mu);
    space_read(g, s, -1);
    pthread_mutex_unlock(&g->mu);
}

static void all_is_quiet(void) {
    changing_now = false;
    pthread_mutex_lock(&g->mu);
    order_settle(g, s);
    pthread_mutex_unlock(&g->mu);
    CHECK(!s->late && !s->unquiet && !s->doubtful.n);
}

// As a sweep that sees a mapping, perhaps while an event is unread.
static void sweep_finds(uint64_t a) {
    ranges_add(&kernel, a, a + N);
    ranges_add(&s->known, a, a + N);
    if (changing_now)
        ranges_add(&s->doubtful, a, a + N);
}

// Pages that were evicted: only the table knows them. Their version says which they are.
static void evicted_at(uint64_t a, uint64_t version) {
    for (uint64_t page = a; page < a + N; page++) {
        struct lspt_entry *e = lspt_entry_make(&s->lspt, s, page);
        e->state = PS_REMOTE;
        e->flags = PF_STORED;
        entry_set_version(e, version);
        g->count.remote++;
    }
}

static void must_be_at(uint64_t a, uint64_t version) {  // 0: nothing
    for (uint64_t page = a; page < a + N; page++) {
        struct lspt_entry *e = lspt_entry(&s->lspt, page);
        uint64_t is = e && e->state == PS_REMOTE ? entry_version(e) : 0;
        if (is != version)
            FAIL("page %#" PRIx64 " is of version %" PRIu64 ", not %" PRIu64, page, is, version);
    }
}

static void kernel_moves(uint64_t from, uint64_t to) {
    ranges_del(&kernel, from, from + N);
    ranges_add(&kernel, to, to + N);
}

static void begin(void) {
    struct edm_engine_config config = {0};
    g = edm_engine_new(&config);
    CHECK(g);
    watch(g, 60);
    pthread_mutex_lock(&g->mu);
    s = space_new(g, &fake);
    pthread_mutex_unlock(&g->mu);
    sweep_finds(A);
    sweep_finds(C);
    evicted_at(A, 1);
    evicted_at(C, 2);
    changing_now = true;
    looks = 0;
}

static void finish(void) {
    CHECK(!g->error[0]);
    pthread_mutex_lock(&g->mu);
    space_retire(s);
    pthread_mutex_unlock(&g->mu);
    ranges_free(&kernel);
    edm_engine_free(g);
}

static void one_thread_moves_and_nothing_else(void) {
    begin();
    kernel_moves(A, B);
    remap_comes(A, B);
    events_are_read();
    unmap_comes(A);
    events_are_read();
    must_be_at(A, 0);
    must_be_at(B, 1);
    all_is_quiet();
    must_be_at(B, 1);
    CHECK(!looks);  // the kernel is asked only where there is doubt
    finish();
}

// The second moves to where the first has just left; its event is read first.
static void second_remap_is_read_first(void) {
    begin();
    kernel_moves(A, B);
    kernel_moves(C, A);
    remap_comes(C, A);
    events_are_read();
    CHECK(order_waits(s, A));
    remap_comes(A, B);
    events_are_read();
    unmap_comes(C);
    unmap_comes(A);
    events_are_read();
    must_be_at(A, 2);
    must_be_at(B, 1);
    must_be_at(C, 0);
    all_is_quiet();
    must_be_at(A, 2);
    must_be_at(B, 1);
    finish();
}

static void owed_unmap_is_read_last(void) {
    begin();
    kernel_moves(A, B);
    remap_comes(A, B);
    events_are_read();
    kernel_moves(C, A);
    remap_comes(C, A);
    events_are_read();
    unmap_comes(C);
    events_are_read();
    unmap_comes(A);
    events_are_read();
    all_is_quiet();
    must_be_at(A, 2);
    must_be_at(B, 1);
    must_be_at(C, 0);
    finish();
}

// The second thread's own mapping was seen by a sweep before it moved pages there: its end comes as an event like the
// one that the first thread owes.
static void two_unmaps_of_one_place(bool owed_first) {
    begin();
    kernel_moves(A, B);
    remap_comes(A, B);
    events_are_read();
    sweep_finds(A);
    kernel_moves(C, A);
    unmap_comes(A);  // either
    events_are_read();
    if (owed_first) {
        unmap_comes(A);
        events_are_read();
    }
    remap_comes(C, A);
    events_are_read();
    unmap_comes(C);
    events_are_read();
    if (!owed_first) {
        unmap_comes(A);
        events_are_read();
    }
    must_be_at(A, 2);
    must_be_at(B, 1);
    must_be_at(C, 0);
    all_is_quiet();
    must_be_at(A, 2);
    must_be_at(B, 1);
    finish();
}

static void two_unmaps_the_owed_one_first(void) { two_unmaps_of_one_place(true); }
static void two_unmaps_the_owed_one_last(void) { two_unmaps_of_one_place(false); }

// The second moves its pages there and unmaps them at once, before the first owns up to its unmap; a third mapping
// there must read as zeros.
static void moved_there_and_unmapped_again(void) {
    begin();
    kernel_moves(A, B);
    remap_comes(A, B);
    events_are_read();
    kernel_moves(C, A);
    remap_comes(C, A);
    unmap_comes(C);
    events_are_read();
    must_be_at(A, 2);
    ranges_del(&kernel, A, A + N);
    unmap_comes(A);
    events_are_read();
    unmap_comes(A);
    events_are_read();
    all_is_quiet();
    must_be_at(A, 0);
    must_be_at(B, 1);
    finish();
}

// The remap that makes room is read after the one that needs it and after the unmap of what came there: when all has
// been read, what the kernel no longer has is forgotten.
static void unmapped_while_its_remap_waited(void) {
    begin();
    kernel_moves(A, B);
    kernel_moves(C, A);
    ranges_del(&kernel, A, A + N);
    remap_comes(C, A);
    events_are_read();
    unmap_comes(C);
    unmap_comes(A);
    events_are_read();
    remap_comes(A, B);
    events_are_read();
    unmap_comes(A);
    events_are_read();
    all_is_quiet();
    must_be_at(A, 0);
    must_be_at(B, 1);
    must_be_at(C, 0);
    finish();
}

// What makes room is an unmap.
static void second_remap_is_read_before_an_unmap(void) {
    begin();
    kernel_moves(C, A);
    remap_comes(C, A);
    events_are_read();
    unmap_comes(A);
    events_are_read();
    unmap_comes(C);
    events_are_read();
    all_is_quiet();
    must_be_at(A, 2);
    must_be_at(C, 0);
    finish();
}

// While no DM-Handler was there: the first thread waits in its remap, the second moves its pages to the place that is
// left. What is known is not known yet when another DM-Handler reads of it, and of the unmap that the first owes.
static void moved_there_while_nobody_served(void) {
    begin();
    ranges_free(&s->known);
    s->adopting = true;
    kernel_moves(A, B);
    kernel_moves(C, A);
    remap_comes(A, B);
    remap_comes(C, A);
    events_are_read();
    unmap_comes(A);
    unmap_comes(C);
    events_are_read();
    s->adopting = false;
    must_be_at(A, 2);
    must_be_at(B, 1);
    must_be_at(C, 0);
    finish();
}

// Another DM-Handler goes on with what is in the segment and what comes.
static void another_takes_over(void) {
    pthread_mutex_lock(&g->mu);
    ranges_free(&s->known);
    ranges_free(&s->doubtful);
    s->late = 0;
    changing_now = false;
    state_settle(g);
    s->adopting = true;
    events_again(g, s);
    s->adopting = false;
    CHECK(!s->late && !queued && !s->known.n);
    pthread_mutex_unlock(&g->mu);
}

static void both_have_moved(void) {
    must_be_at(A, 2);
    must_be_at(B, 1);
    must_be_at(C, 0);
    finish();
}

// The remap that needs the place is read before the one that leaves it, by a DM-Handler that takes over.
static void second_remap_is_read_first_by_another(void) {
    begin();
    kernel_moves(A, B);
    kernel_moves(C, A);
    remap_comes(C, A);
    remap_comes(A, B);
    unmap_is_owed(A);
    unmap_is_owed(C);
    another_takes_over();
    both_have_moved();
}

// One after the other, with the same events: nothing is left between.
static void moved_on_while_nobody_served(void) {
    begin();
    kernel_moves(C, D);
    kernel_moves(D, B);
    remap_comes(C, D);
    remap_comes(D, B);
    unmap_is_owed(C);
    unmap_is_owed(D);
    another_takes_over();
    must_be_at(A, 1);
    must_be_at(B, 2);
    must_be_at(C, 0);
    must_be_at(D, 0);
    finish();
}

static void moved_on_and_others_brought_there(void) {
    begin();
    kernel_moves(C, D);
    kernel_moves(D, B);
    kernel_moves(A, D);
    remap_comes(C, D);
    remap_comes(D, B);
    remap_comes(A, D);
    unmap_is_owed(C);
    unmap_is_owed(A);
    another_takes_over();
    must_be_at(A, 0);
    must_be_at(B, 2);
    must_be_at(C, 0);
    must_be_at(D, 1);
    finish();
}

static void second_remap_is_put_off(void) {
    begin();
    kernel_moves(A, B);
    kernel_moves(C, A);
    remap_comes(C, A);
    events_are_read();
    CHECK(s->late == 1);
}

static void first_is_read_by_another(void) {
    remap_comes(A, B);
    unmap_is_owed(C);
    unmap_is_owed(A);
    another_takes_over();
    both_have_moved();
}

// What was put off waits for its own event after a takeover too, not for any.
static void another_event_comes_first(void) {
    second_remap_is_put_off();
    unmap_comes(D);
    first_is_read_by_another();
}

// A DM-Handler is killed when it has put a remap off, and not noted that it has read it.
static void killed_while_a_remap_is_put_off(void) {
    second_remap_is_put_off();
    remap_comes(C, A);
    s->state->event[0] = queue[--queued];
    s->state->event_mark = g->seq * EVENT_AT;
    first_is_read_by_another();
}

// … or when what it had put off is in the table, and still among what is put off.
static void killed_while_it_catches_up(void) {
    second_remap_is_put_off();
    struct uffd_msg late = s->state->late[0];
    remap_comes(A, B);
    unmap_is_owed(C);
    unmap_is_owed(A);
    events_are_read();
    must_be_at(A, 2);
    s->state->late[0] = late;
    s->state->late_mark = (g->seq - 1) * EVENT_AT;
    another_takes_over();
    both_have_moved();
}

// What the next DM-Handler commits for another program says nothing of what was begun for this one.
static void committed_for_another_meanwhile(void) {
    begin();
    kernel_moves(A, B);
    remap_comes(A, B);
    s->state->event[0] = queue[--queued];
    s->state->event_mark = g->seq * EVENT_AT;
    s->state->moving = 1;
    s->state->moved_from = g->seq;
    state_settle(g);
    g->seq++;
    state_commit(g);
    another_takes_over();
    CHECK(s->state->moving);
    s->state->moving = 0;
    must_be_at(B, 1);
    finish();
}

// … and what was committed for this one has been done.
static void committed_and_not_noted(void) {
    begin();
    kernel_moves(A, B);
    remap_comes(A, B);
    events_are_read();
    must_be_at(B, 1);
    s->state->event[0] = (struct uffd_msg){.event = UFFD_EVENT_UNMAP};
    s->state->event[0].arg.remove.start = B << PAGE_SHIFT;
    s->state->event[0].arg.remove.end = (B + 1) << PAGE_SHIFT;
    s->state->event_mark = (g->seq - 1) * EVENT_AT;
    s->state->moving = 1;
    s->state->moved_from = g->seq - 1;
    another_takes_over();
    CHECK(!s->state->moving);
    must_be_at(B, 1);
    finish();
}

int main(void) {
    committed_for_another_meanwhile();
    committed_and_not_noted();
    one_thread_moves_and_nothing_else();
    second_remap_is_read_first();
    second_remap_is_read_before_an_unmap();
    owed_unmap_is_read_last();
    two_unmaps_the_owed_one_first();
    two_unmaps_the_owed_one_last();
    moved_there_and_unmapped_again();
    unmapped_while_its_remap_waited();
    moved_there_while_nobody_served();
    second_remap_is_read_first_by_another();
    moved_on_while_nobody_served();
    moved_on_and_others_brought_there();
    another_event_comes_first();
    killed_while_a_remap_is_put_off();
    killed_while_it_catches_up();
    return 0;
}
