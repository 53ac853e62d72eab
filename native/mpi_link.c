// A DM-Handler's messages to and from one memory server's rank, under one tag [5, 11].
//
// MPI has no wait with a deadline, and a blocking receive burns a core: requests are tested, in a spin at first and
// with sleeps between after that.
#include <errno.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <time.h>

#include "carrier.h"
#include "edm_abi.h"
#include "mpi.h"
#include "spin.h"

#define BURST 20  // tests between two looks at the clock
#define PAUSE_GROWTH 1.5
#define MAX_UNSENT 2  // messages a server has not taken before the link says that it is lost

#define PAGE_BYTES 4096u
#define REST_S 1.0     // pages follow at once what stands before them: wait so long at least
#define GIVE_UP_S 1.0  // for a receive that was taken back

struct edm_mpi_link {
    struct edm_carrier carrier;
    const struct edm_mpi *mpi;
    struct edm_mpi_waits waits;
    struct edm_spin spin;
    pthread_mutex_t using;           // held while MPI is called, so that closing takes nothing away from under it
    atomic_bool closed;              // ends a wait in another thread
    union edm_mpi_handle receiving;  // made once and started for each reply
    union edm_mpi_handle unsent[MAX_UNSENT];
    uint32_t unsent_count;
    uint32_t owed;  // messages of pages that did not come in time, and come before any other
    bool made, posted, lost;
    uint8_t *reply;
    uint64_t capacity;
    int rank, tag, error;
};

static void sleep_s(double seconds) {
    struct timespec t = {(time_t)seconds, (long)((seconds - (double)(time_t)seconds) * 1e9)};
    nanosleep(&t, NULL);
}

static int failed(struct edm_mpi_link *l, int error) {
    l->error = error;
    return -EIO;
}

// 1: complete; 0: not before `until`; -ESHUTDOWN: closed meanwhile; -EIO.
static int wait_for(struct edm_mpi_link *l, union edm_mpi_handle *request, struct edm_mpi_status *status,
                    double until) {
    double began = 0, pause = l->waits.sleep_s;
    for (;;) {
        for (int i = 0; i < BURST; i++) {
            int done = 0, error = edm_mpi_test(l->mpi, request, &done, status);
            if (error)
                return failed(l, error);
            if (done) {
                edm_spin_found(&l->spin, true);
                return 1;
            }
        }
        edm_spin_found(&l->spin, false);
        if (l->closed)
            return -ESHUTDOWN;
        double now = edm_now_s();
        if (now >= until)
            return 0;
        if (began == 0)
            began = now;
        if (now - began >= l->waits.spin_s) {
            sleep_s(pause < until - now ? pause : until - now);
            pause = pause * PAUSE_GROWTH < l->waits.sleep_max_s ? pause * PAUSE_GROWTH : l->waits.sleep_max_s;
        } else if (now - began >= l->spin.keep_s) {
            edm_spin_yield(&l->spin);
        }
    }
}

static int expect(struct edm_mpi_link *l) {
    if (l->closed || l->lost)
        return l->closed ? -ESHUTDOWN : -ECONNRESET;
    if (l->posted)
        return 0;
    int error = edm_mpi_start(l->mpi, &l->receiving);
    if (error)
        return failed(l, error);
    l->posted = true;
    return 0;
}

static int check_unsent(struct edm_mpi_link *l) {
    struct edm_mpi_status status;
    uint32_t kept = 0;
    for (uint32_t i = 0; i < l->unsent_count; i++) {
        int done = 0, error = edm_mpi_test(l->mpi, &l->unsent[i], &done, &status);
        if (error)
            return failed(l, error);
        if (!done)
            l->unsent[kept++] = l->unsent[i];
    }
    l->unsent_count = kept;
    return kept == MAX_UNSENT ? -ENOBUFS : 0;
}

static int send_locked(struct edm_mpi_link *l, const void *frame, uint64_t length, double deadline) {
    union edm_mpi_handle request;
    struct edm_mpi_status status;
    int result = expect(l);
    if (!result)
        result = check_unsent(l);
    if (result)
        return result;
    int error = edm_mpi_isend(l->mpi, frame, (int)length, l->rank, l->tag, &request);
    if (error)
        return failed(l, error);
    result = wait_for(l, &request, &status, deadline);
    if (result == 1)
        return 0;
    if (result == -EIO)
        return result;
    // The library may still read the buffer: it keeps that one.
    l->unsent[l->unsent_count++] = request;
    return -EBUSY;
}

static int send(void *self, const void *frame, uint64_t length, double deadline) {
    struct edm_mpi_link *l = self;
    pthread_mutex_lock(&l->using);
    int result = send_locked(l, frame, length, deadline);
    pthread_mutex_unlock(&l->using);
    return result;
}

// Take a receive of pages back: their buffer is the caller's again, unless the message stops halfway; then nothing is
// used any more. Whether the message came after all.
static bool give_up(struct edm_mpi_link *l, union edm_mpi_handle *request, struct edm_mpi_status *status) {
    double end = edm_now_s() + GIVE_UP_S;
    int done = 0, taken_back = 0;
    edm_mpi_cancel(l->mpi, request);
    while (!done && edm_now_s() < end)
        if (edm_mpi_test(l->mpi, request, &done, status))
            break;
    l->lost = !done;
    if (done)
        edm_mpi_taken_back(l->mpi, status, &taken_back);
    l->owed += done && taken_back;
    return done && !taken_back;
}

// `bytes` of pages into `data`. 0 or a negative errno.
static int receive_pages(struct edm_mpi_link *l, void *data, uint64_t bytes, double until) {
    union edm_mpi_handle request;
    struct edm_mpi_status status;
    int length = 0;
    int error = edm_mpi_irecv(l->mpi, data, (int)bytes, l->rank, l->tag + EDM_MPI_PAGES_TAG, &request);
    if (error)
        return failed(l, error);
    int result = wait_for(l, &request, &status, until);
    if (result == 0 || result == -ESHUTDOWN)
        if (!give_up(l, &request, &status))
            return l->lost ? -ECONNRESET : result ? result : -ETIMEDOUT;
    if (result == -EIO)
        return result;
    error = edm_mpi_count(l->mpi, &status, &length);
    if (error)
        return failed(l, error);
    return (uint64_t)length == bytes ? 0 : -EPROTO;
}

// What is still to come of a message that came without its pages.
static int receive_rest(struct edm_mpi_link *l, uint64_t length, uint64_t rest, uint64_t request, double until,
                        struct edm_direct *direct) {
    uint8_t *behind = l->reply + length;
    double patience = edm_now_s() + REST_S;
    if (until < patience)
        until = patience;
    for (; l->owed; l->owed--) {
        int result = receive_pages(l, behind, l->capacity - length, until);
        if (result && result != -EPROTO)
            return result;  // still owed, and counted with it the one that was to come now
    }
    bool fits = direct && direct->into && direct->request == request && (uint64_t)direct->pages * PAGE_BYTES == rest;
    int result = receive_pages(l, fits ? direct->into : behind, rest, until);
    if (fits)
        direct->done = !result;
    return result;
}

static int64_t receive_locked(struct edm_mpi_link *l, double until, struct edm_direct *direct) {
    struct edm_mpi_status status;
    uint64_t request = 0;
    int length = 0, result = expect(l);
    if (result)
        return result;
    result = wait_for(l, &l->receiving, &status, until);
    if (result == 1 || result == -EIO)
        l->posted = false;
    if (result != 1)
        return result;  // one that found nothing stays posted and catches a late reply
    int error = edm_mpi_count(l->mpi, &status, &length);
    if (error)
        return failed(l, error);
    uint64_t rest = edm_wire_rest(l->reply, (uint64_t)length, l->capacity, &request);
    if (rest)
        result = receive_rest(l, (uint64_t)length, rest, request, until, direct);
    return rest && result < 0 ? result : length + (int64_t)rest;
}

static int64_t receive(void *self, double until, struct edm_direct *direct) {
    struct edm_mpi_link *l = self;
    pthread_mutex_lock(&l->using);
    int64_t result = receive_locked(l, until, direct);
    pthread_mutex_unlock(&l->using);
    return result;
}

struct edm_mpi_link *edm_mpi_link_new(const struct edm_mpi *mpi, const struct edm_mpi_waits *waits, int rank, int tag,
                                      void *reply, uint64_t capacity) {
    struct edm_mpi_link *l = calloc(1, sizeof *l);
    if (!l)
        return NULL;
    l->carrier = (struct edm_carrier){l, send, receive};
    l->mpi = mpi;
    l->waits = *waits;
    l->spin.keep_s = l->spin.most_s = waits->keep_s;
    l->rank = rank;
    l->tag = tag;
    l->reply = reply;
    l->capacity = capacity;
    pthread_mutex_init(&l->using, NULL);
    l->error = edm_mpi_recv_init(mpi, reply, (int)capacity, rank, tag, &l->receiving);
    l->made = !l->error;
    return l;
}

const void *edm_mpi_link_carrier(const struct edm_mpi_link *l) { return &l->carrier; }
int edm_mpi_link_send(struct edm_mpi_link *l, const void *frame, uint64_t length, double deadline) {
    return send(l, frame, length, deadline);
}
int64_t edm_mpi_link_receive(struct edm_mpi_link *l, double until) { return receive(l, until, NULL); }
int edm_mpi_link_error(const struct edm_mpi_link *l) { return l->error; }

void edm_mpi_link_close(struct edm_mpi_link *l) {
    l->closed = true;
    pthread_mutex_lock(&l->using);
    if (l->posted)
        edm_mpi_take_back(l->mpi, &l->receiving);
    if (l->made)
        edm_mpi_free(l->mpi, &l->receiving);
    l->posted = l->made = false;
    pthread_mutex_unlock(&l->using);
}

void edm_mpi_link_free(struct edm_mpi_link *l) {
    if (l)
        pthread_mutex_destroy(&l->using);
    free(l);
}
