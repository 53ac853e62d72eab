// Page files [7]: pages in slots of segment files, never written in place while in use.
//
// A segment: one page of header, the pages' CRC-32C (four bytes each), and from the next multiple of 64 pages on the
// pages. Slot s is page s % segment_pages of segment s / segment_pages, whose file is named after its number in
// hexadecimal.
#ifndef EDM_PAGE_FILE_H
#define EDM_PAGE_FILE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

#include "edm_abi.h"

#define PF_PAGE 4096
#define PF_NAME_BYTES 32
#define PF_BOUNCE_PAGES 256

struct pf_segment {
    uint64_t number;
    int fd;         // buffered: header, checksums, and the pages unless `direct` is asked for
    int direct_fd;  // or -1
    uint32_t used_pages, hole_pages;
    bool dirty;    // written since the last sync
    bool suspect;  // a sync failed: what the kernel still has may be marked clean, so it is written again
    bool header_bad;
    uint64_t *used, *holes;  // bit i: slot i is in use; slot i is free and has no blocks
    uint32_t *sums;
};

struct edm_pf {
    int dir;
    bool direct, dir_dirty, no_punch;
    uint32_t segment_pages, words;
    uint64_t limit_pages, used_pages, free_with_blocks, next_number;
    struct pf_segment **segments;  // by number
    size_t count, capacity;
    struct pf_segment *current;
    uint32_t cursor;
    uint8_t *bounce;  // aligned, for O_DIRECT
    struct edm_pf_error error;
    struct {
        uint32_t after, count;
        int error;
    } failures[EDM_PF_CALLS];
};

// I/O in whole, or -errno: short reads and writes go on, EINTR tries again. pf_read gives the bytes up to the file's
// end.
ssize_t pf_read(struct edm_pf *pf, int fd, void *to, size_t bytes, off_t at);
int pf_write(struct edm_pf *pf, int fd, const void *from, size_t bytes, off_t at);
int pf_fdatasync(struct edm_pf *pf, int fd);
int pf_punch(struct edm_pf *pf, int fd, off_t at, off_t bytes);
// 0, or the errno that is to be had instead of the call; -1: a short one.
int pf_injected(struct edm_pf *pf, int call);

// Segments.
struct pf_segment *pf_segment_of(const struct edm_pf *pf, uint64_t number);
int pf_segment_create(struct edm_pf *pf, struct pf_segment **out);
void pf_segment_remove(struct edm_pf *pf, struct pf_segment *segment);
void pf_segment_close(struct pf_segment *segment);
int pf_read_pages(struct edm_pf *pf, struct pf_segment *segment, uint32_t first, uint32_t count, uint8_t *to);
int pf_write_pages(struct edm_pf *pf, struct pf_segment *segment, uint32_t first, uint32_t count, const uint8_t *from);
int pf_write_sums(struct edm_pf *pf, struct pf_segment *segment, uint32_t first, uint32_t count);
int pf_failed(struct edm_pf *pf, int error, uint64_t slot);
// As edm_pf_get; sums: what the pages' checksums must be besides; or NULL.
int pf_get(struct edm_pf *pf, const uint64_t *slots, const uint32_t *sums, size_t n, void *into);

static inline bool pf_bit(const uint64_t *bits, uint32_t i) { return bits[i / 64] >> i % 64 & 1; }
static inline void pf_set(uint64_t *bits, uint32_t i) { bits[i / 64] |= 1ull << i % 64; }
static inline void pf_clear(uint64_t *bits, uint32_t i) { bits[i / 64] &= ~(1ull << i % 64); }

#endif
