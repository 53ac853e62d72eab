/*
 * The wire layout of all transports: sealing and checking messages. docs/protocol.md describes it; edm/wire.py is the
 * Python side. Here since four of these stand on the path of every page fetched: [5, 11].
 *
 * Nothing here trusts a byte of a message before it is checked against the length that really came.
 */
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "edm_abi.h"

#define MAGIC 0x774d4445u /* "EDMw" */
#define VERSION 1
#define PAGE_BYTES 4096u
#define MAX_BATCH 1024u
#define MAX_TEXT 1024u
#define MAX_CONTROL (256u << 10)
#define EXISTING_PAGE 1 /* edm.types.GetStatus */

/* Little-endian on the wire, as all machines that Linux's userfaultfd serves are. */
_Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "the wire layout is written as it lies in memory");

struct header {
    uint32_t magic;
    uint8_t version;
    uint8_t kind;
    uint16_t batch;
    uint32_t channel;
    uint32_t instance;
    uint64_t request;
    uint32_t text_bytes;
    uint32_t pages;
    uint32_t length;
    uint32_t checksum; /* CRC-32C of everything before the pages, with this field 0 */
};
_Static_assert(sizeof(struct header) == 40, "the header has no padding");
_Static_assert(sizeof(struct edm_page_ref) == 32, "nor has a page reference");

enum pages { NONE, ALL, SOME };

static const struct shape {
    uint16_t fewest, most; /* page references */
    uint32_t most_text;
    uint8_t known, pages;
} shapes[] = {
    [2] = {1, MAX_BATCH, 0, 1, NONE},        /* GET */
    [3] = {1, MAX_BATCH, 0, 1, SOME},        /* PAGES */
    [4] = {1, MAX_BATCH, 0, 1, ALL},         /* EVICT */
    [5] = {1, MAX_BATCH, MAX_TEXT, 1, NONE}, /* ACK */
    [6] = {0, 0, MAX_CONTROL, 1, NONE},      /* CONTROL */
    [7] = {0, 0, MAX_CONTROL, 1, NONE},      /* ANSWER */
    [8] = {0, 0, 0, 1, NONE},                /* PING */
    [9] = {0, 0, 0, 1, NONE},                /* PONG */
    [10] = {0, 0, 0, 1, NONE},               /* BYE */
    [11] = {0, 0, MAX_TEXT, 1, NONE},        /* REFUSED */
};

static struct edm_page_ref *refs_of(const void *frame) {
    return (struct edm_page_ref *)((char *)(uintptr_t)frame + sizeof(struct header));
}

static char *pages_of(const void *frame, uint32_t batch) {
    return (char *)refs_of(frame) + (size_t)batch * sizeof(struct edm_page_ref);
}

uint64_t edm_wire_seal(void *frame, uint32_t kind, uint32_t batch, uint32_t channel, uint32_t instance,
                       uint64_t request, uint32_t text_bytes, uint32_t pages) {
    size_t checked = sizeof(struct header) + (size_t)batch * sizeof(struct edm_page_ref) + text_bytes;
    struct header header = {
        .magic = MAGIC,
        .version = VERSION,
        .kind = (uint8_t)kind,
        .batch = (uint16_t)batch,
        .channel = channel,
        .instance = instance,
        .request = request,
        .text_bytes = text_bytes,
        .pages = pages,
        .length = (uint32_t)(checked + (size_t)pages * PAGE_BYTES),
    };

    memcpy(frame, &header, sizeof header);
    header.checksum = edm_crc32c(frame, checked);
    memcpy((char *)frame + offsetof(struct header, checksum), &header.checksum, sizeof header.checksum);
    return header.length;
}

static bool has_shape(const struct edm_wire_head *head) {
    const struct shape *shape = &shapes[head->kind];

    if (head->batch < shape->fewest || head->batch > shape->most || head->text_bytes > shape->most_text)
        return false;
    if (shape->pages == SOME)
        return head->pages <= head->batch;
    return head->pages == (shape->pages == ALL ? head->batch : 0);
}

static uint32_t present(const struct edm_page_ref *refs, uint32_t batch) {
    uint32_t found = 0;

    for (uint32_t i = 0; i < batch; i++)
        found += refs[i].status == EXISTING_PAGE;
    return found;
}

int edm_wire_open(void *frame, uint64_t length, uint64_t capacity, struct edm_wire_head *head) {
    struct header header;
    uint32_t checksum;
    size_t checked;

    memset(head, 0, sizeof *head);
    if (length < sizeof header || length > capacity)
        return EDM_WIRE_LENGTH;
    memcpy(&header, frame, sizeof header);
    if (header.magic != MAGIC)
        return EDM_WIRE_MAGIC;
    head->request = header.request;
    head->channel = header.channel;
    head->instance = header.instance;
    head->text_bytes = header.text_bytes;
    head->batch = header.batch;
    head->pages = header.pages;
    head->kind = header.kind;
    if (header.version != VERSION)
        return EDM_WIRE_VERSION;
    /* 64-bit sums of 32-bit fields: none of these can wrap. */
    checked = sizeof header + (size_t)header.batch * sizeof(struct edm_page_ref) + (size_t)header.text_bytes;
    if (header.length != length || checked + (uint64_t)header.pages * PAGE_BYTES != length)
        return EDM_WIRE_CLAIM;
    if (header.kind >= sizeof shapes / sizeof shapes[0] || !shapes[header.kind].known)
        return EDM_WIRE_KIND;
    if (!has_shape(head))
        return EDM_WIRE_SHAPE;
    /* The checksum was made with its own field 0: take it out, and leave the message as it came. */
    checksum = header.checksum;
    memset((char *)frame + offsetof(struct header, checksum), 0, sizeof checksum);
    header.checksum = edm_crc32c(frame, checked);
    memcpy((char *)frame + offsetof(struct header, checksum), &checksum, sizeof checksum);
    if (header.checksum != checksum)
        return EDM_WIRE_CHECKSUM;
    if (shapes[header.kind].pages == SOME && present(refs_of(frame), header.batch) != header.pages)
        return EDM_WIRE_PRESENT;
    return EDM_WIRE_OK;
}

int edm_wire_take_refs(const void *frame, const struct edm_wire_head *head, struct edm_page_ref *refs) {
    const struct edm_page_ref *theirs = refs_of(frame);

    for (uint32_t i = 0; i < head->batch; i++)
        if (theirs[i].region != refs[i].region || theirs[i].index != refs[i].index)
            return -1;
    memcpy(refs, theirs, head->batch * sizeof *refs);
    return 0;
}

uint64_t edm_wire_rest(const void *frame, uint64_t length, uint64_t capacity, uint64_t *request) {
    struct header header;

    if (length < sizeof header || length > capacity)
        return 0;
    memcpy(&header, frame, sizeof header);
    *request = header.request;
    if (header.magic != MAGIC || header.version != VERSION || header.length <= length || header.length > capacity)
        return 0;
    return header.length - length == (uint64_t)header.pages * PAGE_BYTES ? header.length - length : 0;
}

int edm_wire_take(const void *frame, const struct edm_wire_head *head, struct edm_page_ref *refs, void *into) {
    const char *page = pages_of(frame, head->batch);

    if (edm_wire_take_refs(frame, head, refs))
        return -1;
    if (head->pages == head->batch) {
        memcpy(into, page, (size_t)head->pages * PAGE_BYTES);
        return 0;
    }
    for (uint32_t i = 0; i < head->batch; i++) {
        if (refs[i].status == EXISTING_PAGE) {
            memcpy((char *)into + (size_t)i * PAGE_BYTES, page, PAGE_BYTES);
            page += PAGE_BYTES;
        }
    }
    return 0;
}

uint32_t edm_wire_gather(void *frame, uint32_t batch) {
    const struct edm_page_ref *refs = refs_of(frame);
    char *pages = pages_of(frame, batch);
    uint32_t found = 0;

    for (uint32_t i = 0; i < batch; i++) {
        if (refs[i].status != EXISTING_PAGE)
            continue;
        if (found != i)
            memcpy(pages + (size_t)found * PAGE_BYTES, pages + (size_t)i * PAGE_BYTES, PAGE_BYTES);
        found++;
    }
    return found;
}
