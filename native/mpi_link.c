// A DM-Handler's messages to and from one memory server's rank, under one tag [5, 11].
//
// MPI has no wait with a deadline, and a blocking receive burns a core: requests are tested, in a spin at first and
// with sleeps between after that.
#include <errno.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <time.h>

#include "carrier.h"
#include "edm_abi.h"
#include "mpi.h"

#define BURST 20          // tests between two looks at the clock
#define KEEP_CPU_S 30e-6  // of a spin, how long not to offer the CPU: the usual answer is there by then
#define PAUSE_GROWTH 1.5
#define MAX_UNSENT 2  // messages a server has not taken before the link says that it is lost

struct edm_mpi_link {
    struct edm_carrier carrier;
    const struct edm_mpi *mpi;
    struct edm_mpi_waits waits;
    pthread_mutex_t using;           // held while MPI is called, so that closing takes nothing away from under it
    atomic_bool closed;              // ends a wait in another thread
    union edm_mpi_handle receiving;  // made once and started for each reply
    union edm_mpi_handle unsent[MAX_UNSENT];
    uint32_t unsent_count;
    bool made, posted;
    int rank, tag, error;
};

static double now_s(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

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
            if (done)
                return 1;
        }
        if (l->closed)
            return -ESHUTDOWN;
        double now = now_s();
        if (now >= until)
            return 0;
        if (began == 0)
            began = now;
        if (now - began >= l->waits.spin_s) {
            sleep_s(pause < until - now ? pause : until - now);
            pause = pause * PAUSE_GROWTH < l->waits.sleep_max_s ? pause * PAUSE_GROWTH : l->waits.sleep_max_s;
        } else if (now - began >= KEEP_CPU_S) {
            sched_yield();
        }
    }
}

static int expect(struct edm_mpi_link *l) {
    if (l->closed)
        return -ESHUTDOWN;
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

static int64_t receive_locked(struct edm_mpi_link *l, double until) {
    struct edm_mpi_status status;
    int length = 0, result = expect(l);
    if (result)
        return result;
    result = wait_for(l, &l->receiving, &status, until);
    if (result == 1 || result == -EIO)
        l->posted = false;
    if (result != 1)
        return result;  // one that found nothing stays posted and catches a late reply
    int error = edm_mpi_count(l->mpi, &status, &length);
    return error ? failed(l, error) : length;
}

static int64_t receive(void *self, double until) {
    struct edm_mpi_link *l = self;
    pthread_mutex_lock(&l->using);
    int64_t result = receive_locked(l, until);
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
    l->rank = rank;
    l->tag = tag;
    pthread_mutex_init(&l->using, NULL);
    l->error = edm_mpi_recv_init(mpi, reply, (int)capacity, rank, tag, &l->receiving);
    l->made = !l->error;
    return l;
}

const void *edm_mpi_link_carrier(const struct edm_mpi_link *l) { return &l->carrier; }
int edm_mpi_link_send(struct edm_mpi_link *l, const void *frame, uint64_t length, double deadline) {
    return send(l, frame, length, deadline);
}
int64_t edm_mpi_link_receive(struct edm_mpi_link *l, double until) { return receive(l, until); }
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
