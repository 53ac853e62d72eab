// The journal of the SPT store `file`, for evictions that never enter Python: one frame each, written behind the last.
// Everything else that is written there is Python's (edm/plugins/store_file/journal.py), in the same frames.
#include <errno.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "spt_table.h"

#define MAGIC 0x4a4d4445u /* "EDMJ" */
#define HEADER sizeof(struct edm_spt_frame)

static int grow(struct edm_journal *journal, uint64_t bytes) {
    if (bytes <= journal->frame_bytes)
        return 0;
    void *bigger = realloc(journal->frame, 2 * bytes);
    if (!bigger)
        return -EAGAIN;
    journal->frame = bigger;
    journal->frame_bytes = 2 * bytes;
    return 0;
}

void edm_journal_clear(struct edm_journal *journal) {
    free(journal->frame);
    journal->frame = NULL;
    journal->frame_bytes = journal->unwritten = 0;
}

static int write_frame(struct edm_journal *journal, uint64_t bytes) {
    uint64_t done = 0;

    while (done < bytes) {
        int fail = journal->fail;
        journal->fail = 0;
        uint64_t part = fail < 0 ? (bytes - done + 1) / 2 : bytes - done;
        ssize_t n =
            fail > 0 ? -1 : pwrite(journal->fd, (char *)journal->frame + done, part, (off_t)(journal->end + done));
        if (n < 0) {
            int error = fail > 0 ? fail : errno;
            if (error == EINTR)
                continue;
            return -error;
        }
        if (!n)
            return -EIO;
        done += (uint64_t)n;
    }
    return 0;
}

static uint64_t record_bytes(size_t n) {
    return 2 * sizeof(uint32_t) + n * (sizeof(struct edm_page_ref) + sizeof(uint64_t));
}

int edm_journal_ready(struct edm_journal *journal, size_t n) {
    uint64_t bytes = HEADER + record_bytes(n);

    if (journal->held || journal->fd < 0 || journal->end + bytes > journal->most_bytes ||
        journal->frames >= journal->most_frames || journal->pages + n >= journal->most_pages)
        return -EAGAIN;
    return grow(journal, bytes);
}

int edm_journal_record(struct edm_journal *journal, const struct edm_page_ref *refs, const uint64_t *slots, size_t n) {
    uint32_t head[2] = {EDM_SPT_RECORD, (uint32_t)n};
    uint64_t refs_bytes = n * sizeof *refs, length = record_bytes(n);
    uint8_t *changes = (uint8_t *)journal->frame + HEADER;
    memcpy(changes, head, sizeof head);
    memcpy(changes + sizeof head, refs, refs_bytes);
    memcpy(changes + sizeof head + refs_bytes, slots, n * sizeof *slots);
    struct edm_spt_frame frame = {MAGIC, journal->flags, journal->frames, length, edm_crc32c(changes, length), 0};
    frame.chain = edm_spt_frame_chain(&frame, journal->chain);
    memcpy(journal->frame, &frame, sizeof frame);
    int failed = write_frame(journal, HEADER + length);
    if (failed) {
        // What is left of it is no frame of this chain. Where it cannot be cut off, the next write goes over it.
        if (ftruncate(journal->fd, (off_t)journal->end))
            failed = -errno;
        journal->unwritten = length;
        journal->held = 1;
        return failed;
    }
    journal->end += HEADER + length;
    journal->frames++;
    journal->pages += n;
    journal->chain = frame.chain;
    return 0;
}
