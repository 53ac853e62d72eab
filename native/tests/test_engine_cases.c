// The engine over replay, one case at a time: what it must do when the memory server fails, the buffer is full, nothing
// can be evicted, calls fail, pages change their place while they are fetched, and at the end.
#include "toy_dms.h"

#define PAGES 256

static struct edm_engine *g;
static struct toy_dms dms;
static struct edm_replay *program;

static void begin_pages(struct edm_engine_config config, uint64_t pages) {
    g = edm_engine_new(&config);
    CHECK(g);
    watch(g, 20);
    dms = (struct toy_dms){.pages = pages};
    program = edm_replay_open(g, 1, pages);
    CHECK(program);
    toy_start(&dms, g, 2);
}

static void begin(struct edm_engine_config config) { begin_pages(config, PAGES); }

static void finish(void) {
    edm_replay_close(program);
    edm_engine_stop(g);
    toy_join(&dms);
    edm_engine_free(g);
    toy_free(&dms);
    alarm(0);
}

static struct edm_counters counters(void) {
    struct edm_counters c;
    edm_engine_counters(g, &c);
    return c;
}

static void write_page(uint64_t page, uint64_t value) { CHECK(edm_replay_touch(program, page, 1, value, NULL) == 0); }

static uint64_t read_page(uint64_t page) {
    uint64_t value = 0;
    int result = edm_replay_touch(program, page, 0, 0, &value);
    if (result)
        FAIL("read of page %" PRIu64 ": %s", page, strerror(-result));
    return value;
}

static void write_all(uint64_t n) {
    for (uint64_t i = 0; i < n; i++)
        write_page(i, i + 1);
}

#define WAIT_FOR(condition) \
    while (!(condition))    \
    usleep(500)

// One touch on a thread of its own.
struct toucher {
    pthread_t thread;
    uint64_t page, value;
    int write, result;
    _Atomic bool done;
};

static void *touch_thread(void *argument) {
    struct toucher *t = argument;
    t->result = edm_replay_touch(program, t->page, t->write, t->value, &t->value);
    atomic_store(&t->done, true);
    return NULL;
}

static void touch_apart(struct toucher *t, uint64_t page, int write, uint64_t value) {
    *t = (struct toucher){.page = page, .write = write, .value = value};
    CHECK(pthread_create(&t->thread, NULL, touch_thread, t) == 0);
}

static const struct edm_engine_config small = {.local_pages = 16, .write_back_pages = 64, .track_writes = true};

static void lost_page_is_poisoned(void) {
    begin(small);
    write_all(64);
    WAIT_FOR(counters().remote >= 32 && !counters().staged);
    dms.corrupt = 1000;
    uint64_t value = 0;
    CHECK(edm_replay_touch(program, 0, 0, 0, &value) == -EFAULT);
    CHECK(edm_replay_touch(program, 0, 1, 5, NULL) == -EFAULT);
    CHECK(counters().lost == 1 && strstr(edm_engine_error(g), "lost"));
    dms.corrupt = 0;
    CHECK(read_page(1) == 2);
    finish();
}

static void full_buffer_makes_faults_wait(void) {
    begin((struct edm_engine_config){.local_pages = 16, .write_back_pages = 8, .track_writes = true});
    dms.hold = true;
    write_all(16);
    struct toucher t[16];
    for (int i = 0; i < 16; i++)
        touch_apart(&t[i], 100 + (uint64_t)i, 1, 7);
    WAIT_FOR(counters().staged == 8 && counters().waited);
    usleep(20000);
    CHECK(counters().resident <= counters().limit_pages);
    CHECK(edm_replay_present(program) <= counters().limit_pages);
    dms.hold = false;
    for (int i = 0; i < 16; i++) {
        pthread_join(t[i].thread, NULL);
        CHECK(t[i].result == 0);
    }
    for (uint64_t i = 0; i < 16; i++)
        CHECK(read_page(i) == i + 1 && read_page(100 + i) == 7);
    CHECK(!counters().internal_errors && !counters().over_limit);
    finish();
}

static void staged_page_is_rescued_while_its_write_is_under_way(void) {
    begin(small);
    dms.hold = true;
    write_all(40);
    WAIT_FOR(dms.held_evictions);
    uint64_t before = counters().rescues;
    CHECK(read_page(0) == 1);
    write_page(0, 1000);
    CHECK(counters().rescues == before + 1 && !counters().fetches);
    dms.hold = false;
    for (uint64_t i = 1; i < 40; i++)
        CHECK(read_page(i) == i + 1);
    CHECK(read_page(0) == 1000);
    finish();
}

static void pinned_pages_let_faults_through(void) {
    begin(small);
    CHECK(edm_replay_pin(program, 0, 64, 1) == 0);
    write_all(64);  // all of them are in: nothing can be evicted
    CHECK(edm_replay_present(program) == 64);
    CHECK(counters().over_limit && counters().move_refused);
    CHECK(edm_replay_pin(program, 0, 64, 0) == 0);
    WAIT_FOR(counters().resident <= counters().high_pages);
    for (uint64_t i = 0; i < 64; i++)
        CHECK(read_page(i) == i + 1);
    finish();
}

static uint64_t milliseconds(void) { return now_ns() / 1000000; }

// A budget that what cannot leave has used up: there is a part of it for the others all the same, and those that
// refuse are asked less and less often.
static void pages_that_refuse_leave_room_for_others(void) {
    static const struct edm_engine_config config = {.local_pages = 256, .write_back_pages = 64, .track_writes = true};
    begin_pages(config, 1024);
    uint64_t limit = counters().limit_pages, part = limit / 8, began = milliseconds();
    CHECK(edm_replay_pin(program, 0, limit, 1) == 0);
    write_all(limit);
    uint64_t over = counters().over_limit, most = 0;
    for (uint64_t round = 0; round < 2 || milliseconds() - began < 500; round++) {
        for (uint64_t i = limit; i < 1024; i++)
            write_page(i, i + round);
        for (uint64_t i = limit; i < 1024; i++) {
            CHECK(read_page(i) == i + round);
            most = round && counters().resident > most ? counters().resident : most;
        }
    }
    CHECK(counters().over_limit > over && most > limit && most <= limit + part + 1);
    uint64_t lasted = milliseconds() - began, tries = 2;
    for (uint64_t rest = 20; lasted > rest; tries++) {
        lasted -= rest;
        rest = rest < 2560 ? 2 * rest : rest;
    }
    printf("%" PRIu64 " refused, %" PRIu64 " tries\n", counters().move_refused, tries);
    CHECK(counters().move_refused >= limit && counters().move_refused <= limit * tries);
    // Each of them is asked again, and leaves when it can.
    CHECK(edm_replay_pin(program, 0, limit, 0) == 0);
    for (uint64_t i = limit; edm_replay_present(program) > limit || counters().resident > counters().high_pages; i++)
        write_page(limit + i % (1024 - limit), 1);
    for (uint64_t i = 0; i < limit; i++)
        CHECK(read_page(i) == i + 1);
    CHECK(counters().resident <= limit);
    finish();
}

static void clean_page_is_dropped_without_a_write(void) {
    begin(small);
    write_all(64);
    uint64_t writes = 0, clean = 0;
    for (int round = 0; round < 5; round++) {
        if (round == 3) {
            writes = counters().writes;
            clean = counters().evicted_clean;
        }
        for (uint64_t i = 0; i < 64; i++)
            CHECK(read_page(i) == i + 1);
        WAIT_FOR(!counters().staged);  // or the next round would find pages in the buffer, and those are dirty again
    }
    CHECK(counters().evicted_clean - clean >= 64);
    CHECK(counters().writes - writes <= counters().limit_pages);  // pages that had never left
    // The first write to a clean page is noticed, and is not lost.
    uint64_t protects = counters().write_protects;
    for (uint64_t i = 0; i < 64; i++) {
        CHECK(read_page(i) == i + 1);
        write_page(i, i + 500);
    }
    CHECK(counters().write_protects > protects);
    for (uint64_t i = 0; i < 64; i++)
        CHECK(read_page(i) == i + 500);
    finish();
}

static void zero_page_is_not_stored(void) {
    begin(small);
    for (uint64_t i = 0; i < 64; i++)
        CHECK(read_page(i) == 0);
    WAIT_FOR(counters().evicted_zero >= 32);
    WAIT_FOR(!counters().staged);
    CHECK(!counters().writes);
    for (uint64_t i = 0; i < 64; i++)
        CHECK(read_page(i) == 0);
    // A page that was stored and is zero now is stored again.
    write_all(64);
    WAIT_FOR(counters().writes >= 32);
    for (uint64_t i = 0; i < 64; i++)
        write_page(i, 0);
    for (uint64_t i = 0; i < 64; i++)
        CHECK(read_page(i) == 0);
    finish();
}

static const struct edm_engine_config ahead = {
    .local_pages = 512, .write_back_pages = 64, .track_writes = true, .ahead_pages = 63};

static void stream_is_brought_ahead(void) {
    begin_pages(ahead, 2048);
    write_all(2048);
    // New pages of a stream are filled ahead of it.
    CHECK(counters().faults < 2048 / 2 && counters().zero_fills >= 2048);
    WAIT_FOR(!counters().staged);
    uint64_t faults = counters().faults, fetches = counters().fetches;
    for (uint64_t i = 0; i < 2048; i++)
        CHECK(read_page(i) == i + 1);
    CHECK(counters().fetches - fetches >= 1024 && counters().faults - faults < 2048 / 2);
    for (uint64_t i = 2048; i-- > 0;)
        CHECK(read_page(i) == i + 1);
    CHECK(counters().faults - faults < 2048);
    faults = counters().faults;
    for (uint64_t k = 0; k < 7; k++)  // every seventh page
        for (uint64_t i = k; i < 2048; i += 7)
            CHECK(read_page(i) == i + 1);
    CHECK(counters().faults - faults < 2048);
    CHECK(counters().ahead_useful * 2 > counters().ahead);
    CHECK(counters().peak_resident <= 512);
    finish();
}

static void failing_calls_lose_nothing(void) {
    begin(small);
    CHECK(edm_replay_fail(program, EDM_REPLAY_ZERO, 3, 5, EAGAIN) == 0);
    for (uint64_t i = 0; i < 64; i++)
        CHECK(read_page(i) == 0);
    CHECK(counters().again >= 5 && !counters().internal_errors);
    CHECK(edm_replay_fail(program, EDM_REPLAY_COPY, 3, 5, EAGAIN) == 0);  // a page that is written to at once
    write_all(64);
    CHECK(counters().again >= 10 && !counters().internal_errors);
    CHECK(edm_replay_fail(program, EDM_REPLAY_COPY, 2, 300, EAGAIN) == 0);
    for (uint64_t i = 0; i < 64; i++)
        CHECK(read_page(i) == i + 1);
    CHECK(!counters().internal_errors);
    CHECK(edm_replay_fail(program, EDM_REPLAY_UNPROTECT, 0, 3, EAGAIN) == 0);
    for (uint64_t i = 0; i < 64; i++) {
        read_page(i);
        write_page(i, i + 2);
    }
    CHECK(edm_replay_fail(program, EDM_REPLAY_COPY, 2, 4, ENOMEM) == 0);
    for (uint64_t i = 0; i < 64; i++)
        CHECK(read_page(i) == i + 2);
    CHECK(counters().internal_errors == 4 && strstr(edm_engine_error(g), "errno 12"));
    finish();
}

// Page 0 is at the memory server, and a thread waits for it.
static void fetch_under_way(struct toucher *t) {
    begin(small);
    write_all(64);
    WAIT_FOR(counters().remote >= 32 && !counters().staged);
    dms.hold_fetch = true;
    touch_apart(t, 0, 0, 0);
    WAIT_FOR(dms.held_fetches);
}

static void page_removed_while_fetched_reads_zeros(void) {
    struct toucher t;
    fetch_under_way(&t);
    CHECK(edm_replay_event(program, EDM_REPLAY_REMOVE, 0, 1, 0) == 0);
    dms.hold_fetch = false;
    pthread_join(t.thread, NULL);
    CHECK(t.result == 0 && t.value == 0);
    finish();
}

static void page_unmapped_while_fetched_reads_zeros(void) {
    struct toucher t;
    fetch_under_way(&t);
    CHECK(edm_replay_event(program, EDM_REPLAY_UNMAP, 0, 2, 0) == 0);
    dms.hold_fetch = false;
    pthread_join(t.thread, NULL);
    CHECK(t.result == 0 && t.value == 0);
    CHECK(read_page(1) == 0 && read_page(2) == 3);
    finish();
}

static void page_remapped_while_fetched_arrives_there(void) {
    struct toucher t;
    fetch_under_way(&t);
    CHECK(edm_replay_event(program, EDM_REPLAY_REMAP, 0, 1, 200) == 0);
    dms.hold_fetch = false;
    CHECK(read_page(200) == 1);
    pthread_join(t.thread, NULL);  // its page has gone elsewhere: it sees the fresh mapping
    CHECK(t.result == 0 && t.value == 0);
    CHECK(read_page(0) == 0 && read_page(1) == 2);
    finish();
}

// As after a takeover: of a page that is away the engine knows neither version nor checksum.
static void forget_versions(uint64_t pages) {
    pthread_mutex_lock(&g->mu);
    struct space *s = g->space[0];
    s->asks = true;
    for (uint64_t page = 0; page < pages; page++) {
        struct lspt_entry *e = lspt_entry(&s->lspt, page);
        if (e->state == PS_REMOTE) {
            memset(e, 0, sizeof *e);
            g->count.remote--;
        }
    }
    pthread_mutex_unlock(&g->mu);
}

static void page_that_was_stored_is_never_a_new_one(void) {
    uint64_t value = 0;
    begin(small);
    write_all(64);
    WAIT_FOR(counters().remote >= 32 && !counters().staged);
    forget_versions(64);
    pthread_mutex_lock(&dms.mu);
    toy_forget(&dms.region[0].page[0]);
    pthread_mutex_unlock(&dms.mu);
    CHECK(edm_replay_touch(program, 0, 0, 0, &value) == -EFAULT);
    CHECK(counters().lost == 1 && strstr(edm_engine_error(g), "the memory server has nothing of it"));
    CHECK(read_page(1) == 2 && read_page(200) == 0);
    CHECK(edm_replay_event(program, EDM_REPLAY_REMOVE, 0, 2, 0) == 0);
    CHECK(read_page(1) == 0);
    finish();
}

// The memory server renames it before it looks, and has nothing at the old name any more; it says so before it says
// that it has.
static void page_remapped_while_asked_for_is_never_a_new_one(void) {
    struct toucher t;
    begin(small);
    write_all(64);
    WAIT_FOR(counters().remote >= 32 && !counters().staged);
    forget_versions(64);
    dms.hold_fetch = true;
    touch_apart(&t, 0, 0, 0);
    WAIT_FOR(dms.held_fetches);
    dms.hold_moved = true;
    CHECK(edm_replay_event(program, EDM_REPLAY_REMAP, 0, 1, 200) == 0);
    WAIT_FOR(dms.held_moved);
    dms.hold_fetch = false;
    usleep(20000);  // the answer comes first
    dms.hold_moved = false;
    CHECK(read_page(200) == 1);
    pthread_join(t.thread, NULL);
    CHECK(t.result == 0 && t.value == 0);
    finish();
}

static void child_has_the_page_its_parent_is_fetching(void) {
    struct toucher t;
    struct edm_replay *child;
    fetch_under_way(&t);
    CHECK(edm_replay_fork(program, &child) == 0);
    dms.hold_fetch = false;
    uint64_t value = 0;
    CHECK(edm_replay_touch(child, 0, 0, 0, &value) == 0 && value == 1);
    CHECK(edm_replay_touch(child, 0, 1, 99, NULL) == 0);
    pthread_join(t.thread, NULL);
    CHECK(t.result == 0 && t.value == 1 && read_page(0) == 1);
    edm_replay_close(program);  // the child outlives its parent
    CHECK(edm_replay_touch(child, 0, 0, 0, &value) == 0 && value == 99);
    for (uint64_t i = 1; i < 64; i++)
        CHECK(edm_replay_touch(child, i, 0, 0, &value) == 0 && value == i + 1);
    program = child;
    finish();
}

static const struct edm_engine_config asking = {
    .local_pages = 16, .write_back_pages = 64, .track_writes = true, .ask = true};

// The clone has brought the child what its parent had sent: forgetting it must drop it there.
static void child_drops_what_the_clone_brought(void) {
    struct edm_replay *child;
    uint64_t value = 1;
    begin(asking);
    dms.hold = true;
    write_all(40);
    WAIT_FOR(dms.held_evictions);
    CHECK(edm_replay_fork(program, &child) == 0);
    for (uint64_t i = 0; i < 40; i++)
        CHECK(edm_replay_event(child, EDM_REPLAY_REMOVE, i, 1, 0) == 0);
    dms.hold = false;
    for (uint64_t i = 0; i < 40; i++) {
        int result = edm_replay_touch(child, i, 0, 0, &value);
        if (result || value)
            FAIL("page %" PRIu64 " of the child holds %" PRIu64 " (%s)", i, value, strerror(-result));
        CHECK(read_page(i) == i + 1);
    }
    CHECK(!counters().lost);
    edm_replay_close(child);
    finish();
}

// A memory server that says it refused a page may have it all the same.
static void refused_page_is_dropped_all_the_same(void) {
    begin(asking);
    dms.keep_refused = true;
    dms.refuse = 1000;
    write_all(40);
    WAIT_FOR(counters().write_failures >= 64);
    for (uint64_t i = 0; i < 24; i++) {
        CHECK(read_page(i) == i + 1);  // rescued
        CHECK(edm_replay_event(program, EDM_REPLAY_REMOVE, i, 1, 0) == 0);
    }
    dms.refuse = 0;
    for (uint64_t i = 0; i < 40; i++)
        CHECK(read_page(i) == (i < 24 ? 0 : i + 1));
    CHECK(!counters().lost);
    finish();
}

static void program_that_ends_lets_its_threads_go(void) {
    struct toucher t;
    fetch_under_way(&t);
    pthread_mutex_lock(&g->mu);
    space_retire(g->space[0]);  // as the engine does when the process has died
    pthread_mutex_unlock(&g->mu);
    pthread_join(t.thread, NULL);
    CHECK(t.result == -ESRCH);
    dms.hold_fetch = false;
    WAIT_FOR(!toy_regions(&dms));  // its region is dropped
    CHECK(counters().resident == 0 && counters().spaces == 0 && counters().lspt_bytes == 0);
    finish();
}

static void stop_ends_all_waiting(void) {
    struct toucher t;
    fetch_under_way(&t);
    edm_engine_stop(g);
    pthread_join(t.thread, NULL);
    CHECK(t.result == -ESHUTDOWN);
    CHECK(edm_replay_event(program, EDM_REPLAY_UNMAP, 0, 2, 0) == -ESHUTDOWN);
    struct edm_replay *child;
    CHECK(edm_replay_fork(program, &child) == -ESHUTDOWN);
    dms.hold_fetch = false;
    toy_join(&dms);
    edm_engine_free(g);
    edm_replay_close(program);  // after the engine
    toy_free(&dms);
    alarm(0);
}

// The LPET is in the middle of a batch when the engine stops and the program ends.
static void stop_in_the_middle_of_an_eviction(void) {
    for (int round = 0; round < 50; round++) {
        begin((struct edm_engine_config){.local_pages = 200, .write_back_pages = 64, .track_writes = true});
        write_all(150);
        struct toucher t;
        touch_apart(&t, 160, 1, 1);
        for (uint64_t i = 150; i < 150 + 60 + (uint64_t)round % 40; i++)
            write_page(i % PAGES, 3);
        edm_engine_stop(g);
        pthread_join(t.thread, NULL);
        finish();
    }
}

static void asks_nothing_of_nobody(void) {
    struct edm_replay_op ops[] = {{EDM_REPLAY_WRITE, 0, 3, 33},
                                  {EDM_REPLAY_REMAP, 2, 3, 9},
                                  {EDM_REPLAY_READ, 0, 9, 0},
                                  {EDM_REPLAY_READ, 0, 3, 1},
                                  {EDM_REPLAY_REMAP, 4, 9, 10}};  // overlaps itself
    int error;
    begin(small);
    CHECK(edm_replay_run(program, ops, 5, &error) == 4 && error == EINVAL);
    CHECK(ops[2].value == 33 && ops[3].value == 0);
    CHECK(edm_replay_touch(program, PAGES, 0, 0, &ops[0].value) == -EFAULT);
    CHECK(edm_replay_event(program, EDM_REPLAY_REMOVE, PAGES - 1, 2, 0) == -EINVAL);
    CHECK(edm_replay_event(program, EDM_REPLAY_REMOVE, 1, 0, 0) == -EINVAL);
    CHECK(edm_replay_event(program, EDM_REPLAY_READ, 1, 1, 0) == -EINVAL);
    CHECK(edm_replay_pin(program, PAGES, 1, 1) == -EINVAL);
    CHECK(edm_replay_fail(program, EDM_REPLAY_CALLS, 0, 1, EAGAIN) == -EINVAL);
    CHECK(!edm_replay_open(g, 1, 0) && errno == EINVAL);
    CHECK(edm_poll(g, -1, 0) == -EINVAL && edm_poll(g, MAX_WORKERS, 0) == -EINVAL);
    CHECK(edm_resolve(g, 0, -1) == -EINVAL && edm_resolve(g, MAX_WORKERS, 0) == -EINVAL);
    finish();
}

int main(int argc, char **argv) {
    static const struct {
        const char *name;
        void (*run)(void);
    } cases[] = {
#define CASE(name) {#name, name}
        CASE(lost_page_is_poisoned),
        CASE(full_buffer_makes_faults_wait),
        CASE(staged_page_is_rescued_while_its_write_is_under_way),
        CASE(pinned_pages_let_faults_through),
        CASE(pages_that_refuse_leave_room_for_others),
        CASE(clean_page_is_dropped_without_a_write),
        CASE(zero_page_is_not_stored),
        CASE(stream_is_brought_ahead),
        CASE(failing_calls_lose_nothing),
        CASE(page_removed_while_fetched_reads_zeros),
        CASE(page_unmapped_while_fetched_reads_zeros),
        CASE(page_remapped_while_fetched_arrives_there),
        CASE(page_that_was_stored_is_never_a_new_one),
        CASE(page_remapped_while_asked_for_is_never_a_new_one),
        CASE(child_has_the_page_its_parent_is_fetching),
        CASE(child_drops_what_the_clone_brought),
        CASE(refused_page_is_dropped_all_the_same),
        CASE(program_that_ends_lets_its_threads_go),
        CASE(stop_ends_all_waiting),
        CASE(stop_in_the_middle_of_an_eviction),
        CASE(asks_nothing_of_nobody),
    };
    setvbuf(stdout, NULL, _IOLBF, 0);
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        if (argc > 1 && !strstr(cases[i].name, argv[1]))
            continue;
        printf("%s\n", cases[i].name);
        cases[i].run();
    }
    return 0;
}
