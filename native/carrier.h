/*
 * What carries the messages of one channel to one memory server, as native/conversation.c calls it. Needs <stdbool.h>,
 * <stdint.h>. One thread at a time, but for what ends a wait in another thread.
 */

/* Where the pages of a reply may be put as they come, if they are all that were asked for. */
struct edm_direct {
    uint64_t request;
    uint32_t pages;
    void *into;
    bool done; /* they are there, and not in the reply buffer */
};

struct edm_carrier {
    void *self;
    /* Send the first `length` bytes of `frame`; `deadline`: seconds of CLOCK_MONOTONIC. 0; -ETIMEDOUT: not sent, and
       `frame` may be used again; -EBUSY: not sent in time, and `frame` belongs to the carrier from now on; another
       negative errno: the server is lost. */
    int (*send)(void *self, const void *frame, uint64_t length, double deadline);
    /* Receive one message into the reply buffer: its length, 0 if none came until `until`, or a negative errno. A
       carrier that can may put its pages where `direct` says (NULL: nowhere); what stands before them is not checked by
       then. */
    int64_t (*receive)(void *self, double until, struct edm_direct *direct);
};
