// What outlives a DM-Handler of the pages that the DMS has, against a model that is too simple to be wrong; its table
// grows, shrinks, and is found by another engine.
#include "check.h"

#define REGIONS 6
#define PAGES 20000

static bool model[REGIONS][PAGES];
static uint64_t seed = 7;

static uint64_t below(uint64_t n) { return next_random(&seed) % n; }

static void agree(struct edm_engine *g) {
    for (uint64_t r = 0; r < REGIONS; r++)
        for (uint64_t p = 0; p < PAGES; p++)
            if (acknowledged_has(g, r + 1, p) != model[r][p])
                FAIL("page %" PRIu64 " of region %" PRIu64 " is %s", p, r, model[r][p] ? "forgotten" : "there");
}

static void note(struct edm_engine *g, int kind, uint64_t region, uint64_t a, uint64_t b, uint64_t c) {
    acknowledged_note(g, &(struct outbox_item){.kind = (uint8_t)kind, .region = region + 1, .a = a, .b = b, .c = c});
}

static void change(struct edm_engine *g) {
    uint64_t r = below(REGIONS), what = below(100), n = 1 + below(below(4) ? 100 : PAGES / 2);
    if (what < 80) {
        uint64_t p = below(PAGES - n + 1), step = 1 + below(3) * 40;
        for (uint64_t end = p + n; p < end; p += step) {
            note(g, EDM_OUT_EVICT, r, p, 0, 0);
            model[r][p] = true;
        }
    } else if (what < 88) {
        uint64_t p = below(PAGES - n + 1);
        note(g, EDM_OUT_DROP, r, p, n, 0);
        memset(model[r] + p, 0, n);
    } else if (what < 96) {
        uint64_t from = below(PAGES / 2 - n + 1), to = PAGES / 2 + below(PAGES / 2 - n + 1);
        if (below(2)) {
            uint64_t t = from;
            from = to;
            to = t;
        }
        note(g, EDM_OUT_MOVE, r, from, to, n);
        memcpy(model[r] + to, model[r] + from, n);
        memset(model[r] + from, 0, n);
    } else {
        uint64_t into = (r + 1 + below(REGIONS - 1)) % REGIONS;
        note(g, EDM_OUT_DROP_REGION, into, 0, 0, 0);
        note(g, EDM_OUT_CLONE, into, r + 1, 0, 0);
        memcpy(model[into], model[r], PAGES);
    }
}

int main(void) {
    struct edm_engine_config config = {.local_pages = 16, .write_back_pages = 64};
    struct edm_engine *g = edm_engine_new(&config);
    uint32_t most = 0, rebuilt = 0;
    CHECK(g);
    watch(g, 60);
    for (int k = 0; k < 4000; k++) {
        uint32_t power = g->state->known_power;
        change(g);
        rebuilt += g->state->known_power != power;
        most = g->state->known_power > most ? g->state->known_power : most;
        if (k % 100 == 0)
            agree(g);
    }
    uint64_t used = g->known_used;
    acknowledged_again(g);
    CHECK(g->known_used == used);
    agree(g);
    CHECK(rebuilt > 1 && most > 10);
    for (uint64_t r = 0; r < REGIONS; r++)
        note(g, EDM_OUT_DROP_REGION, r, 0, 0, 0);
    memset(model, 0, sizeof model);
    agree(g);
    edm_engine_free(g);
    return 0;
}
