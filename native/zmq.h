/*
 * libzmq as it was found at run time (edm.plugins.transport_zmq.library): EDM is built against none. These prototypes
 * and numbers are those of libzmq 4; its ABI has not changed since 4.0. Source: zmq.h, RFC 37.
 *
 * Needs <stddef.h>, <stdint.h> and edm_abi.h before it.
 */
#pragma once

#define EDM_ZMQ_RCVMORE 13
#define EDM_ZMQ_RCVTIMEO 27
#define EDM_ZMQ_DONTWAIT 1
#define EDM_ZMQ_SNDMORE 2
#define EDM_ZMQ_POLLOUT 2

struct edm_zmq_message { /* zmq_msg_t */
    void *alignment[0];
    uint8_t bytes[64];
};

struct edm_zmq_poll { /* zmq_pollitem_t */
    void *socket;
    int fd;
    short events, revents;
};

static inline void edm_zmq_msg_init(const struct edm_zmq *z, struct edm_zmq_message *m) {
    ((int (*)(void *))z->msg_init)(m);
}

static inline int edm_zmq_msg_init_data(const struct edm_zmq *z, struct edm_zmq_message *m, void *data, size_t length,
                                        void (*released)(void *, void *), void *hint) {
    return ((int (*)(void *, void *, size_t, void (*)(void *, void *), void *))z->msg_init_data)(m, data, length,
                                                                                                 released, hint);
}

static inline int edm_zmq_msg_recv(const struct edm_zmq *z, struct edm_zmq_message *m, void *socket, int flags) {
    return ((int (*)(void *, void *, int))z->msg_recv)(m, socket, flags);
}

static inline int edm_zmq_msg_send(const struct edm_zmq *z, struct edm_zmq_message *m, void *socket, int flags) {
    return ((int (*)(void *, void *, int))z->msg_send)(m, socket, flags);
}

static inline size_t edm_zmq_msg_size(const struct edm_zmq *z, const struct edm_zmq_message *m) {
    return ((size_t (*)(const void *))z->msg_size)(m);
}

static inline void *edm_zmq_msg_data(const struct edm_zmq *z, struct edm_zmq_message *m) {
    return ((void *(*)(void *))z->msg_data)(m);
}

static inline int edm_zmq_msg_more(const struct edm_zmq *z, const struct edm_zmq_message *m) {
    return ((int (*)(const void *))z->msg_more)(m);
}

static inline const char *edm_zmq_msg_gets(const struct edm_zmq *z, const struct edm_zmq_message *m, const char *name) {
    return ((const char *(*)(const void *, const char *))z->msg_gets)(m, name);
}

static inline void edm_zmq_msg_close(const struct edm_zmq *z, struct edm_zmq_message *m) {
    ((int (*)(void *))z->msg_close)(m);
}

static inline int edm_zmq_send(const struct edm_zmq *z, void *socket, const void *data, size_t length, int flags) {
    return ((int (*)(void *, const void *, size_t, int))z->send)(socket, data, length, flags);
}

static inline int edm_zmq_recv(const struct edm_zmq *z, void *socket, void *data, size_t capacity, int flags) {
    return ((int (*)(void *, void *, size_t, int))z->recv)(socket, data, capacity, flags);
}

static inline int edm_zmq_poll(const struct edm_zmq *z, struct edm_zmq_poll *items, int count, long timeout_ms) {
    return ((int (*)(void *, int, long))z->poll)(items, count, timeout_ms);
}

static inline int edm_zmq_wait_ms(const struct edm_zmq *z, void *socket, int milliseconds) {
    return ((int (*)(void *, int, const void *, size_t))z->setsockopt)(socket, EDM_ZMQ_RCVTIMEO, &milliseconds,
                                                                       sizeof milliseconds);
}

/* Receive and throw away the parts that follow. */
static inline void edm_zmq_drain(const struct edm_zmq *z, void *socket) {
    int more = 1;
    size_t bytes = sizeof more;
    char nothing;
    while (!((int (*)(void *, int, void *, size_t *))z->getsockopt)(socket, EDM_ZMQ_RCVMORE, &more, &bytes) && more)
        if (edm_zmq_recv(z, socket, &nothing, 0, 0) < 0)
            return;
}
