// The page files as a whole: which slots are free, batches in and out, and syncing.
#include "page_file.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#define PUNCH_LEAST_PAGES 16

struct edm_pf *edm_pf_open(int dir, uint32_t segment_pages, uint64_t limit_pages, int direct) {
    struct edm_pf *pf = calloc(1, sizeof *pf);

    if (!pf)
        return NULL;
    pf->dir = dir;
    pf->segment_pages = segment_pages;
    pf->words = (segment_pages + 63) / 64;
    pf->limit_pages = limit_pages ? limit_pages : UINT64_MAX;
    pf->direct = direct;
    if (direct) {
        pf->bounce = mmap(NULL, PF_BOUNCE_PAGES * PF_PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (pf->bounce == MAP_FAILED) {
            free(pf);
            return NULL;
        }
    }
    return pf;
}

void edm_pf_close(struct edm_pf *pf) {
    if (!pf)
        return;
    for (size_t i = 0; i < pf->count; i++)
        if (pf->segments[i])
            pf_segment_close(pf->segments[i]);
    if (pf->bounce)
        munmap(pf->bounce, PF_BOUNCE_PAGES * PF_PAGE);
    free(pf->segments);
    free(pf);
}

int pf_failed(struct edm_pf *pf, int error, uint64_t slot) {
    pf->error = (struct edm_pf_error){.error = -error, .slot = slot};
    return error;
}

void edm_pf_error(const struct edm_pf *pf, struct edm_pf_error *out) { *out = pf->error; }

// ---- free slots

int edm_pf_mark(struct edm_pf *pf, const uint64_t *slots, size_t n) {
    if (!pf)
        return -EBADF;
    for (size_t i = 0; i < n; i++) {
        uint64_t number = slots[i] / pf->segment_pages;
        struct pf_segment *segment = pf_segment_of(pf, number);
        if (!segment) {
            // Its file is gone: its pages are errors, and its number is not given to another.
            int failed = edm_pf_attach(pf, number, 1);
            if (failed)
                return pf_failed(pf, failed, slots[i]);
            segment = pf_segment_of(pf, number);
        }
        uint32_t offset = (uint32_t)(slots[i] % pf->segment_pages);
        if (!pf_bit(segment->used, offset)) {
            pf_set(segment->used, offset);
            segment->used_pages++;
            pf->used_pages++;
        }
    }
    return 0;
}

int edm_pf_live(struct edm_pf *pf, const uint64_t *slots, size_t n) {
    int failed = edm_pf_mark(pf, slots, n);

    if (failed)
        return failed;
    for (size_t i = 0; i < pf->count; i++) {
        struct pf_segment *segment = pf->segments[i];
        if (!segment)
            continue;
        if (segment->fd >= 0)
            pf->free_with_blocks += pf->segment_pages - segment->used_pages;
        if (!segment->used_pages)
            pf_segment_remove(pf, segment);
    }
    return 0;
}

static uint32_t room(const struct edm_pf *pf, const struct pf_segment *segment) {
    return segment && segment->fd >= 0 ? pf->segment_pages - segment->used_pages : 0;
}

// The segment to fill next. One that is nearly full is left alone while there may be another file: scattered slots make
// slow batches.
static int next_segment(struct edm_pf *pf) {
    struct pf_segment *best = NULL;

    for (size_t i = 0; i < pf->count; i++)
        if (room(pf, pf->segments[i]) > room(pf, best))
            best = pf->segments[i];
    int failed = 0;
    if (room(pf, best) < pf->segment_pages / 8 + 1) {
        failed = pf_segment_create(pf, &pf->current);
        if (failed && !best)
            return failed;
    }
    if (room(pf, best) >= pf->segment_pages / 8 + 1 || failed)
        pf->current = best;
    pf->cursor = 0;
    return 0;
}

static size_t take_from_current(struct edm_pf *pf, uint64_t *slots, size_t n) {
    struct pf_segment *segment = pf->current;
    size_t taken = 0;

    while (taken < n && pf->cursor < pf->segment_pages && segment->used_pages < pf->segment_pages) {
        uint64_t free_bits = ~segment->used[pf->cursor / 64] >> pf->cursor % 64;
        if (!free_bits) {
            pf->cursor = (pf->cursor / 64 + 1) * 64;
            continue;
        }
        pf->cursor += (uint32_t)__builtin_ctzll(free_bits);
        if (pf->cursor >= pf->segment_pages)
            break;
        pf_set(segment->used, pf->cursor);
        segment->used_pages++;
        if (pf_bit(segment->holes, pf->cursor)) {
            pf_clear(segment->holes, pf->cursor);
            segment->hole_pages--;
        } else {
            pf->free_with_blocks--;
        }
        slots[taken++] = segment->number * pf->segment_pages + pf->cursor++;
    }
    pf->used_pages += taken;
    return taken;
}

static void give_back(struct edm_pf *pf, const uint64_t *slots, size_t n) {
    for (size_t i = 0; i < n; i++) {
        struct pf_segment *segment = pf_segment_of(pf, slots[i] / pf->segment_pages);
        uint32_t offset = (uint32_t)(slots[i] % pf->segment_pages);
        if (!segment || !pf_bit(segment->used, offset))
            continue;
        pf_clear(segment->used, offset);
        segment->used_pages--;
        pf->used_pages--;
        pf->free_with_blocks += segment->fd >= 0;
    }
}

static int take(struct edm_pf *pf, uint64_t *slots, size_t n) {
    size_t taken = 0;

    if (n > pf->limit_pages || pf->used_pages > pf->limit_pages - n)
        return -EDQUOT;
    while (taken < n) {
        if (pf->current)
            taken += take_from_current(pf, slots + taken, n - taken);
        int failed = taken < n ? next_segment(pf) : 0;
        if (failed) {
            give_back(pf, slots, taken);
            return failed;
        }
    }
    return 0;
}

// ---- batches

// How many of slots[0..n) follow each other in one segment.
static size_t run(const struct edm_pf *pf, const uint64_t *slots, size_t n) {
    size_t most = pf->segment_pages - slots[0] % pf->segment_pages, length = 1;

    while (length < n && length < most && slots[length] == slots[0] + length)
        length++;
    return length;
}

int edm_pf_put(struct edm_pf *pf, const void *pages, const uint32_t *sums, size_t n, uint64_t *slots) {
    const uint8_t *from = pages;
    int failed = pf ? take(pf, slots, n) : -EBADF;

    if (failed)
        return pf ? pf_failed(pf, failed, UINT64_MAX) : failed;
    for (size_t i = 0, length; i < n; i += length) {
        struct pf_segment *segment = pf_segment_of(pf, slots[i] / pf->segment_pages);
        uint32_t first = (uint32_t)(slots[i] % pf->segment_pages);
        length = run(pf, slots + i, n - i);
        memcpy(segment->sums + first, sums + i, length * 4);
        segment->dirty = true;
        failed = pf_write_pages(pf, segment, first, (uint32_t)length, from + i * PF_PAGE);
        if (!failed)
            failed = pf_write_sums(pf, segment, first, (uint32_t)length);
        if (failed) {
            give_back(pf, slots, n);
            return pf_failed(pf, failed, slots[i]);
        }
    }
    return 0;
}

int edm_pf_get(struct edm_pf *pf, const uint64_t *slots, size_t n, void *into) {
    return pf_get(pf, slots, NULL, n, into);
}

int pf_get(struct edm_pf *pf, const uint64_t *slots, const uint32_t *sums, size_t n, void *into) {
    uint8_t *to = into;

    if (!pf)
        return -EBADF;
    for (size_t i = 0, length; i < n; i += length) {
        struct pf_segment *segment = pf_segment_of(pf, slots[i] / pf->segment_pages);
        uint32_t first = (uint32_t)(slots[i] % pf->segment_pages);
        length = run(pf, slots + i, n - i);
        if (!segment || segment->fd < 0)
            return pf_failed(pf, -ENOENT, slots[i]);
        for (uint32_t k = 0; k < length; k++)
            if (!pf_bit(segment->used, first + k))
                return pf_failed(pf, -ENOENT, slots[i + k]);
        int failed = pf_read_pages(pf, segment, first, (uint32_t)length, to + i * PF_PAGE);
        if (failed)
            return pf_failed(pf, failed, slots[i]);
        for (uint32_t k = 0; k < length; k++)
            if (edm_crc32c(to + (i + k) * PF_PAGE, PF_PAGE) != segment->sums[first + k] ||
                (sums && sums[i + k] != segment->sums[first + k]))
                return pf_failed(pf, -EBADMSG, slots[i + k]);
    }
    return 0;
}

void edm_pf_release(struct edm_pf *pf, const uint64_t *slots, size_t n) {
    if (!pf)
        return;
    give_back(pf, slots, n);
    for (size_t i = 0; i < n; i++) {
        struct pf_segment *segment = pf_segment_of(pf, slots[i] / pf->segment_pages);
        if (segment && !segment->used_pages && segment != pf->current)
            pf_segment_remove(pf, segment);
    }
    // Most of what lies behind is free again: slots whose blocks, and pages in the kernel's cache, are there already.
    if (pf->current && pf->cursor / 2 > pf->current->used_pages + 64)
        pf->cursor = 0;
    // Room is given back to the file system when there is much of it: taking it anew costs, too.
    if (!pf->no_punch && pf->free_with_blocks > pf->used_pages / 4 + pf->segment_pages / 4)
        edm_pf_trim(pf, PUNCH_LEAST_PAGES);  // where it fails, the blocks stay ours
}

// ---- syncing

// A failed sync may have marked clean what never reached the disk: write it again, from what the kernel still has.
static int write_again(struct edm_pf *pf, struct pf_segment *segment) {
    uint8_t *page = aligned_alloc(PF_PAGE, PF_PAGE);
    struct edm_pf_error *error = &pf->error;
    int failed = page ? 0 : -ENOMEM;

    for (uint32_t at = 0; at < pf->segment_pages && !failed; at++) {
        if (!pf_bit(segment->used, at))
            continue;
        failed = pf_read_pages(pf, segment, at, 1, page);
        if (!failed && edm_crc32c(page, PF_PAGE) != segment->sums[at])
            continue;  // damaged: writing it anew would not mend it, and reading it will say so
        if (!failed)
            failed = pf_write_pages(pf, segment, at, 1, page);
        if (failed)
            *error = (struct edm_pf_error){.error = -failed, .slot = segment->number * pf->segment_pages + at};
    }
    free(page);
    return failed ? failed : pf_write_sums(pf, segment, 0, pf->segment_pages);
}

static int sync_segment(struct edm_pf *pf, struct pf_segment *segment) {
    int failed = segment->suspect ? write_again(pf, segment) : 0;

    if (!failed) {
        failed = pf_fdatasync(pf, segment->fd);
        segment->suspect = failed != 0;
    }
    if (failed)
        return pf_failed(pf, failed, segment->number * pf->segment_pages);
    segment->dirty = false;
    return 0;
}

int edm_pf_sync(struct edm_pf *pf) {
    if (!pf)
        return -EBADF;
    for (size_t i = 0; i < pf->count; i++) {
        struct pf_segment *segment = pf->segments[i];
        int failed = segment && segment->dirty && segment->fd >= 0 ? sync_segment(pf, segment) : 0;
        if (failed)
            return failed;
    }
    if (pf->dir_dirty) {
        int injected = pf_injected(pf, EDM_PF_SYNC);
        if (injected > 0 || fsync(pf->dir))
            return pf_failed(pf, injected > 0 ? -injected : -errno, UINT64_MAX);
        pf->dir_dirty = false;
    }
    return 0;
}

void edm_pf_stat(const struct edm_pf *pf, struct edm_pf_figures *out) {
    *out = (struct edm_pf_figures){0};
    if (!pf)
        return;
    *out = (struct edm_pf_figures){.pages = pf->used_pages, .limit_pages = pf->limit_pages};
    for (size_t i = 0; i < pf->count; i++) {
        const struct pf_segment *segment = pf->segments[i];
        struct stat status;
        if (!segment)
            continue;
        out->segments++;
        out->missing += segment->fd < 0;
        out->header_bad += segment->header_bad;
        if (segment->fd >= 0 && !fstat(segment->fd, &status))
            out->disk_bytes += (uint64_t)status.st_blocks * 512;
    }
}
