// A channel's requests from C: answers that are late, doubled, broken, refused or about other pages, and carriers that
// lose messages or keep the buffer.
#include <errno.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "carrier.h"
#include "check.h"
#include "spin.h"

#define PAGE 4096u
#define BATCH 3u
#define FRAME (40 + 1024 * (32 + PAGE))

static uint8_t out[FRAME], reply[FRAME], other[FRAME];

// A server in the carrier: `script` says for each receive what comes.
enum { ANSWER = 'a', LATE = 'l', BROKEN = 'b', REFUSED = 'r', NOTHING = 'n', STRANGE = 's', LOST = 'x' };
static const char *script;
static int sends, send_result;
static struct edm_wire_head asked;

static int carrier_send(void *self, const void *frame, uint64_t length, double deadline) {
    (void)self, (void)deadline;
    sends++;
    CHECK(length <= FRAME);
    memcpy(other, frame, length);
    CHECK(edm_wire_open(other, length, FRAME, &asked) == EDM_WIRE_OK);
    return send_result;
}

static int64_t answer(uint64_t request) {
    struct edm_page_ref *refs = (struct edm_page_ref *)(reply + 40);
    memcpy(refs, other + 40, asked.batch * sizeof *refs);
    for (uint32_t i = 0; i < asked.batch; i++)
        refs[i].status = asked.kind == 2;
    if (asked.kind == 4)
        return (int64_t)edm_wire_seal(reply, 5, asked.batch, asked.channel, asked.instance, request, 0, 0);
    refs[1].status = 0;  // a new page between existing ones
    uint8_t *pages = reply + 40 + asked.batch * sizeof *refs;
    memset(pages, 0x11, PAGE);
    memset(pages + PAGE, 0x33, PAGE);
    return (int64_t)edm_wire_seal(reply, 3, asked.batch, asked.channel, asked.instance, request, 0, asked.batch - 1);
}

static int64_t carrier_receive(void *self, double until, struct edm_direct *direct) {
    (void)self, (void)until, (void)direct;
    int64_t length;
    switch (*script++) {
    case ANSWER:
        return answer(asked.request);
    case LATE:
        return answer(asked.request - 1);
    case BROKEN:
        length = answer(asked.request);
        reply[50] ^= 1;
        return length;
    case STRANGE:
        length = answer(asked.request);
        ((struct edm_page_ref *)(reply + 40))[0].index++;
        return (int64_t)edm_wire_seal(reply, 3, asked.batch, asked.channel, 0, asked.request, 0, asked.batch - 1);
    case REFUSED:
        return (int64_t)edm_wire_seal(reply, 11, 0, asked.channel, 0, asked.request, 0, 0);
    case LOST:
        return -EIO;
    default:
        return 0;
    }
}

static const struct edm_carrier carrier = {NULL, carrier_send, carrier_receive};
static const uint32_t instance = 7;

static struct edm_conversation *meet(const char *what_comes, double resend_s) {
    struct edm_conversation *c = edm_conversation_new(&carrier, 5, &instance, reply, FRAME, resend_s);
    CHECK(c);
    edm_conversation_out(c, out);
    script = what_comes;
    sends = send_result = 0;
    return c;
}

static void fill(struct edm_page_ref *refs, uint8_t *into) {
    memset(refs, 0, BATCH * sizeof *refs);
    for (uint32_t i = 0; i < BATCH; i++)
        refs[i] = (struct edm_page_ref){.region = 9, .index = i};
    memset(into, 0x5a, (size_t)BATCH * PAGE);
}

static double later(void) { return edm_now_s() + 1; }

// One fetch with that script; whether pages came, or the buffers were left alone.
static int fetch(const char *what_comes, double resend_s) {
    static uint8_t into[BATCH * PAGE];
    struct edm_page_ref refs[BATCH];
    struct edm_conversation *c = meet(what_comes, resend_s);
    fill(refs, into);
    int result = edm_conversation_fetch(c, refs, BATCH, into, edm_now_s() + 0.05);
    CHECK(into[0] == (result ? 0x5a : 0x11) && into[PAGE] == 0x5a && into[2 * PAGE] == (result ? 0x5a : 0x33));
    CHECK(refs[0].status == !result && refs[1].status == 0 && refs[2].status == !result);
    edm_conversation_free(c);
    return result;
}

static void test_replies(void) {
    CHECK(fetch("a", 0) == 0);
    CHECK(fetch("lla", 0) == 0 && sends == 1);
    CHECK(fetch("b", 0) == -EBADMSG);
    CHECK(fetch("r", 0) == -EPROTO);
    CHECK(fetch("s", 0) == -EPROTO);
    CHECK(fetch("x", 0) == -EIO);
    CHECK(fetch("nna", 1e-9) == 0 && sends == 3);
}

static void test_nothing_comes(void) {
    static char nothing[1 << 20];
    memset(nothing, NOTHING, sizeof nothing - 1);
    struct edm_page_ref refs[BATCH];
    static uint8_t into[BATCH * PAGE];
    struct edm_conversation *c = meet(nothing, 0);
    fill(refs, into);
    CHECK(edm_conversation_fetch(c, refs, BATCH, into, edm_now_s()) == -ETIMEDOUT && sends == 1);
    // Its answer comes after all, before that to the next.
    script = "la";
    CHECK(edm_conversation_fetch(c, refs, BATCH, into, later()) == 0 && into[0] == 0x11);
    edm_conversation_free(c);
}

static void test_a_buffer_that_is_kept_is_not_used_again(void) {
    struct edm_page_ref refs[BATCH];
    static uint8_t into[BATCH * PAGE], fresh[FRAME];
    struct edm_conversation *c = meet("a", 0);
    fill(refs, into);
    send_result = -EBUSY;
    CHECK(edm_conversation_fetch(c, refs, BATCH, into, later()) == -EBUSY && edm_conversation_lost(c));
    send_result = 0;
    CHECK(edm_conversation_fetch(c, refs, BATCH, into, later()) == -EINVAL && sends == 1);
    edm_conversation_out(c, fresh);
    CHECK(!edm_conversation_lost(c) && edm_conversation_fetch(c, refs, BATCH, into, later()) == 0 && sends == 2);
    edm_conversation_free(c);
}

static void test_evict(void) {
    struct edm_page_ref refs[BATCH];
    static uint8_t pages[BATCH * PAGE];
    struct edm_conversation *c = meet("aa", 0);
    fill(refs, pages);
    for (uint32_t i = 0; i < BATCH; i++)
        refs[i].status = 1;
    uint64_t before = edm_conversation_next(c);
    CHECK(edm_conversation_evict(c, refs, BATCH, pages, later()) == 0 && asked.request == before + 1);
    CHECK(refs[0].status == 0 && refs[2].status == 0 && asked.pages == BATCH && asked.instance == instance);
    CHECK(!memcmp(other + 40 + BATCH * sizeof *refs, pages, sizeof pages));
    const struct edm_channel_ops *ops = edm_conversation_table(c);
    CHECK(ops->version == EDM_OPS_VERSION && ops->bytes == sizeof *ops);
    CHECK(ops->evict(ops->self, refs, BATCH, pages) == 0 && asked.request == before + 2);
    CHECK(edm_conversation_evict(c, refs, 0, pages, later()) == -EINVAL);
    CHECK(edm_conversation_evict(c, refs, 1025, pages, later()) == -EINVAL);
    edm_conversation_free(c);
}

int main(void) {
    test_replies();
    test_nothing_comes();
    test_a_buffer_that_is_kept_is_not_used_again();
    test_evict();
    return 0;
}
