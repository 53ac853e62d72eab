// One channel's requests for pages to one memory server [5, 11], without Python: edm/channel.py does the same, and all
// else. Whatever is out of the ordinary is left to it: the caller makes the same call there, under a new number.
#include <errno.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "carrier.h"
#include "edm_abi.h"
#include "edm_ops.h"

#define HEADER_BYTES 40u
#define PAGE_BYTES 4096u
#define MAX_BATCH 1024u
#define GET 2u /* edm.wire.Kind */
#define PAGES 3u
#define EVICT 4u
#define ACK 5u
#define PATIENCE_S 1.0  // of a call; then Python waits, which looks for signals and for the other side's end

struct edm_conversation {
    struct edm_channel_ops ops;
    const struct edm_carrier *carrier;
    const uint32_t *instance;
    uint8_t *out, *reply;
    uint64_t capacity;
    uint64_t request, length;
    double resend_s;
    uint32_t channel;
    bool out_lost;  // the carrier has kept it
    struct edm_wire_head head;
    struct edm_direct direct;
};

static double now_s(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

static int send_out(struct edm_conversation *c, uint64_t length, double deadline) {
    int result = c->carrier->send(c->carrier->self, c->out, length, deadline);
    c->out_lost = result == -EBUSY;
    return result;
}

// The reply to the request that stands in `out`, into `reply`.
static int finish(struct edm_conversation *c, uint32_t wanted, uint32_t n, uint64_t length, double deadline) {
    for (;;) {
        double until = deadline;
        if (c->resend_s > 0 && now_s() + c->resend_s < deadline)
            until = now_s() + c->resend_s;
        int64_t got = c->carrier->receive(c->carrier->self, until, &c->direct);
        if (got < 0)
            return (int)got;
        if (got == 0) {
            if (now_s() >= deadline)
                return -ETIMEDOUT;
            int again = c->resend_s > 0 ? send_out(c, length, deadline) : 0;
            if (again)
                return again;
            continue;
        }
        if (edm_wire_open(c->reply, (uint64_t)got, c->capacity, &c->head))
            return -EBADMSG;
        if (c->head.request != c->request || c->head.channel != c->channel) {
            continue;  // to a request that was given up
        }
        return c->head.kind == wanted && c->head.batch == n ? 0 : -EPROTO;
    }
}

// Send what stands in `out` behind the header, and wait for the reply.
static int ask(struct edm_conversation *c, uint32_t kind, uint32_t wanted, uint32_t n, void *into, double deadline) {
    uint32_t pages = kind == EVICT ? n : 0;
    c->direct = (struct edm_direct){c->request + 1, n, into, false};
    uint64_t length = c->length = edm_wire_seal(c->out, kind, n, c->channel, *c->instance, ++c->request, 0, pages);
    int result = send_out(c, length, deadline);
    return result ? result : finish(c, wanted, n, length, deadline);
}

static bool ready(const struct edm_conversation *c, uint32_t n) {
    return c->carrier && c->out && !c->out_lost && n && n <= MAX_BATCH;
}

static int fetch_until(struct edm_conversation *c, struct edm_page_ref *refs, uint32_t n, void *into, double deadline) {
    if (!ready(c, n))
        return -EINVAL;
    memcpy(c->out + HEADER_BYTES, refs, n * sizeof *refs);
    int result = ask(c, GET, PAGES, n, into, deadline);
    if (result)
        return result;
    if (c->direct.done)
        return edm_wire_take_refs(c->reply, &c->head, refs) ? -EPROTO : 0;
    return edm_wire_take(c->reply, &c->head, refs, into) ? -EPROTO : 0;
}

static int evict_until(struct edm_conversation *c, struct edm_page_ref *refs, uint32_t n, const void *pages,
                       double deadline) {
    if (!ready(c, n))
        return -EINVAL;
    memcpy(c->out + HEADER_BYTES, refs, n * sizeof *refs);
    memcpy(c->out + HEADER_BYTES + n * sizeof *refs, pages, (size_t)n * PAGE_BYTES);
    int result = ask(c, EVICT, ACK, n, NULL, deadline);
    if (result)
        return result;
    const struct edm_page_ref *theirs = (const struct edm_page_ref *)(c->reply + HEADER_BYTES);
    for (uint32_t i = 0; i < n; i++)
        if (theirs[i].region != refs[i].region || theirs[i].index != refs[i].index)
            return -EPROTO;
    if (c->head.text_bytes)
        return -EPROTO;  // pages were refused: the reason is for Python
    for (uint32_t i = 0; i < n; i++)
        refs[i].status = theirs[i].status;
    return 0;
}

static double patient_until(double deadline) {
    double patience = now_s() + PATIENCE_S;
    return deadline < patience ? deadline : patience;
}

static int fetch(void *self, struct edm_page_ref *refs, uint32_t n, void *into) {
    return fetch_until(self, refs, n, into, now_s() + PATIENCE_S);
}

static int evict(void *self, struct edm_page_ref *refs, uint32_t n, const void *pages) {
    return evict_until(self, refs, n, pages, now_s() + PATIENCE_S);
}

struct edm_conversation *edm_conversation_new(const void *carrier, uint32_t channel, const uint32_t *instance,
                                              void *reply, uint64_t capacity, double resend_s) {
    struct edm_conversation *c = calloc(1, sizeof *c);
    if (c)
        *c = (struct edm_conversation){
            .ops = {EDM_OPS_VERSION, sizeof c->ops, c, fetch, evict},
            .carrier = carrier,
            .instance = instance,
            .reply = reply,
            .capacity = capacity,
            .resend_s = resend_s,
            .channel = channel,
        };
    return c;
}

void edm_conversation_free(struct edm_conversation *c) { free(c); }
const void *edm_conversation_table(const struct edm_conversation *c) { return &c->ops; }

void edm_conversation_out(struct edm_conversation *c, void *frame) {
    c->out = frame;
    c->out_lost = false;
}

bool edm_conversation_lost(const struct edm_conversation *c) { return c->out_lost; }
uint64_t edm_conversation_request(const struct edm_conversation *c) { return c->request; }
uint64_t edm_conversation_length(const struct edm_conversation *c) { return c->length; }
uint64_t edm_conversation_next(struct edm_conversation *c) { return ++c->request; }

int edm_conversation_fetch(struct edm_conversation *c, struct edm_page_ref *refs, uint32_t n, void *into,
                           double deadline) {
    return fetch_until(c, refs, n, into, patient_until(deadline));
}

int edm_conversation_evict(struct edm_conversation *c, struct edm_page_ref *refs, uint32_t n, const void *pages,
                           double deadline) {
    return evict_until(c, refs, n, pages, patient_until(deadline));
}
