// The check of LMDB files, and of what stands before a large value, fed with what is damaged: a made-up file of a meta
// page pair, a table of tables and a table with a few rows. Under the sanitizers this shows what reads where it must
// not.
#include <fcntl.h>
#include <stdbool.h>

#include "check.h"

#define PAGE 4096u
#define VALUE_BYTES 4080u

static uint64_t seed = 7;

static uint64_t below(uint64_t n) { return next_random(&seed) % n; }

static uint8_t lmdb[8 * PAGE] __attribute__((aligned(8)));

static void put16(size_t at, uint64_t value) { memcpy(lmdb + at, &value, 2); }
static void put32(size_t at, uint64_t value) { memcpy(lmdb + at, &value, 4); }
static void put64(size_t at, uint64_t value) { memcpy(lmdb + at, &value, 8); }

static void tree(size_t at, uint64_t flags, uint64_t leaves, uint64_t entries, uint64_t root) {
    put16(at + 4, flags);
    put16(at + 6, leaves);  // its depth: a leaf, or nothing
    put64(at + 16, leaves);
    put64(at + 32, entries);
    put64(at + 40, root);
}

static void leaf(uint64_t page, unsigned rows) {
    put64(page * PAGE, page);
    put16(page * PAGE + 10, 2);
    put16(page * PAGE + 12, 16 + 2 * rows);
    put16(page * PAGE + 14, PAGE);
}

static size_t row(uint64_t page, unsigned i, uint64_t flags, const void *key, size_t key_bytes, size_t bytes) {
    size_t all = (8 + key_bytes + bytes + 1) & ~1ul, upper;
    uint16_t before;

    memcpy(&before, lmdb + page * PAGE + 14, 2);
    upper = before - all;
    put16(page * PAGE + 14, upper);
    put16(page * PAGE + 16 + 2 * i, upper);
    put16(page * PAGE + upper, bytes);
    put16(page * PAGE + upper + 4, flags);
    put16(page * PAGE + upper + 6, key_bytes);
    memcpy(lmdb + page * PAGE + upper + 8, key, key_bytes);
    return page * PAGE + upper + 8 + key_bytes;
}

// Pages 0 and 1: meta; 2: the table of tables; 3: three rows, of which the last is a large value, on page 6; 4: that
// page 5 is free.
static void make_lmdb(void) {
    memset(lmdb, 0, sizeof lmdb);
    for (unsigned i = 0; i < 2; i++) {
        size_t at = i * PAGE;
        put64(at, i);
        put16(at + 10, 8);
        put32(at + 16, 0xbeefc0deu);
        put32(at + 20, 1);
        tree(at + 40, 8, 1, 1, 4);
        put32(at + 40, PAGE);
        tree(at + 88, 0, 1, 1, 2);
        put64(at + 136, 6);
        put64(at + 144, 2 + i);
    }
    leaf(2, 1);
    size_t at = row(2, 0, 2, "heads", 5, 48);
    tree(at, 8, 1, 3, 3);
    put64(at + 24, 1);
    leaf(3, 3);
    for (uint64_t i = 0; i < 2; i++)
        put64(row(3, (unsigned)i, 0, &(uint64_t){i + 10}, 8, 100), i);
    at = row(3, 2, 1, &(uint64_t){12}, 8, 8);
    put64(at, 6);
    put16(at - 16, VALUE_BYTES);
    put64(6 * PAGE, 6);
    put16(6 * PAGE + 10, 4);
    put32(6 * PAGE + 12, 1);
    leaf(4, 1);
    at = row(4, 0, 0, &(uint64_t){2}, 8, 16);
    put64(at, 1);
    put64(at + 8, 5);
}

static unsigned lmdb_damage(int file) {
    struct edm_lmdb_report report;

    CHECK(pwrite(file, lmdb, sizeof lmdb, 0) == sizeof lmdb);
    CHECK(!edm_lmdb_check(file, 0, 1, &report));
    return report.bad_count + report.guards_damaged + report.older_meta_damaged;
}

static size_t unsound(const uint64_t *keys, size_t n) {
    return edm_lmdb_unsound("heads", keys, n, (uintptr_t)lmdb, sizeof lmdb);
}

static void large_values_are_looked_at(void) {
    static const uint64_t keys[] = {10, 3, 12, 11, UINT64_MAX};

    make_lmdb();
    CHECK(unsound(keys, 5) == 5);
    CHECK(edm_lmdb_unsound("tails", keys, 5, (uintptr_t)lmdb, sizeof lmdb) == 0);
    CHECK(edm_lmdb_unsound("heads", keys, 5, (uintptr_t)lmdb, PAGE) == 0);
    CHECK(edm_lmdb_unsound("heads", keys, 5, 0, 0) == 5);
    // Each bit of what stands before the value, but for the two bytes that mean nothing.
    for (unsigned bit = 0; bit < 16 * 8; bit++) {
        lmdb[6 * PAGE + bit / 8] ^= (uint8_t)(1u << bit % 8);
        CHECK(unsound(keys, 5) == (bit / 8 == 8 || bit / 8 == 9 ? 5 : 2));
        lmdb[6 * PAGE + bit / 8] ^= (uint8_t)(1u << bit % 8);
    }
    put64(144, 9);  // the other meta page is the newer one now, and says that there are fewer pages
    put64(136, 5);
    CHECK(unsound(keys, 5) == 2);
    // Anything at all in the trees: never more than an answer.
    for (unsigned round = 0; round < 20000; round++) {
        make_lmdb();
        for (uint64_t n = 1 + below(4); n; n--)
            lmdb[below(4) ? 2 * PAGE + below(2) * PAGE + (below(2) ? below(32) : PAGE - 1 - below(400))
                          : below(2) * PAGE + below(152)] = (uint8_t)next_random(&seed);
        CHECK(unsound(keys, 5) <= 5);
    }
}

static void damaged_lmdb_files_are_found(void) {
    char path[] = "/tmp/edm-lmdb-XXXXXX";
    int file = mkstemp(path);

    CHECK(file >= 0 && !unlink(path));
    make_lmdb();
    CHECK(!lmdb_damage(file));
    CHECK(!edm_lmdb_guard(file));
    CHECK(pread(file, lmdb, sizeof lmdb, 0) == sizeof lmdb);
    CHECK(!lmdb_damage(file));
    // Each bit of a meta page in turn, guard included.
    for (unsigned bit = 0; bit < 2 * PAGE * 8; bit++) {
        unsigned in_page = bit / 8 % PAGE;
        if (in_page >= 152 && (in_page < 2048 || in_page >= 2048 + 24))
            continue;
        lmdb[bit / 8] ^= (uint8_t)(1u << bit % 8);
        if (!lmdb_damage(file))
            FAIL("bit %u of the meta pages", bit);
        lmdb[bit / 8] ^= (uint8_t)(1u << bit % 8);
    }
    // Anything at all behind them: never more than a report. Without guards, so that roots and counts vary, too.
    for (unsigned round = 0; round < 10000; round++) {
        make_lmdb();
        for (uint64_t n = 1 + below(4); n; n--)
            lmdb[below(4) ? 2 * PAGE + below(3) * PAGE + (below(2) ? below(32) : PAGE - 1 - below(400))
                          : below(2) * PAGE + below(152)] = (uint8_t)next_random(&seed);
        lmdb_damage(file);
    }
    // A file that ends early.
    make_lmdb();
    for (unsigned pages = 0; pages < 5; pages++) {
        struct edm_lmdb_report report;
        CHECK(pwrite(file, lmdb, sizeof lmdb, 0) == sizeof lmdb && !ftruncate(file, pages * PAGE + 100));
        CHECK(!edm_lmdb_check(file, 0, 1, &report) && report.bad_count);
    }
    close(file);
}

int main(void) {
    alarm(110);
    large_values_are_looked_at();
    damaged_lmdb_files_are_found();
    return 0;
}
