// Reading an SPT journal back: frames whose checksums chain, each a list of changes to the table.
//
// A frame: 32 bytes of header (struct edm_spt_frame), then `length` bytes of changes. `chain` is the CRC-32C of the
// header's first 28 bytes and the chain before, so a frame counts only behind the very frame it was written behind:
// what an earlier, longer write left behind the end is never mistaken for one.
#include <errno.h>
#include <string.h>

#include "spt_table.h"

#define MAGIC 0x4a4d4445u /* "EDMJ" */

static uint64_t word(const uint8_t *at, unsigned n) {
    uint64_t value;

    memcpy(&value, at + 8 * n, sizeof value);
    return value;
}

uint32_t edm_spt_frame_chain(const struct edm_spt_frame *frame, uint32_t before) {
    uint8_t bytes[32];

    memcpy(bytes, frame, 28);
    memcpy(bytes + 28, &before, 4);
    return edm_crc32c(bytes, sizeof bytes);
}

// The bytes behind a change's head: -EBADMSG for a kind that is not known.
static int64_t change_bytes(uint32_t kind, uint64_t count) {
    switch (kind) {
    case EDM_SPT_RECORD:
        return (int64_t)(count * (sizeof(struct edm_page_ref) + 8));
    case EDM_SPT_CREATE:
    case EDM_SPT_DROP_REGION:
        return 8;
    case EDM_SPT_CLONE:
    case EDM_SPT_NOTE:
        return 16;
    case EDM_SPT_DROP:
        return 24;
    case EDM_SPT_MOVE:
        return 32;
    case EDM_SPT_SHARE:
        return (int64_t)(count * 16);
    default:
        return -EBADMSG;
    }
}

static int change(struct edm_spt *spt, uint32_t kind, uint32_t count, const uint8_t *at) {
    switch (kind) {
    case EDM_SPT_RECORD:
        return edm_spt_record(spt, (const struct edm_page_ref *)at,
                              (const uint64_t *)(at + count * sizeof(struct edm_page_ref)), count);
    case EDM_SPT_CREATE:
        return edm_spt_create(spt, word(at, 0));
    case EDM_SPT_DROP_REGION:
        return edm_spt_drop_region(spt, word(at, 0));
    case EDM_SPT_CLONE:
        return edm_spt_clone(spt, word(at, 0), word(at, 1));
    case EDM_SPT_NOTE:
        return edm_spt_note(spt, word(at, 0), word(at, 1));
    case EDM_SPT_DROP:
        return edm_spt_drop(spt, word(at, 0), word(at, 1), word(at, 2));
    case EDM_SPT_MOVE:
        return edm_spt_move(spt, word(at, 0), word(at, 1), word(at, 2), word(at, 3));
    default:
        return edm_spt_share(spt, (const uint64_t *)at, count);
    }
}

int edm_spt_apply(struct edm_spt *spt, const void *changes, size_t length) {
    const uint8_t *at = changes, *end = at + length;

    // spt NULL: only see whether it is well formed.
    while (at < end) {
        uint32_t head[2];
        if (end - at < (ptrdiff_t)sizeof head)
            return -EBADMSG;
        memcpy(head, at, sizeof head);
        at += sizeof head;
        int64_t bytes = change_bytes(head[0], head[1]);
        if (bytes < 0 || bytes > end - at)
            return -EBADMSG;
        int failed = spt ? change(spt, head[0], head[1], at) : 0;
        if (failed)
            return failed;
        if (spt)
            spt->gone_count = 0;
        at += bytes;
    }
    return 0;
}

int64_t edm_spt_replay(struct edm_spt *spt, const void *journal, size_t length, struct edm_spt_replayed *state) {
    const uint8_t *data = journal;
    size_t at = 0;

    while (length - at >= sizeof(struct edm_spt_frame)) {
        struct edm_spt_frame frame;
        memcpy(&frame, data + at, sizeof frame);
        if (frame.magic != MAGIC || frame.number != state->frames || frame.length > length - at - sizeof frame ||
            frame.chain != edm_spt_frame_chain(&frame, state->chain) ||
            frame.checksum != edm_crc32c(data + at + sizeof frame, frame.length))
            break;
        if (state->stop_at && state->frames >= state->stop_at)
            break;
        int failed = edm_spt_apply(spt, data + at + sizeof frame, frame.length);
        if (failed)
            return failed;
        at += sizeof frame + frame.length;
        state->chain = frame.chain;
        state->frames++;
        state->flags |= frame.flags;
        if (frame.flags & EDM_SPT_SEALED)
            state->sealed = state->frames;
    }
    return (int64_t)at;
}
