// A memory server's rank [6-11]: takes every message, answers gets of stored pages through the server's table, and
// leaves the rest to Python (edm/plugins/transport_mpi/serving.py).
//
// A get needs nothing of what edm/dms/answering.py remembers of a channel: it changes nothing, MPI repeats none, and
// what may be stale is looked at where it is carried out.
#include <errno.h>
#include <sched.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "edm_abi.h"
#include "edm_ops.h"
#include "mpi.h"

#define HEADER_BYTES 40u
#define PAGE_BYTES 4096u
#define GET 2u /* edm.wire.Kind */
#define PAGES 3u
#define MAX_UNSENT 16     // replies that nobody has taken yet; beyond that no new request is
#define SEND_TESTS 200    // of a reply on its way, before turning to other requests
#define KEEP_CPU_S 30e-6  // of a spin, how long not to offer the CPU
#define AWAY_S 0.1        // the longest time not to come back to Python while there is work

struct reply {
    union edm_mpi_handle request;
    uint8_t *frame;
};

struct edm_mpi_serving {
    const struct edm_mpi *mpi;
    const struct edm_server_ops *server;
    union edm_mpi_handle receiving;
    uint8_t *request, *reply;
    uint64_t capacity;
    double spin_s, busy_until;
    bool made, posted;
    uint32_t unsent_count, spare_count;
    struct reply unsent[MAX_UNSENT];
    uint8_t *spare[MAX_UNSENT];
    struct edm_mpi_served served;
};

static double now_s(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

static int failed(struct edm_mpi_serving *s, int error) {
    s->served.error = error;
    return -EIO;
}

// Whether there is room for one more reply that is not taken.
static int room(struct edm_mpi_serving *s) {
    struct edm_mpi_status status;
    uint32_t kept = 0;
    int error = 0;
    for (uint32_t i = 0; i < s->unsent_count; i++) {
        int done = 0;
        error = error ? error : edm_mpi_test(s->mpi, &s->unsent[i].request, &done, &status);
        if (done)
            s->spare[s->spare_count++] = s->unsent[i].frame;
        else
            s->unsent[kept++] = s->unsent[i];
    }
    s->unsent_count = kept;
    return error ? failed(s, error) : kept < MAX_UNSENT;
}

static int send_reply(struct edm_mpi_serving *s, uint64_t length, int rank, int tag) {
    union edm_mpi_handle request;
    struct edm_mpi_status status;
    int error = edm_mpi_isend(s->mpi, s->reply, (int)length, rank, tag, &request);
    for (int i = 0; !error && i < SEND_TESTS; i++) {
        int done = 0;
        error = edm_mpi_test(s->mpi, &request, &done, &status);
        if (done)
            return error ? failed(s, error) : 0;
    }
    if (error)
        return failed(s, error);
    // A large reply goes when its DM-Handler next polls; the others need not wait for that.
    s->unsent[s->unsent_count++] = (struct reply){request, s->reply};
    s->reply = s->spare_count ? s->spare[--s->spare_count] : calloc(1, s->capacity);
    return s->reply ? 0 : -ENOMEM;
}

// 1: answered; 0: left to Python, with the request untouched; -EIO, -ENOMEM.
static int answer(struct edm_mpi_serving *s, int length, int rank, int tag) {
    struct edm_wire_head head;
    if (!s->server || edm_wire_open(s->request, (uint64_t)length, s->capacity, &head) || head.kind != GET)
        return 0;
    struct edm_page_ref *refs = (struct edm_page_ref *)(s->reply + HEADER_BYTES);
    size_t refs_bytes = head.batch * sizeof *refs;
    memcpy(refs, s->request + HEADER_BYTES, refs_bytes);
    if (s->server->get(s->server->self, head.instance, refs, head.batch, s->reply + HEADER_BYTES + refs_bytes))
        return 0;
    uint32_t found = edm_wire_gather(s->reply, head.batch);
    uint64_t sealed = edm_wire_seal(s->reply, PAGES, head.batch, head.channel, head.instance, head.request, 0, found);
    s->served.gets++;
    s->served.pages_sent += found;
    int result = send_reply(s, sealed, rank, tag);
    return result ? result : 1;
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

int edm_mpi_serve(struct edm_mpi_serving *s, uint32_t tests) {
    double now = now_s(), back = now + AWAY_S;
    for (;;) {
        int result = s->unsent_count ? room(s) : 1;
        if (result == 1)
            result = burst(s, tests);
        if (result < 0)
            return result;
        now = now_s();
        if (result == 1) {
            s->busy_until = now + s->spin_s;
            result = answer(s, s->served.length, s->served.rank, s->served.tag);
            if (result < 0)
                return result;
            if (result == 0)
                return EDM_MPI_MESSAGE;
            if (now >= back)
                return EDM_MPI_BUSY;
            continue;
        }
        if (now >= s->busy_until)
            return EDM_MPI_IDLE;
        if (s->busy_until - now < s->spin_s - KEEP_CPU_S)
            sched_yield();
    }
}

struct edm_mpi_serving *edm_mpi_serving_new(const struct edm_mpi *mpi, const void *server, void *request,
                                            uint64_t capacity, double spin_s, int any_rank, int any_tag) {
    struct edm_mpi_serving *s = calloc(1, sizeof *s);
    if (!s)
        return NULL;
    s->mpi = mpi;
    s->server = server;
    s->request = request;
    s->capacity = capacity;
    s->spin_s = spin_s;
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
