// The SPT's table, page files and slabs against models that are too simple to be wrong, and fed with
// what is damaged. Under the sanitizers this shows what reads or writes where it must not.
#include <fcntl.h>
#include <stdbool.h>

#include "check.h"

#define REGIONS 3
#define INDICES 48
#define PAGE 4096u
#define SEGMENT 64

static uint64_t seed = 7;

static uint64_t below(uint64_t n) { return next_random(&seed) % n; }

// ---- the SPT: region and page number to slot and version; slots counted by reference

struct row {
    bool there;
    uint64_t slot, version;
};
static struct row model[REGIONS][INDICES];
static bool exists[REGIONS];
static uint64_t references[1 << 16], gone_wanted;

static void let_go(struct row *row) {
    if (row->there && !--references[row->slot])
        gone_wanted++;
    row->there = false;
}

static void spt_agrees(struct edm_spt *spt) {
    uint64_t count = 0;

    for (unsigned r = 0; r < REGIONS; r++) {
        struct edm_page_ref refs[INDICES];
        uint64_t slots[INDICES];
        for (unsigned i = 0; i < INDICES; i++)
            refs[i] = (struct edm_page_ref){.region = r + 1, .index = i * 1000003ull};
        edm_spt_lookup(spt, refs, INDICES, slots);
        for (unsigned i = 0; i < INDICES; i++) {
            const struct row *row = &model[r][i];
            CHECK((refs[i].status == 1) == row->there);
            CHECK(!row->there || (slots[i] == row->slot && refs[i].version == row->version));
            count += row->there;
        }
    }
    CHECK(edm_spt_count(spt) == count);
}

static void record(struct edm_spt *spt, uint64_t *next_slot, uint64_t version) {
    struct edm_page_ref refs[8];
    uint64_t slots[8], n = 1 + below(8), r = below(REGIONS), first = below(INDICES - 8);

    for (unsigned k = 0; k < n; k++) {
        refs[k] = (struct edm_page_ref){.region = r + 1, .index = (first + k) * 1000003ull, .version = version};
        slots[k] = (*next_slot)++;
    }
    CHECK(!edm_spt_record(spt, refs, slots, n));
    for (unsigned k = 0; k < n; k++) {
        let_go(&model[r][first + k]);
        model[r][first + k] = (struct row){true, slots[k], version};
        references[slots[k]] = 1;
    }
    exists[r] = true;
}

static void clone_one(struct edm_spt *spt) {
    uint64_t from = below(REGIONS), into = below(REGIONS);

    CHECK(!edm_spt_clone(spt, from + 1, into + 1));
    exists[into] = true;
    if (from == into)
        return;
    for (unsigned i = 0; i < INDICES; i++)
        if (model[from][i].there)
            references[model[from][i].slot]++;
    for (unsigned i = 0; i < INDICES; i++) {
        let_go(&model[into][i]);
        model[into][i] = model[from][i];
    }
}

static void drop(struct edm_spt *spt) {
    uint64_t r = below(REGIONS), first = below(INDICES), n = below(INDICES - first + 1);
    bool all = !below(4);

    CHECK(!(all ? edm_spt_drop_region(spt, r + 1)
                : edm_spt_drop(spt, r + 1, first * 1000003ull, n ? (n - 1) * 1000003ull + 1 : 0)));
    for (uint64_t i = all ? 0 : first; i < (all ? INDICES : first + n); i++)
        let_go(&model[r][i]);
    exists[r] &= !all;
}

static void check_gone(struct edm_spt *spt) {
    static uint64_t out[1 << 12];
    size_t n = edm_spt_gone(spt, NULL);

    CHECK(n == gone_wanted && n < sizeof out / sizeof *out);
    CHECK(edm_spt_gone(spt, out) == n);
    for (size_t i = 0; i < n; i++)
        CHECK(!references[out[i]]);
    gone_wanted = 0;
}

static void spt_matches_a_model(void) {
    struct edm_spt *spt = edm_spt_new();
    uint64_t next_slot = 1;

    CHECK(spt);
    for (uint64_t step = 1; step < 4000 && next_slot < (1 << 16) - 8; step++) {
        switch (below(8)) {
        case 0:
            clone_one(spt);
            break;
        case 1:
        case 2:
            drop(spt);
            break;
        default:
            record(spt, &next_slot, step);
        }
        check_gone(spt);
        if (step % 8 == 0)
            spt_agrees(spt);
    }
    spt_agrees(spt);
    edm_spt_free(spt);
}

// ---- the journal: whatever stands in it, what is applied is a whole frame

static size_t frame(uint8_t *to, uint64_t number, uint32_t *chain, const void *changes, size_t bytes) {
    struct edm_spt_frame head = {.magic = 0x4a4d4445u, .number = number, .length = bytes};

    head.checksum = edm_crc32c(changes, bytes);
    head.chain = *chain = edm_spt_frame_chain(&head, *chain);
    memcpy(to, &head, sizeof head);
    memcpy(to + sizeof head, changes, bytes);
    return sizeof head + bytes;
}

static void damaged_journals_stop_at_the_damage(void) {
    enum { FRAMES = 20 };
    static uint8_t journal[1 << 14];
    size_t ends[FRAMES], length = 0;
    uint32_t chain = 0;

    for (unsigned n = 0; n < FRAMES; n++) {
        struct {
            uint32_t kind, count;
            struct edm_page_ref refs[3];
            uint64_t slots[3];
        } change = {.kind = EDM_SPT_RECORD, .count = 3};
        for (unsigned k = 0; k < 3; k++) {
            change.refs[k] = (struct edm_page_ref){.region = 1, .index = n * 3ull + k, .version = 1};
            change.slots[k] = n * 3ull + k;
        }
        length += frame(journal + length, n, &chain, &change, sizeof change);
        ends[n] = length;
    }
    for (unsigned round = 0; round < 3000; round++) {
        // In memory of just that size, so that reading behind it is seen.
        size_t cut = below(4) ? length : below(length + 1), at = below(length);
        uint8_t *copy = malloc(cut + !cut);
        CHECK(copy);
        memcpy(copy, journal, cut);
        bool flips = below(8) && at < cut;
        if (flips)
            copy[at] ^= (uint8_t)(1u << below(8));
        struct edm_spt *spt = edm_spt_new();
        struct edm_spt_replayed state = {0};
        int64_t used = edm_spt_replay(spt, copy, cut, &state);
        unsigned whole = 0;
        while (whole < FRAMES && ends[whole] <= cut && !(flips && at < ends[whole]))
            whole++;
        CHECK(used == (whole ? (int64_t)ends[whole - 1] : 0));
        CHECK(state.frames == whole && edm_spt_count(spt) == whole * 3ull);
        edm_spt_free(spt);
        free(copy);
    }
}

static void changes_that_cannot_be_are_refused(void) {
    for (unsigned round = 0; round < 20000; round++) {
        size_t bytes = below(120);
        uint8_t *changes = malloc(bytes + 1);
        CHECK(changes);
        for (size_t i = 0; i < bytes; i++)
            changes[i] = (uint8_t)(i % 8 < 4 && i < 8 ? (i % 4 ? 0 : below(10)) : next_random(&seed));
        int result = edm_spt_apply(NULL, changes, bytes);
        CHECK(!result || result == -EBADMSG);
        free(changes);
    }
}

// ---- page files

static char directory[] = "/tmp/edm-test-stores-XXXXXX";
static int directory_fd;

static void fill(uint8_t *page, uint64_t number) {
    for (unsigned i = 0; i < PAGE; i += 8) {
        uint64_t word = number * 0x9e3779b97f4a7c15u + i;
        memcpy(page + i, &word, 8);
    }
}

enum { MOST = 300, BATCH = 20 };
static uint64_t slot_of[MOST], number_of[MOST], kept;

static void put_some(struct edm_pf *pf, uint64_t *next, bool may_fail) {
    static uint8_t pages[BATCH * PAGE];
    uint32_t sums[BATCH];
    uint64_t slots[BATCH], n = 1 + below(BATCH);

    if (kept + n > MOST)
        return;
    for (unsigned k = 0; k < n; k++) {
        fill(pages + k * PAGE, *next + k);
        sums[k] = edm_crc32c(pages + k * PAGE, PAGE);
    }
    int result = edm_pf_put(pf, pages, sums, n, slots);
    CHECK(!result || may_fail);
    for (unsigned k = 0; k < n && !result; k++) {
        for (uint64_t i = 0; i < kept; i++)
            CHECK(slot_of[i] != slots[k]);
        slot_of[kept] = slots[k];
        number_of[kept++] = *next + k;
    }
    *next += n;
}

static void release_some(struct edm_pf *pf) {
    uint64_t slots[BATCH], n = below(BATCH);

    n = n < kept ? n : kept;
    for (uint64_t k = 0; k < n; k++) {
        uint64_t at = below(kept);
        slots[k] = slot_of[at];
        slot_of[at] = slot_of[--kept];
        number_of[at] = number_of[kept];
    }
    edm_pf_release(pf, slots, n);
}

static void pages_are_there(struct edm_pf *pf) {
    static uint8_t found[MOST * PAGE], wanted[PAGE];

    CHECK(!edm_pf_get(pf, slot_of, kept, found));
    for (uint64_t i = 0; i < kept; i++) {
        fill(wanted, number_of[i]);
        CHECK(!memcmp(found + i * PAGE, wanted, PAGE));
    }
    struct edm_pf_figures figures;
    edm_pf_stat(pf, &figures);
    CHECK(figures.pages == kept);
}

static struct edm_pf *reopened(struct edm_pf *pf) {
    uint64_t segments = 0;

    if (pf)
        edm_pf_close(pf);
    pf = edm_pf_open(directory_fd, SEGMENT, 0, 0);
    CHECK(pf);
    for (uint64_t number = 0; number < 4096; number++) {
        char name[32];
        snprintf(name, sizeof name, "%08" PRIx64 ".pages", number);
        if (faccessat(directory_fd, name, F_OK, 0))
            continue;
        CHECK(!edm_pf_attach(pf, number, 0));
        segments++;
    }
    CHECK(!edm_pf_live(pf, slot_of, kept));
    return pf;
}

static void page_files_match_a_model(void) {
    struct edm_pf *pf = reopened(NULL);
    uint64_t next = 1;

    for (unsigned step = 0; step < 600; step++) {
        bool fails = !below(6);
        if (fails) {
            static const int errors[] = {EIO, ENOSPC, -1};
            edm_pf_fail(pf, (int)below(EDM_PF_CALLS), (uint32_t)below(3), 1 + (uint32_t)below(2), errors[below(3)]);
        }
        if (below(2))
            put_some(pf, &next, fails);
        else
            release_some(pf);
        if (!below(20) && edm_pf_sync(pf))
            CHECK(fails);
        if (!below(30) && edm_pf_trim(pf, 1))
            CHECK(fails);
        for (int call = 0; fails && call < EDM_PF_CALLS; call++)
            edm_pf_fail(pf, call, 0, 0, 0);
        if (step % 10 == 0)
            pages_are_there(pf);
        if (step % 100 == 99) {
            pf = reopened(pf);
            pages_are_there(pf);
        }
    }
    edm_pf_close(pf);
}

// Any bit of a file: a page comes right, or as an error; never otherwise.
static void damaged_page_files_give_errors(void) {
    struct edm_pf *pf = reopened(NULL);
    uint8_t page[PAGE], wanted[PAGE];

    CHECK(kept);
    for (unsigned round = 0; round < 400; round++) {
        char name[32];
        uint64_t at = below(kept);
        snprintf(name, sizeof name, "%08" PRIx64 ".pages", slot_of[at] / SEGMENT);
        int file = openat(directory_fd, name, O_RDWR);
        CHECK(file >= 0);
        off_t sums = PAGE + (off_t)(slot_of[at] % SEGMENT) * 4, data = (off_t)edm_pf_offset(pf, slot_of[at]);
        off_t byte = below(2) ? sums + (off_t)below(4) : data + (off_t)below(PAGE);
        uint8_t was, now;
        CHECK(pread(file, &was, 1, byte) == 1);
        now = was ^ (uint8_t)(1u << below(8));
        CHECK(pwrite(file, &now, 1, byte) == 1);
        edm_pf_close(pf);
        pf = reopened(NULL);
        CHECK(edm_pf_get(pf, &slot_of[at], 1, page) == -EBADMSG);
        struct edm_pf_error error;
        edm_pf_error(pf, &error);
        CHECK(error.slot == slot_of[at]);
        CHECK(pwrite(file, &was, 1, byte) == 1);
        edm_pf_close(pf);
        pf = reopened(NULL);
        CHECK(!edm_pf_get(pf, &slot_of[at], 1, page));
        fill(wanted, number_of[at]);
        CHECK(!memcmp(page, wanted, PAGE));
        close(file);
    }
    edm_pf_close(pf);
}

// ---- slabs of memory

static void slabs_match_a_model(void) {
    static uint8_t pages[BATCH * PAGE], found[PAGE], wanted[PAGE];
    struct edm_slabs *slabs = edm_slabs_new(64, MOST);
    struct edm_slabs_figures figures;
    uint64_t next = 1, slots[BATCH];
    uint32_t sums[BATCH];

    CHECK(slabs);
    edm_slabs_keep_off(slabs, 1000);
    kept = 0;
    for (unsigned step = 0; step < 4000; step++) {
        // Waves: it grows to its limit, and shrinks to nothing.
        bool grows = step / 200 % 2 ? below(4) == 0 : below(4) > 0;
        uint64_t n = 1 + below(BATCH);
        if (grows) {
            for (unsigned k = 0; k < n; k++) {
                fill(pages + k * PAGE, next + k);
                sums[k] = edm_crc32c(pages + k * PAGE, PAGE);
            }
            int result = edm_slabs_put(slabs, pages, sums, n, slots);
            CHECK(result == (kept + n > MOST ? -EDQUOT : 0));
            for (unsigned k = 0; k < n && !result; k++) {
                CHECK(slots[k] >= 1024);
                for (uint64_t i = 0; i < kept; i++)
                    CHECK(slot_of[i] != slots[k]);
                slot_of[kept] = slots[k];
                number_of[kept++] = next + k;
            }
            next += n;
        } else {
            for (n = n < kept ? n : kept; n; n--) {
                uint64_t at = below(kept);
                slots[0] = slot_of[at];
                slot_of[at] = slot_of[--kept];
                number_of[at] = number_of[kept];
                edm_slabs_release(slabs, slots, 1);
                CHECK(edm_slabs_get(slabs, slots, NULL, 1, found) == -ENOENT);
                CHECK(edm_slabs_failed(slabs) == slots[0]);
                edm_slabs_release(slabs, slots, 1);  // once more does nothing
            }
        }
        edm_slabs_stat(slabs, &figures);
        CHECK(figures.pages == kept);
        for (uint64_t i = step % 7; i < kept; i += 7) {
            fill(wanted, number_of[i]);
            CHECK(!edm_slabs_get(slabs, &slot_of[i], NULL, 1, found) && !memcmp(found, wanted, PAGE));
        }
    }
    // What is empty goes back, but for one slab and the one that is being filled.
    edm_slabs_release(slabs, slot_of, kept);
    edm_slabs_stat(slabs, &figures);
    CHECK(!figures.pages && figures.bytes <= 2 * 64 * PAGE);
    kept = 0;

    fill(pages, 1);
    sums[0] = edm_crc32c(pages, PAGE);
    CHECK(!edm_slabs_put(slabs, pages, sums, 1, slots));
    uint32_t another = sums[0] + 1;
    CHECK(!edm_slabs_get(slabs, slots, sums, 1, found));
    CHECK(edm_slabs_get(slabs, slots, &another, 1, found) == -EBADMSG);
    ((uint8_t *)edm_slabs_page(slabs, slots[0]))[77] ^= 4;
    CHECK(edm_slabs_get(slabs, slots, sums, 1, found) == -EBADMSG);
    CHECK(edm_slabs_get(slabs, slots, NULL, 1, found) == -EBADMSG);
    edm_slabs_free(slabs);
}

int main(void) {
    alarm(110);
    CHECK(mkdtemp(directory));
    directory_fd = open(directory, O_RDONLY | O_DIRECTORY);
    CHECK(directory_fd >= 0);
    spt_matches_a_model();
    damaged_journals_stop_at_the_damage();
    changes_that_cannot_be_are_refused();
    page_files_match_a_model();
    damaged_page_files_give_errors();
    slabs_match_a_model();
    char command[64];
    snprintf(command, sizeof command, "rm -rf %s", directory);
    CHECK(!system(command));
    return 0;
}
