// Segments of the page files: their layout, the system calls on them, and failures that tests ask for.
#include "page_file.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#define FORMAT_VERSION 2
// Pages begin at a multiple of this: the kernel then keeps a batch in a few large folios, which are quicker to copy.
#define ALIGN_PAGES 64

struct header {
    char magic[8];
    uint32_t version;
    uint32_t segment_pages;
    uint64_t number;
    uint32_t checksum;  // of the bytes before
};

#define HEADER_BYTES (offsetof(struct header, checksum) + 4)

int pf_injected(struct edm_pf *pf, int call) {
    if (pf->failures[call].after) {
        pf->failures[call].after--;
        return 0;
    }
    if (!pf->failures[call].count)
        return 0;
    if (pf->failures[call].count != UINT32_MAX)
        pf->failures[call].count--;
    return pf->failures[call].error;
}

ssize_t pf_read(struct edm_pf *pf, int fd, void *to, size_t bytes, off_t at) {
    size_t done = 0;

    while (done < bytes) {
        int injected = pf_injected(pf, EDM_PF_READ);
        size_t part = injected < 0 && bytes - done > 1 ? (bytes - done) / 2 : bytes - done;
        ssize_t n = injected > 0 ? -1 : pread(fd, (char *)to + done, part, at + (off_t)done);
        if (n < 0) {
            int error = injected > 0 ? injected : errno;
            if (error == EINTR)
                continue;
            return -error;
        }
        if (!n)
            break;
        done += (size_t)n;
    }
    return (ssize_t)done;
}

int pf_write(struct edm_pf *pf, int fd, const void *from, size_t bytes, off_t at) {
    size_t done = 0;

    while (done < bytes) {
        int injected = pf_injected(pf, EDM_PF_WRITE);
        // A short direct write must stay aligned.
        size_t half = bytes - done > 2 * PF_PAGE ? (bytes - done) / 2 / PF_PAGE * PF_PAGE : bytes - done;
        ssize_t n =
            injected > 0 ? -1 : pwrite(fd, (const char *)from + done, injected ? half : bytes - done, at + (off_t)done);
        if (n < 0) {
            int error = injected > 0 ? injected : errno;
            if (error == EINTR)
                continue;
            return -error;
        }
        if (!n)
            return -EIO;
        done += (size_t)n;
    }
    return 0;
}

int pf_fdatasync(struct edm_pf *pf, int fd) {
    int injected = pf_injected(pf, EDM_PF_SYNC);

    if (injected > 0)
        return -injected;
    return fdatasync(fd) ? -errno : 0;
}

int pf_punch(struct edm_pf *pf, int fd, off_t at, off_t bytes) {
    int injected = pf_injected(pf, EDM_PF_PUNCH);

    if (injected > 0)
        return -injected;
    return fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, at, bytes) ? -errno : 0;
}

// ---- layout

static off_t sums_at(uint32_t offset) { return PF_PAGE + (off_t)offset * 4; }

static off_t pages_at(const struct edm_pf *pf, uint32_t offset) {
    off_t align = (off_t)ALIGN_PAGES * PF_PAGE, first = (sums_at(pf->segment_pages) + align - 1) / align * align;

    return first + (off_t)offset * PF_PAGE;
}

uint64_t edm_pf_offset(const struct edm_pf *pf, uint64_t slot) {
    return (uint64_t)pages_at(pf, (uint32_t)(slot % pf->segment_pages));
}

static void name_of(uint64_t number, char *name) {
    snprintf(name, PF_NAME_BYTES, "%08llx.pages", (unsigned long long)number);
}

static struct header header_of(const struct edm_pf *pf, uint64_t number) {
    struct header header = {"EDMPAGES", FORMAT_VERSION, pf->segment_pages, number, 0};

    header.checksum = edm_crc32c(&header, offsetof(struct header, checksum));
    return header;
}

struct pf_segment *pf_segment_of(const struct edm_pf *pf, uint64_t number) {
    return number < pf->count ? pf->segments[number] : NULL;
}

static int enlist(struct edm_pf *pf, uint64_t number, struct pf_segment **out) {
    if (number >= 1ull << 32)
        return -EOVERFLOW;
    if (number >= pf->capacity) {
        size_t capacity = 2 * (number + 8);
        struct pf_segment **bigger = realloc(pf->segments, capacity * sizeof *bigger);
        if (!bigger)
            return -ENOMEM;
        memset(bigger + pf->capacity, 0, (capacity - pf->capacity) * sizeof *bigger);
        pf->segments = bigger;
        pf->capacity = capacity;
    }
    struct pf_segment *segment = calloc(1, sizeof *segment);
    if (segment) {
        *segment = (struct pf_segment){.number = number, .fd = -1, .direct_fd = -1};
        segment->used = calloc(pf->words, 8);
        segment->holes = calloc(pf->words, 8);
        segment->sums = calloc(pf->segment_pages, 4);
    }
    if (!segment || !segment->used || !segment->holes || !segment->sums) {
        if (segment)
            pf_segment_close(segment);
        return -ENOMEM;
    }
    pf->segments[number] = *out = segment;
    if (number >= pf->count)
        pf->count = number + 1;
    if (number >= pf->next_number)
        pf->next_number = number + 1;
    return 0;
}

void pf_segment_close(struct pf_segment *segment) {
    if (segment->fd >= 0)
        close(segment->fd);
    if (segment->direct_fd >= 0)
        close(segment->direct_fd);
    free(segment->used);
    free(segment->holes);
    free(segment->sums);
    free(segment);
}

static int open_files(struct edm_pf *pf, struct pf_segment *segment, int flags) {
    char name[PF_NAME_BYTES];
    int injected = pf_injected(pf, EDM_PF_OPEN);

    if (injected > 0)
        return -injected;
    name_of(segment->number, name);
    segment->fd = openat(pf->dir, name, O_RDWR | O_CLOEXEC | flags, 0600);
    if (segment->fd < 0)
        return -errno;
    if (pf->direct) {
        segment->direct_fd = openat(pf->dir, name, O_RDWR | O_CLOEXEC | O_DIRECT);
        if (segment->direct_fd < 0)
            return -errno;
    }
    return 0;
}

static void delist(struct edm_pf *pf, struct pf_segment *segment) {
    pf->segments[segment->number] = NULL;
    if (pf->current == segment)
        pf->current = NULL;
    pf_segment_close(segment);
}

int pf_segment_create(struct edm_pf *pf, struct pf_segment **out) {
    struct pf_segment *segment;
    struct header header = header_of(pf, pf->next_number);
    int failed = enlist(pf, pf->next_number, &segment);

    if (failed)
        return failed;
    failed = open_files(pf, segment, O_CREAT | O_EXCL);
    if (!failed)
        failed = pf_write(pf, segment->fd, &header, HEADER_BYTES, 0);
    if (!failed && ftruncate(segment->fd, pages_at(pf, pf->segment_pages)))
        failed = -errno;
    if (failed) {
        char name[PF_NAME_BYTES];
        name_of(segment->number, name);
        if (segment->fd >= 0 && unlinkat(pf->dir, name, 0))
            pf->next_number = segment->number + 1;  // it stays, empty: the next open removes it
        delist(pf, segment);
        return failed;
    }
    segment->dirty = pf->dir_dirty = true;
    segment->hole_pages = pf->segment_pages;
    memset(segment->holes, 0xff, pf->words * 8ul);
    *out = segment;
    return 0;
}

int edm_pf_attach(struct edm_pf *pf, uint64_t number, int missing) {
    struct header wanted = header_of(pf, number), found = {0};
    struct pf_segment *segment;
    int failed = enlist(pf, number, &segment);

    if (failed || missing)
        return failed;
    failed = open_files(pf, segment, 0);
    if (!failed) {
        ssize_t n = pf_read(pf, segment->fd, &found, HEADER_BYTES, 0);
        failed = n < 0 ? (int)n : 0;
        segment->header_bad = !failed && memcmp(&found, &wanted, HEADER_BYTES);
    }
    if (!failed) {
        // Short: what is missing counts as checksums of nothing, which no page has by accident that was not written.
        ssize_t n = pf_read(pf, segment->fd, segment->sums, pf->segment_pages * 4ul, sums_at(0));
        failed = n < 0 ? (int)n : 0;
    }
    if (failed) {
        delist(pf, segment);
        return failed;
    }
    return segment->header_bad;
}

void pf_segment_remove(struct edm_pf *pf, struct pf_segment *segment) {
    char name[PF_NAME_BYTES];

    name_of(segment->number, name);
    // Where the file cannot be removed it stays as room for pages.
    if (segment->fd >= 0 && unlinkat(pf->dir, name, 0) && errno != ENOENT)
        return;
    if (segment->fd >= 0)
        pf->free_with_blocks -= pf->segment_pages - segment->hole_pages;
    pf->dir_dirty = true;
    delist(pf, segment);
}

// ---- pages

int pf_read_pages(struct edm_pf *pf, struct pf_segment *segment, uint32_t first, uint32_t count, uint8_t *to) {
    uint32_t step = pf->direct ? PF_BOUNCE_PAGES : count;

    for (uint32_t done = 0; done < count; done += step) {
        uint32_t part = count - done < step ? count - done : step;
        size_t bytes = part * (size_t)PF_PAGE;
        uint8_t *target = to + done * (size_t)PF_PAGE;
        ssize_t n = pf_read(pf, pf->direct ? segment->direct_fd : segment->fd, pf->direct ? pf->bounce : target, bytes,
                            pages_at(pf, first + done));
        if (n < 0)
            return (int)n;
        if ((size_t)n < bytes)
            return -ENODATA;
        if (pf->direct)
            memcpy(target, pf->bounce, bytes);
    }
    return 0;
}

int pf_write_pages(struct edm_pf *pf, struct pf_segment *segment, uint32_t first, uint32_t count, const uint8_t *from) {
    uint32_t step = pf->direct ? PF_BOUNCE_PAGES : count;
    int failed = 0;

    for (uint32_t done = 0; done < count && !failed; done += step) {
        uint32_t part = count - done < step ? count - done : step;
        size_t bytes = part * (size_t)PF_PAGE;
        const uint8_t *source = from + done * (size_t)PF_PAGE;
        if (pf->direct)
            source = memcpy(pf->bounce, source, bytes);
        failed = pf_write(pf, pf->direct ? segment->direct_fd : segment->fd, source, bytes, pages_at(pf, first + done));
    }
    return failed;
}

int pf_write_sums(struct edm_pf *pf, struct pf_segment *segment, uint32_t first, uint32_t count) {
    return pf_write(pf, segment->fd, segment->sums + first, count * 4ul, sums_at(first));
}

int edm_pf_fail(struct edm_pf *pf, int call, uint32_t after, uint32_t count, int error) {
    if (call < 0 || call >= EDM_PF_CALLS)
        return -EINVAL;
    pf->failures[call].after = after;
    pf->failures[call].count = count;
    pf->failures[call].error = error;
    return 0;
}

static int punch_free(struct edm_pf *pf, struct pf_segment *segment, uint32_t least_pages) {
    uint32_t at = 0;

    while (at < pf->segment_pages) {
        uint32_t end = at;
        while (end < pf->segment_pages && !pf_bit(segment->used, end) && !pf_bit(segment->holes, end))
            end++;
        if (end - at >= least_pages) {
            int failed = pf_punch(pf, segment->fd, pages_at(pf, at), (off_t)(end - at) * PF_PAGE);
            if (failed)
                return failed;
            for (uint32_t i = at; i < end; i++)
                pf_set(segment->holes, i);
            segment->hole_pages += end - at;
            pf->free_with_blocks -= end - at;
        }
        at = end > at ? end : at + 1;
    }
    return 0;
}

int edm_pf_trim(struct edm_pf *pf, uint32_t least_pages) {
    for (size_t i = 0; i < pf->count; i++) {
        struct pf_segment *segment = pf->segments[i];
        if (!segment || segment->fd < 0)
            continue;
        int failed = punch_free(pf, segment, least_pages);
        // Without holes in files, room comes back when a whole segment is empty.
        pf->no_punch |= failed == -EOPNOTSUPP;
        if (failed)
            return failed;
    }
    return 0;
}
