// The meta pages of an LMDB file, and their guards: LMDB writes only the first 152 bytes of pages 0 and 1. At byte 2048
// of each stands a guard of ours, which says what the meta page held after the last commit there: one that was damaged,
// or rolled back, does not fit.
#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <unistd.h>

#include "lmdb_format.h"

#define LMDB_MAGIC 0xbeefc0deu
#define GUARD_AT 2048u
#define GUARD_MAGIC 0x44524755444d4445ull /* "EDMDUGRD" */

struct guard {
    uint64_t magic, transaction;
    uint32_t meta_sum;  // of all of the meta page's 152 bytes but the transaction
    uint32_t own_sum;
};

bool lmdb_bad(struct edm_lmdb_report *report, const char *table, uint64_t page, const char *what, ...) {
    if (report->bad_count < EDM_LMDB_BAD_MOST) {
        struct edm_lmdb_bad *one = &report->bad[report->bad_count++];
        va_list arguments;
        va_start(arguments, what);
        vsnprintf(one->what, sizeof one->what, what, arguments);
        va_end(arguments);
        snprintf(one->table, sizeof one->table, "%s", table);
        one->page = page;
    }
    return false;
}

ssize_t lmdb_read(int file, void *to, size_t bytes, uint64_t at) {
    size_t done = 0;

    while (done < bytes) {
        ssize_t n = pread(file, (char *)to + done, bytes - done, (off_t)(at + done));
        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0)
            return -errno;
        if (!n)
            break;
        done += (size_t)n;
    }
    return (ssize_t)done;
}

static uint32_t meta_sum(const struct meta *meta) { return edm_crc32c(meta, META_BYTES - 8); }

static uint32_t guard_sum(const struct guard *guard) { return edm_crc32c(guard, offsetof(struct guard, own_sum)); }

static int read_metas(int file, struct meta metas[2], struct guard guards[2]) {
    for (unsigned i = 0; i < 2; i++) {
        ssize_t n = lmdb_read(file, &metas[i], META_BYTES, i * PAGE);
        if (n >= 0 && n < (ssize_t)META_BYTES)
            return -ENODATA;
        if (n >= 0)
            n = lmdb_read(file, &guards[i], sizeof guards[i], i * PAGE + GUARD_AT);
        if (n < 0)
            return (int)n;
    }
    return 0;
}

enum guard_state { NONE, SOUND, DAMAGED };

static enum guard_state state_of(const struct guard *guard) {
    static const struct guard none;

    if (!memcmp(guard, &none, sizeof none))
        return NONE;
    return guard->magic == GUARD_MAGIC && guard->own_sum == guard_sum(guard) ? SOUND : DAMAGED;
}

static bool newest_is_guarded(const struct meta metas[2], const struct guard guards[2], const enum guard_state *states,
                              unsigned newest) {
    unsigned other = 1 - newest;
    const struct meta *meta = &metas[newest];

    if (states[newest] == SOUND && guards[newest].transaction == meta->transaction)
        return guards[newest].meta_sum == meta_sum(meta);
    if (states[newest] == DAMAGED || states[other] == DAMAGED)
        return true;  // which is told; one of the two is damaged, not both
    if (states[newest] == NONE && states[other] == NONE)
        return true;
    // A death between a commit and its guard: the guards are one transaction behind, and this is no older meta page.
    return states[other] == SOUND && guards[other].transaction + 1 == meta->transaction &&
           metas[other].transaction + 1 == meta->transaction && guards[other].meta_sum == meta_sum(&metas[other]) &&
           (states[newest] == NONE ||
            (guards[newest].transaction + 2 == meta->transaction && guards[newest].meta_sum != meta_sum(meta)));
}

int lmdb_check_metas(int file, int lost_power, struct meta *out, struct edm_lmdb_report *report) {
    struct meta metas[2];
    struct guard guards[2] = {{0}};
    enum guard_state states[2];
    int failed = read_metas(file, metas, guards);

    if (failed)
        return failed == -ENODATA ? lmdb_bad(report, "meta", 0, "the file is too short"), -1 : failed;
    unsigned newest = metas[1].transaction > metas[0].transaction;
    for (unsigned i = 0; i < 2; i++) {
        const struct meta *m = &metas[i];
        states[i] = state_of(&guards[i]);
        if (m->magic != LMDB_MAGIC || m->version != 1 || m->head.number != i || m->head.flags != META ||
            m->free.pad != PAGE || (m->transaction && (m->transaction & 1) != i))
            lmdb_bad(report, "meta", i, "no meta page");
        else if (states[i] == SOUND && m->transaction < guards[i].transaction && !lost_power)
            lmdb_bad(report, "meta", i, "transaction %llu is missing", (unsigned long long)guards[i].transaction);
        else if (states[i] == DAMAGED) {
            report->guards_damaged |= 1u << i;
        } else if (i != newest && states[i] == SOUND && m->transaction == guards[i].transaction &&
                   guards[i].meta_sum != meta_sum(m))
            report->older_meta_damaged = 1;
    }
    if (!report->bad_count && !lost_power && !newest_is_guarded(metas, guards, states, newest))
        lmdb_bad(report, "meta", newest, "its checksum does not match");
    *out = metas[newest];
    report->transaction = out->transaction;
    return report->bad_count ? -1 : 0;
}

int edm_lmdb_guard(int file) {
    struct meta metas[2];
    struct guard guards[2];
    int failed = read_metas(file, metas, guards);

    for (unsigned i = 0; i < 2 && !failed; i++) {
        struct guard guard = {GUARD_MAGIC, metas[i].transaction, meta_sum(&metas[i]), 0};
        guard.own_sum = guard_sum(&guard);
        if (!memcmp(&guard, &guards[i], sizeof guard))
            continue;
        ssize_t n = pwrite(file, &guard, sizeof guard, i * PAGE + GUARD_AT);
        if (n != (ssize_t)sizeof guard)
            failed = n < 0 ? -errno : -EIO;
    }
    return failed;
}
