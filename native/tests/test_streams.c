// What is brought ahead of streams of faults, by touches of a program whose pages are all away but for what is brought.
#include "../streams.h"
#include "check.h"

#define PAGES (1u << 20)

static uint64_t seed = 7;
static struct streams t;
static bool here[PAGES];

// Returns whether it was a fault.
static bool touch(uint32_t thread, uint64_t page) {
    if (here[page])
        return false;
    here[page] = true;
    struct stream *s = stream_fault(&t, thread, page);
    uint32_t n = 0;
    for (uint64_t at = page; s->stride && n < s->window && (at += (uint64_t)s->stride) < PAGES; n++)
        here[at] = true;
    if (n)
        stream_brought(s, n, page + (uint64_t)s->stride * n);
    return true;
}

// Faults that as many visits of blocks here and there take, each from its first page to its last.
static uint32_t visit_blocks(uint32_t visits, uint32_t pages) {
    uint32_t faults = 0;
    for (uint32_t i = 0; i < visits; i++) {
        uint64_t at = next_random(&seed) % (PAGES - pages);
        for (uint32_t k = 0; k < pages; k++)
            faults += touch(i % 4, at + k);
        memset(here, 0, sizeof here);
    }
    return faults;
}

static uint32_t scan(uint64_t from, uint32_t pages) {
    uint32_t faults = 0;
    for (uint32_t k = 0; k < pages; k++)
        faults += touch(9, from + k);
    return faults;
}

int main(void) {
    // Blocks that end where the stream was to go on: what is brought in vain is noticed.
    visit_blocks(1000, 6);
    uint64_t brought = t.total_brought, useful = t.total_useful;
    CHECK(useful < brought);
    uint32_t faults = visit_blocks(1000, 6);
    brought = t.total_brought - brought;
    useful = t.total_useful - useful;
    printf("blocks of 6: %u faults a thousand, brought %" PRIu64 ", of use %" PRIu64 "\n", faults, brought, useful);
    CHECK(useful * 2 >= brought && faults <= 3500);
    // Pages that nobody has a second of are brought to nobody.
    brought = t.total_brought;
    CHECK(visit_blocks(1000, 1) == 1000 && t.total_brought - brought <= 16 * STREAM_MOST);
    // A long stream has the full window again.
    memset(here, 0, sizeof here);
    scan(0, 100000);
    CHECK(scan(100000, 64000) <= 64000 / STREAM_MOST + 1);
    return 0;
}
