// A memory server's ROUTER [6-11], which pyzmq has set up and bound: takes every message, answers gets of stored pages
// through the server's table, and leaves the rest to Python (edm/plugins/transport_zmq/serving.py).
//
// A get needs nothing of what edm/dms/answering.py remembers of a channel: it changes nothing, and the reply to one
// that was overtaken by its repeat is thrown away by who asked.
#include <errno.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "edm_abi.h"
#include "edm_ops.h"
#include "spin.h"
#include "zmq.h"

#define HEADER_BYTES 40u
#define GET 2u /* edm.wire.Kind */
#define PAGES 3u
#define AWAY_S 0.1              // the longest time not to come back to Python while there is work
#define FRAMES 8                // replies on their way that libzmq sends from where they are
#define KEPT_BYTES (16u << 10)  // from this length on it does: a shorter one is copied sooner
#define OWNERS 256              // instances whose client is known here
#define KEY_BYTES (EDM_ZMQ_KEY_CHARACTERS + 1u)

struct frame {
    uint8_t *data;
    atomic_bool taken;  // let go by libzmq's own thread
};

struct owner {
    uint32_t instance;  // 0: nobody's
    char key[KEY_BYTES];
};

struct edm_zmq_serving {
    const struct edm_zmq *zmq;
    void *socket;
    const struct edm_server_ops *server;
    bool keyed;
    int waits_ms;  // what the socket's RCVTIMEO is
    uint8_t *request;
    uint64_t capacity;
    struct frame frames[FRAMES];
    struct owner owners[OWNERS];
    struct edm_zmq_served served;
};

static void let_go(void *data, void *hint) {
    (void)data;
    atomic_store_explicit(&((struct frame *)hint)->taken, false, memory_order_release);
}

static struct frame *free_frame(struct edm_zmq_serving *s) {
    for (uint32_t i = 0; i < FRAMES; i++) {
        struct frame *frame = &s->frames[i];
        if (atomic_load_explicit(&frame->taken, memory_order_acquire))
            continue;
        if (!frame->data)
            frame->data = calloc(1, s->capacity);
        return frame->data ? frame : NULL;
    }
    return NULL;
}

// A part, whatever signals come: half a message must not stay behind.
static int send_part(const struct edm_zmq_serving *s, const void *data, size_t length, int flags) {
    int result;
    do
        result = edm_zmq_send(s->zmq, s->socket, data, length, flags);
    while (result < 0 && errno == EINTR);
    return result < 0 ? -errno : 0;
}

// A client that does not take its replies has them dropped beyond its queue; it asks again.
static int send_reply(struct edm_zmq_serving *s, struct frame *frame, uint64_t length) {
    struct edm_zmq_message message;
    int result = send_part(s, s->served.identity, s->served.identity_bytes, EDM_ZMQ_SNDMORE);
    if (result || length < KEPT_BYTES)
        return result ? result : send_part(s, frame->data, length, 0);
    atomic_store_explicit(&frame->taken, true, memory_order_relaxed);
    if (edm_zmq_msg_init_data(s->zmq, &message, frame->data, length, let_go, frame)) {
        let_go(NULL, frame);
        return -ENOMEM;
    }
    do
        result = edm_zmq_msg_send(s->zmq, &message, s->socket, 0);
    while (result < 0 && errno == EINTR);
    if (result >= 0)
        return 0;
    result = -errno;
    edm_zmq_msg_close(s->zmq, &message);
    return result;
}

static bool may_use(const struct edm_zmq_serving *s, uint32_t instance) {
    const struct owner *owner = &s->owners[instance % OWNERS];
    return !s->keyed || (instance && owner->instance == instance && !strcmp(owner->key, s->served.key));
}

// 1: answered; 0: left to Python, with the request untouched; a negative errno of libzmq's.
static int answer(struct edm_zmq_serving *s) {
    struct edm_wire_head head;
    if (!s->server || edm_wire_open(s->request, s->served.length, s->capacity, &head) || head.kind != GET ||
        !may_use(s, head.instance))
        return 0;
    // All frames on their way: Python waits for none, libzmq copies there.
    struct frame *frame = free_frame(s);
    if (!frame)
        return 0;
    struct edm_page_ref *refs = (struct edm_page_ref *)(frame->data + HEADER_BYTES);
    size_t refs_bytes = head.batch * sizeof *refs;
    memcpy(refs, s->request + HEADER_BYTES, refs_bytes);
    if (s->server->get(s->server->self, head.instance, refs, head.batch, frame->data + HEADER_BYTES + refs_bytes))
        return 0;
    uint32_t found = edm_wire_gather(frame->data, head.batch);
    uint64_t length =
        edm_wire_seal(frame->data, PAGES, head.batch, head.channel, head.instance, head.request, 0, found);
    s->served.gets++;
    s->served.pages_sent += found;
    int result = send_reply(s, frame, length);
    return result ? result : 1;
}

// Who sends, and whether the message behind that is there.
static bool take_identity(struct edm_zmq_serving *s, struct edm_zmq_message *message) {
    struct edm_zmq_served *served = &s->served;
    size_t bytes = edm_zmq_msg_size(s->zmq, message);
    const char *key = s->keyed ? edm_zmq_msg_gets(s->zmq, message, "User-Id") : NULL;
    bool whole = edm_zmq_msg_more(s->zmq, message) && bytes <= sizeof served->identity;
    served->identity_bytes = whole ? (uint32_t)bytes : 0;
    if (whole)
        memcpy(served->identity, edm_zmq_msg_data(s->zmq, message), bytes);
    // A longer one is no key, and Python refuses it as such.
    memset(served->key, 0, sizeof served->key);
    if (key && strlen(key) <= EDM_ZMQ_KEY_CHARACTERS)
        memcpy(served->key, key, strlen(key));
    return whole;
}

// EDM_ZMQ_MESSAGE: one is in `request`; EDM_ZMQ_BUSY: one that is none of EDM's was thrown away; a negative errno,
// -EAGAIN if there is none.
static int receive(struct edm_zmq_serving *s, int flags) {
    struct edm_zmq_message message;
    edm_zmq_msg_init(s->zmq, &message);
    int got = edm_zmq_msg_recv(s->zmq, &message, s->socket, flags);
    int error = errno;
    bool whole = got >= 0 && take_identity(s, &message);
    edm_zmq_msg_close(s->zmq, &message);
    if (got < 0)
        return -error;
    if (whole) {
        // The parts of a message come all or not at all: this does not wait.
        edm_zmq_msg_init(s->zmq, &message);
        got = edm_zmq_msg_recv(s->zmq, &message, s->socket, 0);
        error = errno;
        whole = got > 0 && (uint64_t)got <= s->capacity && !edm_zmq_msg_more(s->zmq, &message);
        if (whole)
            memcpy(s->request, edm_zmq_msg_data(s->zmq, &message), (size_t)got);
        s->served.length = whole ? (uint64_t)got : 0;
        edm_zmq_msg_close(s->zmq, &message);
        if (got < 0)
            return -error;
    }
    if (!whole)
        edm_zmq_drain(s->zmq, s->socket);
    return whole ? EDM_ZMQ_MESSAGE : EDM_ZMQ_BUSY;
}

int edm_zmq_serve(struct edm_zmq_serving *s, int idle_ms) {
    if (idle_ms != s->waits_ms && edm_zmq_wait_ms(s->zmq, s->socket, idle_ms))
        return -errno;
    s->waits_ms = idle_ms;
    double back = 0;
    int nothing = EDM_ZMQ_IDLE;
    for (;;) {
        int result = receive(s, 0);
        if (result == -EAGAIN || result == -EINTR)
            return nothing;
        if (result == EDM_ZMQ_MESSAGE) {
            result = answer(s);
            if (result == 0)
                return EDM_ZMQ_MESSAGE;
        }
        if (result < 0)
            return result;
        double now = edm_now_s();
        if (back == 0)
            back = now + AWAY_S;
        if (now >= back)
            return EDM_ZMQ_BUSY;
        nothing = EDM_ZMQ_BUSY;
    }
}

struct edm_zmq_serving *edm_zmq_serving_new(const struct edm_zmq *zmq, void *socket, const void *server, bool keyed,
                                            void *request, uint64_t capacity) {
    struct edm_zmq_serving *s = calloc(1, sizeof *s);
    if (!s)
        return NULL;
    s->zmq = zmq;
    s->socket = socket;
    s->server = server;
    s->keyed = keyed;
    s->waits_ms = -2;
    s->request = request;
    s->capacity = capacity;
    return s;
}

const struct edm_zmq_served *edm_zmq_served(const struct edm_zmq_serving *s) { return &s->served; }

void edm_zmq_serving_allow(struct edm_zmq_serving *s, uint32_t instance) {
    if (!instance) {
        memset(s->owners, 0, sizeof s->owners);
        return;
    }
    struct owner *owner = &s->owners[instance % OWNERS];
    owner->instance = instance;
    memcpy(owner->key, s->served.key, KEY_BYTES);
}

void edm_zmq_serving_free(struct edm_zmq_serving *s) {
    if (!s)
        return;
    for (uint32_t i = 0; i < FRAMES; i++)
        free(s->frames[i].data);
    free(s);
}
