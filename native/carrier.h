/*
 * What carries the messages of one channel to one memory server, as native/conversation.c calls it. Needs <stdint.h>.
 * One thread at a time, but for what ends a wait in another thread.
 */

struct edm_carrier {
    void *self;
    /* Send the first `length` bytes of `frame`; `deadline`: seconds of CLOCK_MONOTONIC. 0; -ETIMEDOUT: not sent, and
       `frame` may be used again; -EBUSY: not sent in time, and `frame` belongs to the carrier from now on; another
       negative errno: the server is lost. */
    int (*send)(void *self, const void *frame, uint64_t length, double deadline);
    /* Receive one message into the reply buffer: its length, 0 if none came until `until`, or a negative errno. */
    int64_t (*receive)(void *self, double until);
};
