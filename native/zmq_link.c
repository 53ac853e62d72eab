// A DM-Handler's messages to and from one memory server, over a DEALER that pyzmq has set up and connected [5, 11].
#include <errno.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "carrier.h"
#include "edm_abi.h"
#include "spin.h"
#include "zmq.h"

#define HEADER_BYTES 40u
#define REQUEST_AT 16u /* docs/protocol.md */
#define PAGE_BYTES 4096u
#define SLICE_MS 100  // longest wait in libzmq before looking whether the link was closed

struct edm_zmq_link {
    struct edm_carrier carrier;
    const struct edm_zmq *zmq;
    void *socket;
    pthread_mutex_t using;  // a socket is not for two threads, and closing may come from another
    atomic_bool closed;
    int waits_ms;  // what the socket's RCVTIMEO is
    uint8_t *reply;
    uint64_t capacity;
};

// Milliseconds until then, no more than a slice, and rounded up: 0 only when the time has come.
static int slice(double until) {
    double left = (until - edm_now_s()) * 1e3;
    return left <= 0 ? 0 : left >= SLICE_MS ? SLICE_MS : (int)left + 1;
}

static int send_locked(struct edm_zmq_link *l, const void *frame, uint64_t length, double deadline) {
    while (!l->closed) {
        if (edm_zmq_send(l->zmq, l->socket, frame, length, EDM_ZMQ_DONTWAIT) >= 0)
            return 0;
        if (errno != EAGAIN)
            return -errno;
        // No connection, or its queue is full: libzmq makes a new one by itself.
        struct edm_zmq_poll item = {l->socket, 0, EDM_ZMQ_POLLOUT, 0};
        int left = slice(deadline);
        if (!left)
            return -ETIMEDOUT;
        if (edm_zmq_poll(l->zmq, &item, 1, left) < 0)
            return -errno;
    }
    return -ESHUTDOWN;
}

static int send(void *self, const void *frame, uint64_t length, double deadline) {
    struct edm_zmq_link *l = self;
    pthread_mutex_lock(&l->using);
    int result = send_locked(l, frame, length, deadline);
    pthread_mutex_unlock(&l->using);
    return result;
}

// Whether all that the caller asked for is in the message, and nothing else but references: then one copy is enough.
static bool fits(const struct edm_direct *direct, const uint8_t *data, uint64_t length) {
    uint64_t request;
    if (!direct || !direct->into)
        return false;
    uint64_t before = HEADER_BYTES + (uint64_t)direct->pages * sizeof(struct edm_page_ref);
    if (length != before + (uint64_t)direct->pages * PAGE_BYTES)
        return false;
    memcpy(&request, data + REQUEST_AT, sizeof request);
    return request == direct->request;
}

static int64_t take(struct edm_zmq_link *l, struct edm_zmq_message *message, struct edm_direct *direct) {
    const uint8_t *data = edm_zmq_msg_data(l->zmq, message);
    uint64_t length = edm_zmq_msg_size(l->zmq, message);
    if (length > l->capacity || edm_zmq_msg_more(l->zmq, message)) {
        edm_zmq_drain(l->zmq, l->socket);
        return -EMSGSIZE;
    }
    uint64_t before = length;
    if (fits(direct, data, length)) {
        uint64_t pages = (uint64_t)direct->pages * PAGE_BYTES;
        before -= pages;
        memcpy(direct->into, data + before, pages);
        direct->done = true;
    }
    memcpy(l->reply, data, before);
    // Of nothing at all: "none came" is what 0 says. One byte is refused as too short.
    return length ? (int64_t)length : 1;
}

static int64_t receive_locked(struct edm_zmq_link *l, double until, struct edm_direct *direct) {
    struct edm_zmq_message message;
    while (!l->closed) {
        int left = slice(until);
        if (left != l->waits_ms && edm_zmq_wait_ms(l->zmq, l->socket, left))
            return -errno;
        l->waits_ms = left;
        edm_zmq_msg_init(l->zmq, &message);
        int got = edm_zmq_msg_recv(l->zmq, &message, l->socket, 0);
        int error = errno;
        int64_t result = got < 0 ? -error : take(l, &message, direct);
        edm_zmq_msg_close(l->zmq, &message);
        if (result != -EAGAIN)
            return result;
        if (!left)
            return 0;
    }
    return -ESHUTDOWN;
}

static int64_t receive(void *self, double until, struct edm_direct *direct) {
    struct edm_zmq_link *l = self;
    pthread_mutex_lock(&l->using);
    int64_t result = receive_locked(l, until, direct);
    pthread_mutex_unlock(&l->using);
    return result;
}

struct edm_zmq_link *edm_zmq_link_new(const struct edm_zmq *zmq, void *socket, void *reply, uint64_t capacity) {
    struct edm_zmq_link *l = calloc(1, sizeof *l);
    if (!l)
        return NULL;
    l->carrier = (struct edm_carrier){l, send, receive};
    l->zmq = zmq;
    l->socket = socket;
    l->waits_ms = -1;
    l->reply = reply;
    l->capacity = capacity;
    pthread_mutex_init(&l->using, NULL);
    return l;
}

const void *edm_zmq_link_carrier(const struct edm_zmq_link *l) { return &l->carrier; }
int edm_zmq_link_send(struct edm_zmq_link *l, const void *frame, uint64_t length, double deadline) {
    return send(l, frame, length, deadline);
}
int64_t edm_zmq_link_receive(struct edm_zmq_link *l, double until) { return receive(l, until, NULL); }

void edm_zmq_link_close(struct edm_zmq_link *l) {
    l->closed = true;
    pthread_mutex_lock(&l->using);
    pthread_mutex_unlock(&l->using);
}

void edm_zmq_link_free(struct edm_zmq_link *l) {
    if (l)
        pthread_mutex_destroy(&l->using);
    free(l);
}
