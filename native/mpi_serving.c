// A memory server's rank [6-11]: takes every message, answers gets of stored pages and ordinary evictions through the
// server's table, and leaves the rest to Python (edm/plugins/transport_mpi/serving.py).
//
// Neither needs what edm/dms/answering.py remembers of a channel. That is for requests which their own repeat has
// overtaken, and MPI keeps the order of what one rank sends another: a repeat comes behind the request and before any
// later one, and the server's table leaves repeated evictions to Python.
#include <errno.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "edm_abi.h"
#include "edm_ops.h"
#include "mpi.h"
#include "spin.h"

#define HEADER_BYTES 40u
#define PAGE_BYTES 4096u
#define GET 2u /* edm.wire.Kind */
#define PAGES 3u
#define EVICT 4u
#define ACK 5u
#define MAX_UNSENT 16   // replies that nobody has taken yet; beyond that no new request is
#define SEND_TESTS 200  // of a reply on its way, before turning to other requests
#define BURST 20        // tests between two looks at the clock
#define IDLE_TESTS 2    // … of a server that has been idle for a while: most of them find nothing
#define GROWTH 1.05     // from one sleep to the next: 50 µs becomes 1.5 ms in about 50 ms
#define AWAY_S 0.1      // the longest time not to come back to Python while there is work

#define SHARED 32  // requests in a row from this very CPU before moving aside
#define MOVE_EVERY_S 20e-3

struct reply {
    union edm_mpi_handle requests[2];  // what stands before the pages, and they
    uint32_t parts;
    uint8_t *frame;
};

struct edm_mpi_serving {
    const struct edm_mpi *mpi;
    const struct edm_server_ops *server;
    union edm_mpi_handle receiving;
    uint8_t *request, *reply;
    uint64_t capacity;
    struct edm_mpi_waits waits;
    double pause_s;  // the next sleep
    double busy_until, moved_at;
    struct edm_spin spin;
    bool made, posted;
    uint32_t unsent_count, spare_count;
    struct reply unsent[MAX_UNSENT];
    uint8_t *spare[MAX_UNSENT];
    struct edm_mpi_served served;
};

static int failed(struct edm_mpi_serving *s, int error) {
    s->served.error = error;
    return -EIO;
}

// A DM-Handler that waits on this CPU has the app beside it, and stays: go to another one, if there is one. The
// scheduler sees two that always yield and leaves them where they are.
static void move_aside(struct edm_mpi_serving *s, double now) {
    cpu_set_t allowed, others;
    int here = sched_getcpu();
    s->spin.shared = 0;
    s->moved_at = now;
    if (here < 0 || sched_getaffinity(0, sizeof allowed, &allowed))
        return;
    others = allowed;
    CPU_CLR(here, &others);
    if (CPU_COUNT(&others) && !sched_setaffinity(0, sizeof others, &others))
        sched_setaffinity(0, sizeof allowed, &allowed);
}

// Whether a reply is on its way no more: 1, 0, or -EIO.
static int gone(struct edm_mpi_serving *s, struct reply *reply) {
    struct edm_mpi_status status;
    while (reply->parts) {
        int done = 0, error = edm_mpi_test(s->mpi, &reply->requests[reply->parts - 1], &done, &status);
        if (error)
            return failed(s, error);
        if (!done)
            return 0;
        reply->parts--;
    }
    return 1;
}

// Whether there is room for one more reply that is not taken: 1, 0, or -EIO.
static int room(struct edm_mpi_serving *s) {
    uint32_t kept = 0;
    int result = 0;
    for (uint32_t i = 0; i < s->unsent_count; i++) {
        result = result < 0 ? result : gone(s, &s->unsent[i]);
        if (result == 1)
            s->spare[s->spare_count++] = s->unsent[i].frame;
        else
            s->unsent[kept++] = s->unsent[i];
    }
    s->unsent_count = kept;
    return result < 0 ? result : kept < MAX_UNSENT;
}

// The first `before` bytes of a reply, and the rest behind them in a message of its own if there is one.
static int send_reply(struct edm_mpi_serving *s, uint64_t length, uint64_t before, int rank, int tag) {
    struct reply reply = {.frame = s->reply, .parts = length > before ? 2 : 1};
    int error = edm_mpi_isend(s->mpi, s->reply, (int)before, rank, tag, &reply.requests[0]);
    if (!error && reply.parts == 2)
        error = edm_mpi_isend(s->mpi, s->reply + before, (int)(length - before), rank, tag + EDM_MPI_PAGES_TAG,
                              &reply.requests[1]);
    if (error)
        return failed(s, error);
    for (int i = 0; i < SEND_TESTS; i++) {
        int result = gone(s, &reply);
        if (result)
            return result < 0 ? result : 0;
    }
    // A large reply goes when its DM-Handler next polls; the others need not wait for that.
    s->unsent[s->unsent_count++] = reply;
    s->reply = s->spare_count ? s->spare[--s->spare_count] : calloc(1, s->capacity);
    return s->reply ? 0 : -ENOMEM;
}

// What follows answers one kind of request. 1: answered; 0: left to Python, with the request untouched; -EIO, -ENOMEM.

static int answer_get(struct edm_mpi_serving *s, const struct edm_wire_head *head, int rank, int tag) {
    struct edm_page_ref *refs = (struct edm_page_ref *)(s->reply + HEADER_BYTES);
    size_t refs_bytes = head->batch * sizeof *refs;
    memcpy(refs, s->request + HEADER_BYTES, refs_bytes);
    if (s->server->get(s->server->self, head->instance, refs, head->batch, s->reply + HEADER_BYTES + refs_bytes))
        return 0;
    uint32_t found = edm_wire_gather(s->reply, head->batch);
    uint64_t sealed =
        edm_wire_seal(s->reply, PAGES, head->batch, head->channel, head->instance, head->request, 0, found);
    s->served.gets++;
    s->served.pages_sent += found;
    // Pages that are all there can go to where they belong: the DM-Handler knows where, once it has seen the rest.
    bool split = found == head->batch && found >= EDM_MPI_SPLIT_PAGES;
    int result = send_reply(s, sealed, split ? HEADER_BYTES + refs_bytes : sealed, rank, tag);
    return result ? result : 1;
}

static int answer_evict(struct edm_mpi_serving *s, const struct edm_wire_head *head, int rank, int tag) {
    struct edm_page_ref *refs = (struct edm_page_ref *)(s->reply + HEADER_BYTES);
    size_t refs_bytes = head->batch * sizeof *refs;
    memcpy(refs, s->request + HEADER_BYTES, refs_bytes);
    if (s->server->evict(s->server->self, head->instance, refs, head->batch, s->request + HEADER_BYTES + refs_bytes))
        return 0;
    uint64_t sealed = edm_wire_seal(s->reply, ACK, head->batch, head->channel, head->instance, head->request, 0, 0);
    s->served.evicts++;
    s->served.pages_received += head->batch;
    int result = send_reply(s, sealed, sealed, rank, tag);
    return result ? result : 1;
}

static int answer(struct edm_mpi_serving *s, int length, int rank, int tag) {
    struct edm_wire_head head;
    if (!s->server || edm_wire_open(s->request, (uint64_t)length, s->capacity, &head))
        return 0;
    if (head.kind == GET)
        return answer_get(s, &head, rank, tag);
    return head.kind == EVICT ? answer_evict(s, &head, rank, tag) : 0;
}

// One burst of tests: 1: a message is there and `served` tells of it; 0: none; -EIO.
static int burst(struct edm_mpi_serving *s, uint32_t tests) {
    struct edm_mpi_status status;
    int error;
    if (!s->posted && (error = edm_mpi_start(s->mpi, &s->receiving)))
        return failed(s, error);
    s->posted = true;
    for (uint32_t i = 0; i < tests; i++) {
        int done = 0;
        error = edm_mpi_test(s->mpi, &s->receiving, &done, &status);
        if (error || done)
            s->posted = false;
        if (!error && done)
            error = edm_mpi_count(s->mpi, &status, &s->served.length);
        if (error)
            return failed(s, error);
        if (done) {
            s->served.rank = edm_mpi_field(&status, s->mpi->source_at);
            s->served.tag = edm_mpi_field(&status, s->mpi->tag_at);
            return 1;
        }
    }
    return 0;
}

static int serve(struct edm_mpi_serving *s, uint32_t tests) {
    double now = edm_now_s(), back = now + AWAY_S;
    int nothing = EDM_MPI_IDLE;
    for (;;) {
        int result = s->unsent_count ? room(s) : 1;
        if (result == 1)
            result = burst(s, tests);
        if (result < 0)
            return result;
        edm_spin_found(&s->spin, result == 1);
        now = edm_now_s();
        if (result == 1) {
            s->busy_until = now + s->waits.spin_s;
            if (s->spin.shared >= SHARED && now > s->moved_at + MOVE_EVERY_S)
                move_aside(s, now);
            result = answer(s, s->served.length, s->served.rank, s->served.tag);
            if (result < 0)
                return result;
            if (result == 0)
                return EDM_MPI_MESSAGE;
            nothing = EDM_MPI_BUSY;
            if (now >= back)
                return EDM_MPI_BUSY;
            continue;
        }
        if (now >= s->busy_until)
            return nothing;
        if (s->busy_until - now <= s->waits.spin_s - s->spin.keep_s)
            edm_spin_yield(&s->spin);
    }
}

int edm_mpi_serve(struct edm_mpi_serving *s, double idle_s) {
    double end = edm_now_s() + idle_s;
    for (;;) {
        int result = serve(s, s->pause_s == s->waits.sleep_s ? BURST : IDLE_TESTS);
        if (result != EDM_MPI_IDLE)
            s->pause_s = s->waits.sleep_s;
        if (result != EDM_MPI_IDLE || edm_now_s() >= end)
            return result;
        struct timespec pause = {0, (long)(s->pause_s * 1e9)};
        nanosleep(&pause, NULL);
        s->pause_s = s->pause_s * GROWTH < s->waits.sleep_max_s ? s->pause_s * GROWTH : s->waits.sleep_max_s;
    }
}

struct edm_mpi_serving *edm_mpi_serving_new(const struct edm_mpi *mpi, const void *server, void *request,
                                            uint64_t capacity, const struct edm_mpi_waits *waits, int any_rank,
                                            int any_tag) {
    struct edm_mpi_serving *s = calloc(1, sizeof *s);
    if (!s)
        return NULL;
    s->mpi = mpi;
    s->server = server;
    s->request = request;
    s->capacity = capacity;
    s->waits = *waits;
    s->pause_s = waits->sleep_s;
    s->spin.keep_s = s->spin.most_s = waits->keep_s;
    s->reply = calloc(1, capacity);
    s->served.error = s->reply ? edm_mpi_recv_init(mpi, request, (int)capacity, any_rank, any_tag, &s->receiving) : 0;
    s->made = s->reply && !s->served.error;
    return s;
}

const struct edm_mpi_served *edm_mpi_served(const struct edm_mpi_serving *s) { return &s->served; }
uint32_t edm_mpi_serving_unsent(struct edm_mpi_serving *s) {
    room(s);
    return s->unsent_count;
}

void edm_mpi_serving_posted(struct edm_mpi_serving *s) { s->posted = true; }

void edm_mpi_serving_stop(struct edm_mpi_serving *s) {
    if (s->posted)
        edm_mpi_take_back(s->mpi, &s->receiving);
    if (s->made)
        edm_mpi_free(s->mpi, &s->receiving);
    s->posted = s->made = false;
}

void edm_mpi_serving_free(struct edm_mpi_serving *s) {
    if (!s)
        return;
    // Replies that were never taken stay: the library may still read them.
    while (s->spare_count)
        free(s->spare[--s->spare_count]);
    free(s->reply);
    free(s);
}
