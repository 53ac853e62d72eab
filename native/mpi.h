/*
 * The few calls of MPI that carry messages, through the table that edm/plugins/transport_mpi/library.py fills in from
 * the MPI which mpi4py has loaded: EDM is built against none. A handle is an int (MPICH and its relatives) or a pointer
 * (Open MPI, the ABI of MPI 5), and each call is made by the prototype that this MPI has.
 *
 * Needs <stdbool.h>, <stddef.h>, <stdint.h> and edm_abi.h before it.
 */

#define EDM_MPI_STATUS_BYTES 128

union edm_mpi_handle {
    int number;
    void *pointer;
};

struct edm_mpi_status {
    _Alignas(16) unsigned char bytes[EDM_MPI_STATUS_BYTES];
};

#define EDM_MPI_SUCCESS 0 /* in every MPI */

/* 0 or the MPI's own error code. */
static inline int edm_mpi_isend(const struct edm_mpi *m, const void *data, int length, int rank, int tag,
                                union edm_mpi_handle *request) {
    if (m->handle_bytes == sizeof(int))
        return ((int (*)(const void *, int, int, int, int, int, int *))m->isend)(data, length, (int)m->byte, rank, tag,
                                                                                 (int)m->comm, &request->number);
    return ((int (*)(const void *, int, void *, int, int, void *, void **))m->isend)(
        data, length, (void *)m->byte, rank, tag, (void *)m->comm, &request->pointer);
}

static inline int edm_mpi_irecv(const struct edm_mpi *m, void *data, int capacity, int rank, int tag,
                                union edm_mpi_handle *request) {
    if (m->handle_bytes == sizeof(int))
        return ((int (*)(void *, int, int, int, int, int, int *))m->irecv)(data, capacity, (int)m->byte, rank, tag,
                                                                           (int)m->comm, &request->number);
    return ((int (*)(void *, int, void *, int, int, void *, void **))m->irecv)(data, capacity, (void *)m->byte, rank,
                                                                               tag, (void *)m->comm, &request->pointer);
}

static inline int edm_mpi_recv_init(const struct edm_mpi *m, void *data, int capacity, int rank, int tag,
                                    union edm_mpi_handle *request) {
    if (m->handle_bytes == sizeof(int))
        return ((int (*)(void *, int, int, int, int, int, int *))m->recv_init)(data, capacity, (int)m->byte, rank, tag,
                                                                               (int)m->comm, &request->number);
    return ((int (*)(void *, int, void *, int, int, void *, void **))m->recv_init)(
        data, capacity, (void *)m->byte, rank, tag, (void *)m->comm, &request->pointer);
}

static inline int edm_mpi_count(const struct edm_mpi *m, const struct edm_mpi_status *status, int *count) {
    if (m->handle_bytes == sizeof(int))
        return ((int (*)(const void *, int, int *))m->get_count)(status, (int)m->byte, count);
    return ((int (*)(const void *, void *, int *))m->get_count)(status, (void *)m->byte, count);
}

/* These take a handle by its address, whatever it is. */
static inline int edm_mpi_test(const struct edm_mpi *m, union edm_mpi_handle *request, int *done,
                               struct edm_mpi_status *status) {
    return ((int (*)(void *, int *, void *))m->test)(request, done, status);
}

static inline int edm_mpi_start(const struct edm_mpi *m, union edm_mpi_handle *request) {
    return ((int (*)(void *))m->start)(request);
}

static inline void edm_mpi_taken_back(const struct edm_mpi *m, const struct edm_mpi_status *status, int *is) {
    ((int (*)(const void *, int *))m->test_cancelled)(status, is);
}

static inline void edm_mpi_cancel(const struct edm_mpi *m, union edm_mpi_handle *request) {
    ((int (*)(void *))m->cancel)(request);
}

/* Take a receive back: complete on return, whether a message had come or not. */
static inline void edm_mpi_take_back(const struct edm_mpi *m, union edm_mpi_handle *request) {
    struct edm_mpi_status status;
    ((int (*)(void *))m->cancel)(request);
    ((int (*)(void *, void *))m->wait)(request, &status);
}

static inline void edm_mpi_free(const struct edm_mpi *m, union edm_mpi_handle *request) {
    ((int (*)(void *))m->request_free)(request);
}

static inline int edm_mpi_field(const struct edm_mpi_status *status, uint32_t at) {
    int value;
    __builtin_memcpy(&value, status->bytes + at, sizeof value);
    return value;
}
