// The engine end to end over replay: threads that read, write, unmap, remap and fork under budgets of a few pages, with
// a slow, refusing and lying memory server behind it. Every read is checked.
#include "toy_dms.h"

#define BLOCK 96         // pages a thread owns
#define SHARED_PAGES 16  // pages that all threads read and write
#define MAX_THREADS 6

struct scenario {
    const char *name;
    uint32_t threads, workers, budget, buffer, ops;
    bool track, ask, structural, fork, pins, in_c;
    uint32_t refuse, error, corrupt, fetch_us, evict_us;
};

static const struct scenario scenarios[] = {
    {.name = "budget of 2", .threads = 3, .workers = 2, .budget = 2, .buffer = 8, .ops = 1500, .track = true},
    {.name = "budget of 8", .threads = 4, .workers = 2, .budget = 8, .buffer = 16, .ops = 2000, .track = true},
    {.name = "buffer of 1", .threads = 4, .workers = 2, .budget = 16, .buffer = 1, .ops = 1500, .track = true},
    {.name = "no tracking", .threads = 4, .workers = 2, .budget = 32, .buffer = 64, .ops = 3000},
    {.name = "asking", .threads = 4, .workers = 2, .budget = 24, .buffer = 16, .ops = 1500, .ask = true, .track = true},
    {.name = "no budget", .threads = 4, .workers = 2, .buffer = 16, .ops = 2000, .track = true, .structural = true},
    {.name = "called through a table",
     .threads = 4,
     .workers = 2,
     .budget = 32,
     .buffer = 24,
     .ops = 2000,
     .track = true,
     .structural = true,
     .refuse = 50,
     .in_c = true},
    {.name = "slow server",
     .threads = 6,
     .workers = 3,
     .budget = 48,
     .buffer = 32,
     .ops = 400,
     .track = true,
     .fetch_us = 200,
     .evict_us = 2000},
    {.name = "refusing and lying server",
     .threads = 4,
     .workers = 2,
     .budget = 32,
     .buffer = 24,
     .ops = 1500,
     .track = true,
     .refuse = 200,
     .error = 10,
     .corrupt = 10},
    {.name = "pinned pages",
     .threads = 4,
     .workers = 2,
     .budget = 24,
     .buffer = 24,
     .ops = 1500,
     .track = true,
     .pins = true},
    {.name = "address-space changes",
     .threads = 4,
     .workers = 2,
     .budget = 40,
     .buffer = 24,
     .ops = 2000,
     .track = true,
     .structural = true},
    {.name = "address-space changes, slow server",
     .threads = 4,
     .workers = 3,
     .budget = 24,
     .buffer = 16,
     .ops = 300,
     .track = true,
     .structural = true,
     .refuse = 100,
     .fetch_us = 300,
     .evict_us = 1000},
    {.name = "address-space changes, asking",
     .threads = 4,
     .workers = 2,
     .budget = 24,
     .buffer = 16,
     .ops = 1000,
     .track = true,
     .ask = true,
     .structural = true},
    {.name = "forks", .threads = 4, .workers = 2, .budget = 64, .buffer = 48, .ops = 750, .track = true, .fork = true},
    {.name = "everything",
     .threads = 5,
     .workers = 3,
     .budget = 48,
     .buffer = 32,
     .ops = 450,
     .track = true,
     .structural = true,
     .fork = true,
     .pins = true,
     .refuse = 100,
     .error = 5,
     .corrupt = 5,
     .fetch_us = 100,
     .evict_us = 500},
    {.name = "everything, asking",
     .threads = 5,
     .workers = 3,
     .budget = 16,
     .buffer = 32,
     .ops = 900,
     .track = true,
     .ask = true,
     .structural = true,
     .fork = true,
     .pins = true,
     .refuse = 100,
     .fetch_us = 100,
     .evict_us = 500},
};

struct run {
    const struct scenario *sc;
    struct edm_replay *program;
    _Atomic uint64_t begun[SHARED_PAGES], settled[SHARED_PAGES];
    pthread_mutex_t shared[SHARED_PAGES];
    uint64_t pages;
};

// A thread of the program and what its pages must hold. A forked child has one thread, on a copy of the block.
struct player {
    struct run *run;
    struct edm_replay *program;
    uint32_t number, ops;
    bool child;
    uint64_t random, written, first;
    uint64_t model[BLOCK];
};

static void must(int result, const char *what, uint64_t page) {
    if (result)
        FAIL("%s of page %" PRIu64 ": %s", what, page, strerror(-result));
}

static uint64_t value_of(const struct player *p, uint64_t page, uint64_t version) {
    return page << 48 | (uint64_t)p->number << 40 | version;
}

static void check_own(struct player *p, uint64_t i) {
    uint64_t got = 0;
    must(edm_replay_touch(p->program, p->first + i, 0, 0, &got), "read", p->first + i);
    if (got != p->model[i])
        FAIL("%s: page %" PRIu64 " of %s %u holds %#" PRIx64 ", not %#" PRIx64, p->run->sc->name, p->first + i,
             p->child ? "a child of thread" : "thread", p->number, got, p->model[i]);
}

static void write_own(struct player *p, uint64_t i) {
    // Now and then zero, which needs no storing.
    uint64_t value = next_random(&p->random) % 8 ? value_of(p, p->first + i, ++p->written) : 0;
    must(edm_replay_touch(p->program, p->first + i, 1, value, NULL), "write", p->first + i);
    p->model[i] = value;
}

// Writers take turns; readers do not, and must see something between the last settled and the last begun version.
static void touch_shared(struct player *p) {
    struct run *r = p->run;
    uint64_t i = next_random(&p->random) % SHARED_PAGES, page = r->pages - SHARED_PAGES + i;
    if (next_random(&p->random) % 3 == 0) {
        pthread_mutex_lock(&r->shared[i]);
        uint64_t version = atomic_fetch_add(&r->begun[i], 1) + 1;
        must(edm_replay_touch(p->program, page, 1, version, NULL), "write", page);
        atomic_store(&r->settled[i], version);
        pthread_mutex_unlock(&r->shared[i]);
        return;
    }
    uint64_t least = atomic_load(&r->settled[i]), got = 0;
    must(edm_replay_touch(p->program, page, 0, 0, &got), "read", page);
    uint64_t most = atomic_load(&r->begun[i]);
    if (got < least || got > most)
        FAIL("%s: shared page %" PRIu64 " holds %" PRIu64 ", not %" PRIu64 " to %" PRIu64, r->sc->name, page, got,
             least, most);
}

static void change(struct player *p) {
    uint64_t n = 1 + next_random(&p->random) % 20, a = next_random(&p->random) % (BLOCK - n), b = 0;
    int what = EDM_REPLAY_REMOVE + (int)(next_random(&p->random) % 3);
    if (what == EDM_REPLAY_REMAP) {
        n = n > BLOCK / 4 ? BLOCK / 4 : n;
        a = next_random(&p->random) % (BLOCK / 2 - n);
        b = BLOCK / 2 + next_random(&p->random) % (BLOCK / 2 - n);
        if (next_random(&p->random) % 2) {
            uint64_t t = a;
            a = b;
            b = t;
        }
        memcpy(p->model + b, p->model + a, n * sizeof *p->model);
    }
    memset(p->model + a, 0, n * sizeof *p->model);
    must(edm_replay_event(p->program, what, p->first + a, n, p->first + b), "an address-space change", p->first + a);
}

static void *play(void *player);

static pthread_t fork_player(struct player *p) {
    struct player *c = xcalloc(1, sizeof *c);
    *c = *p;
    c->child = true;
    c->ops = 60;
    must(edm_replay_fork(p->program, &c->program), "fork", 0);
    pthread_t t;
    CHECK(pthread_create(&t, NULL, play, c) == 0);
    return t;
}

static void pin(struct player *p, bool pinned) { CHECK(edm_replay_pin(p->program, p->first, 4, pinned) == 0); }

// The pages of the other threads, as they were at the fork: they hold still, and are what those wrote there once.
static void check_inherited(struct player *p) {
    for (uint64_t page = 0; page < p->run->pages - SHARED_PAGES; page += 7) {
        uint64_t got = 0, again = 0, owner = page / BLOCK;
        if (owner == p->number)
            continue;
        must(edm_replay_touch(p->program, page, 0, 0, &got), "read", page);
        must(edm_replay_touch(p->program, page, 0, 0, &again), "read", page);
        if (got != again || (got && (got >> 40 & 0xff) != owner))
            FAIL("%s: a child inherited %#" PRIx64 " in page %" PRIu64, p->run->sc->name, got, page);
    }
}

static void *play(void *player) {
    struct player *p = player;
    const struct scenario *sc = p->run->sc;
    pthread_t child = 0;
    for (uint32_t k = 0; k < p->ops; k++) {
        uint64_t what = next_random(&p->random) % 100, i = next_random(&p->random) % BLOCK;
        if (what < 20 && !p->child)
            touch_shared(p);
        else if (what < 60)
            check_own(p, i);
        else if (what == 60 && sc->structural)
            change(p);
        else if (what == 61 && sc->pins)
            pin(p, next_random(&p->random) % 2);
        else
            write_own(p, i);
        if (sc->fork && !p->child && k % 100 == 50) {
            if (child)
                pthread_join(child, NULL);
            child = fork_player(p);
        }
    }
    if (p->child)
        check_inherited(p);
    for (uint64_t i = 0; i < BLOCK; i++)
        check_own(p, i);
    if (child)
        pthread_join(child, NULL);
    if (p->child) {
        edm_replay_close(p->program);
        free(p);
    }
    return NULL;
}

static void check_counters(struct edm_engine *g, const struct scenario *sc) {
    struct edm_counters c;
    edm_engine_counters(g, &c);
    if (c.internal_errors)
        FAIL("%s: %s", sc->name, edm_engine_error(g));
    if (c.lost)
        FAIL("%s: %" PRIu64 " pages were lost", sc->name, c.lost);
    if (sc->budget && !c.evictions)
        FAIL("%s: nothing was evicted", sc->name);
    if (sc->budget && !sc->structural && !sc->fork && !c.over_limit && c.peak_resident > sc->budget)
        FAIL("%s: %" PRIu64 " pages were resident under a budget of %u", sc->name, c.peak_resident, sc->budget);
    printf("%-36s faults %6" PRIu64 " evicted %6" PRIu64 " fetched %6" PRIu64 " rescued %5" PRIu64 " peak %4" PRIu64
           " over %" PRIu64 " refused %" PRIu64 " stale %" PRIu64 " joined %" PRIu64 "\n",
           sc->name, c.faults, c.evictions, c.fetches, c.rescues, c.peak_resident, c.over_limit, c.write_failures,
           c.stale, c.joined);
}

static void play_scenario(const struct scenario *sc, uint64_t seed, uint32_t longer) {
    struct edm_engine_config config = {.local_pages = sc->budget,
                                       .write_back_pages = sc->buffer,
                                       .ahead_pages = 63,
                                       .track_writes = sc->track,
                                       .ask = sc->ask};
    struct edm_engine *g = edm_engine_new(&config);
    CHECK(g);
    watch(g, 100);
    struct run run = {.sc = sc, .pages = (uint64_t)sc->threads * BLOCK + SHARED_PAGES};
    struct toy_dms dms = {.pages = run.pages,
                          .refuse = sc->refuse,
                          .in_c = sc->in_c,
                          .error = sc->error,
                          .corrupt = sc->corrupt,
                          .fetch_us = sc->fetch_us,
                          .evict_us = sc->evict_us};
    for (int i = 0; i < SHARED_PAGES; i++)
        pthread_mutex_init(&run.shared[i], NULL);
    run.program = edm_replay_open(g, 1, run.pages);
    CHECK(run.program);
    toy_start(&dms, g, (int)sc->workers);
    pthread_t thread[MAX_THREADS];
    struct player *player = xcalloc(sc->threads, sizeof *player);
    for (uint32_t i = 0; i < sc->threads; i++) {
        player[i] = (struct player){.run = &run,
                                    .program = run.program,
                                    .number = i,
                                    .ops = sc->ops * longer,
                                    .random = seed + i,
                                    .first = (uint64_t)i * BLOCK};
        CHECK(pthread_create(&thread[i], NULL, play, &player[i]) == 0);
    }
    for (uint32_t i = 0; i < sc->threads; i++)
        pthread_join(thread[i], NULL);
    free(player);
    edm_replay_close(run.program);
    check_counters(g, sc);
    edm_engine_stop(g);
    toy_join(&dms);
    if (dms.n)
        FAIL("%s: %u regions are left at the memory server", sc->name, dms.n);
    edm_engine_free(g);
    toy_free(&dms);
    alarm(0);
}

// Arguments, each optional: seed, part of a scenario's name, how many times longer.
int main(int argc, char **argv) {
    setvbuf(stdout, NULL, _IOLBF, 0);
    uint64_t seed = argc > 1 ? strtoull(argv[1], NULL, 0) : 1;
    uint32_t longer = argc > 3 ? (uint32_t)atoi(argv[3]) : 1;
    for (size_t i = 0; i < sizeof scenarios / sizeof *scenarios; i++)
        if (argc < 3 || strstr(scenarios[i].name, argv[2]))
            play_scenario(&scenarios[i], seed, longer);
    return 0;
}
