/*
 * The calls Python makes into the C core (`edm._native.lib`): the manual of the native module.
 *
 * Plain declarations only, no preprocessor lines: cffi reads this very file, and C sources include it after
 * <stdbool.h>, <stddef.h> and <stdint.h>.
 */

/* CRC-32C (Castagnoli, as in iSCSI and ext4) of `len` bytes at `data`; 0 for no bytes. Any alignment, any thread. */
uint32_t edm_crc32c(const void *data, size_t len);

/* Copies `len` bytes and returns their CRC-32C; `to` and `from` do not overlap. */
uint32_t edm_crc32c_copy(void *to, const void *from, size_t len);

/* CRC-32C of each of `n_pages` pages of 4096 bytes at `pages`, into `out[0..n_pages)`. Any alignment, any thread. */
void edm_crc32c_pages(const void *pages, size_t n_pages, uint32_t *out);

/* ---- fault engine (native/engine.c …): called by the DM-Handler through cffi --------------------------------- */

/* One page reference; the layout of edm.types.PAGE_REF. */
struct edm_page_ref {
    uint64_t region;
    uint64_t index;
    uint64_t version;
    uint32_t checksum;
    uint16_t status;
    uint16_t flags;
};

enum edm_idle {
    EDM_IDLE_SLEEP = 0,  /* they sleep as the kernel will */
    EDM_IDLE_OCCUPY = 1, /* threads of class SCHED_IDLE occupy them while one thread faults: it stays where it is */
    EDM_IDLE_AWAKE = 2,  /* the kernel is asked, by /dev/cpu_dma_latency, to let them sleep no deeper than idle_us */
};

struct edm_engine_config {
    uint64_t local_pages;      /* budget: resident pages of all captured programs together; 0: none */
    uint64_t high_pages;       /* LPET starts above this; 0: derived */
    uint64_t low_pages;        /* … and evicts down to this; 0: derived */
    uint64_t write_back_pages; /* size of the write-back buffer; 0: 256 */
    uint32_t sweep_us;         /* longest time between two looks at a program's mappings */
    uint32_t spin_us;          /* a fault worker spins this long before it sleeps */
    uint32_t ahead_pages;      /* at most so many pages are brought ahead of a fault; 0: none, 63 at most */
    uint8_t track_writes;      /* write-protect pages restored by a read; clean ones are dropped without a write */
    uint8_t ask;               /* ask the DMS for pages known to be new as well */
    uint8_t user_mode;         /* take programs with UFFD_USER_MODE_ONLY where there is nothing better */
    uint8_t record_pfn;        /* note each resident page's frame number when it arrives, not when it is asked for */
    uint8_t follow;            /* fault workers move to the CPU of the thread that faults: waking across CPUs is dear
                                  (EDM_IDLE_AWAKE: while others want all CPUs) */
    uint8_t idle;              /* enum edm_idle: of CPUs that are idle while faults follow each other closely */
    uint32_t idle_us;          /* EDM_IDLE_AWAKE: how long they may take to wake, in microseconds */
};

struct edm_counters {
    uint64_t faults;         /* fault messages read */
    uint64_t zero_fills;     /* new page: UFFDIO_ZEROPAGE, or UFFDIO_COPY of zeros */
    uint64_t fetches;        /* existing page: fetched from the DMS, UFFDIO_COPY */
    uint64_t rescues;        /* found in the write-back buffer, UFFDIO_COPY */
    uint64_t write_protects; /* first write to a clean page */
    uint64_t repeats;        /* the page was there already */
    uint64_t evictions;      /* pages moved out of a program */
    uint64_t evicted_clean;  /* … of those, dropped: the DMS has them */
    uint64_t evicted_zero;   /* … of those, all zeros: nothing to store */
    uint64_t writes;         /* pages the DMS acknowledged */
    uint64_t write_failures; /* pages the DMS refused; tried again */
    uint64_t move_refused;   /* pages the kernel would not move (pinned, locked) */
    uint64_t move_again;     /* batches cut short by an address-space event */
    uint64_t again;          /* ioctls the kernel put off with EAGAIN */
    uint64_t stale;          /* answers that no longer matched; asked again */
    uint64_t lost;           /* pages no copy of which could be had: poisoned */
    uint64_t over_limit;     /* faults let through above the limit since too much cannot be evicted */
    uint64_t waited;         /* faults that waited for room */
    uint64_t events_fork;
    uint64_t events_remap;
    uint64_t events_remove;
    uint64_t events_unmap;
    uint64_t joined; /* pages that were there before their mapping was captured */
    uint64_t sweeps;
    uint64_t given;       /* pages let go of for a userfaultfd of the program's own: native/foreign.c */
    uint64_t growth_cuts; /* stretches of which a part was captured and the rest left to grow: native/growth.c */
    uint64_t processes;   /* address spaces captured so far */
    uint64_t spaces;      /* … alive now */
    uint64_t resident;    /* pages now; one that processes share since a fork counts once a process */
    uint64_t peak_resident;
    uint64_t staged; /* pages in the write-back buffer now */
    uint64_t remote; /* pages only the DMS holds now */
    uint64_t limit_pages;
    uint64_t high_pages;
    uint64_t low_pages;
    uint64_t lspt_bytes;
    uint64_t ahead;        /* pages brought ahead whose stream has been heard of again or given up */
    uint64_t ahead_useful; /* … of those, the stream went on behind them */
    uint64_t hints;        /* of madvise(2) that were followed */
    uint64_t hinted;       /* pages brought since a program said it will need them */
    uint64_t asked;        /* pages that the DMS was asked for and has not brought, now */
    uint64_t bare; /* address spaces of which nothing can be evicted any more: their sidecar went a second ago */
    uint64_t sidecars_lost;   /* … so far, as soon as it is seen */
    uint64_t internal_errors; /* states that should not occur; the first is in edm_error */
};

struct edm_engine;
struct edm_policy;

/* NULL with errno set if memory or an fd cannot be had. */
struct edm_engine *edm_engine_new(const struct edm_engine_config *config);
/* Take over what another DM-Handler, which has died, was serving: `holder` is the process that keeps its descriptors,
   and `segment` the number there of what edm_engine_segment gave. The programs are served from edm_engine_listen on.
   NULL with errno set. */
struct edm_engine *edm_engine_adopt(const struct edm_engine_config *config, int32_t holder, int32_t segment);
/* The descriptor that edm_engine_adopt of another process needs. */
int32_t edm_engine_segment(struct edm_engine *engine);
/* Whoever holds this process's descriptors now; an adopted engine is this process's own from here on. */
void edm_engine_holder(struct edm_engine *engine, int32_t holder);
/* End the holders that an adopted engine took its descriptors from, and wait until they have closed them. */
void edm_engine_release(struct edm_engine *engine);
/* Evict in the order of a table of edm_ops.h ("edm.policy_ops"), which must outlive the engine; before it listens.
   `idle_bits`: the kernel's file of them, for a policy that looks. 0; -EINVAL: another version's table; an errno above
   0: done, but idle_bits cannot be opened. Without this call, edm_policy_scan(75). */
int edm_engine_policy(struct edm_engine *engine, const void *ops, const char *idle_bits);
/* The policies that are built in; a struct edm_policy begins with its table. NULL: no memory. */
struct edm_policy *edm_policy_fifo(void);
struct edm_policy *edm_policy_clock(bool idle_bits);
struct edm_policy *edm_policy_scan(uint32_t kept_percent); /* of the local memory, for what came back soon */
void edm_policy_free(struct edm_policy *policy);
/* Start the LPET and accept programs on the unix socket `path`. 0 or -errno. */
int edm_engine_listen(struct edm_engine *engine, const char *path, uint32_t instance);
/* End all waiting calls; no fault is served after it. */
void edm_engine_stop(struct edm_engine *engine);
void edm_engine_free(struct edm_engine *engine);
void edm_engine_counters(struct edm_engine *engine, struct edm_counters *out);
/* The first internal error as text, "" if none. */
const char *edm_engine_error(struct edm_engine *engine);
/* The pids of captured processes that live, at most max; returns how many. */
int edm_engine_pids(struct edm_engine *engine, int32_t *out, int max);

/* What the LSPT says of a page: where it is, its version at the DMS, and, of a resident one, its frame number (0: not
   known; reading it needs CAP_SYS_ADMIN). */
#define EDM_PAGE_NEW 0
#define EDM_PAGE_RESIDENT 1
#define EDM_PAGE_FETCHING 2
#define EDM_PAGE_EVICTING 3
#define EDM_PAGE_STAGED 4
#define EDM_PAGE_REMOTE 5
#define EDM_PAGE_ZERO 6
struct edm_page_state {
    uint32_t state;
    uint32_t clean; /* resident, and the DMS has exactly these bytes */
    uint64_t version;
    uint64_t pfn;
};
/* 0, or -ESRCH: no captured process has that pid. `page` is address / 4096. */
int edm_engine_page(struct edm_engine *engine, int32_t pid, uint64_t page, struct edm_page_state *out);

/* ---- a program's memory from outside (native/outside.c): called by `edm dump`, in a process of its own ---------- */

/* What a captured program's control page tells. */
struct edm_capture {
    int32_t handler_pid, sidecar_pid;
    uint64_t staging, staging_bytes; /* of EDM's own, in the program */
    char sock[108];                  /* where its DM-Handler is to be asked, see struct edm_ask in native/sidecar.h */
};
/* 0; -ENOENT: it is not captured; or why it may not be looked at: -ESRCH, -EACCES, -EPERM. */
int edm_capture_of(int32_t pid, struct edm_capture *out);

/* Stretches of [first, last) whose pages are present or swapped out, as pairs of page numbers in out[0 .. 2 * max);
   returns how many, with *walked the page it came to, or -errno. pagemap_fd: /proc/PID/pagemap. */
int edm_present(int pagemap_fd, uint64_t first, uint64_t last, uint64_t *out, int max, uint64_t *walked);

/* Stop one thread with ptrace. All calls for it from the thread that made this one. 0 or more: it stands still, before
   the signal of that number (0: none), to be given to edm_thread_let_go. -ETIMEDOUT: it does not stop; it is let go by
   the end of the calling process; -ESRCH: it has ended; -EPERM: it may not be, or somebody else does already. */
int edm_thread_stop(int32_t tid, int timeout_ms);
/* One set of its registers by ELF note type; returns its bytes, or -errno. */
int edm_thread_registers(int32_t tid, uint32_t note, void *out, uint64_t size);
int edm_thread_let_go(int32_t tid, int signal);

/* A fault worker's buffers: 64 refs and 64 pages. */
struct edm_page_ref *edm_worker_refs(struct edm_engine *engine, int worker);
uint8_t *edm_worker_pages(struct edm_engine *engine, int worker);
/* A table of edm_ops.h ("edm.channel_ops"): the worker fetches through it by itself, without Python; NULL: none. Before
   the worker's first edm_poll; it must stay until the last. */
void edm_worker_channel(struct edm_engine *engine, int worker, const void *ops);
/* Read and handle faults [3-5]; returns the number of refs to fetch (with a channel: those it could not), 0 after
   timeout_us, -ESHUTDOWN at the end. */
int edm_poll(struct edm_engine *engine, int worker, int timeout_us);
/* Install the first n pages of the worker's batch [12-15]. */
int edm_resolve(struct edm_engine *engine, int worker, int n);

#define EDM_OUTBOX_BATCH 256
/* What an outbox message is. */
#define EDM_OUT_EVICT 1       /* refs and pages are filled */
#define EDM_OUT_CREATE 2      /* region */
#define EDM_OUT_CLONE 3       /* region, into = a */
#define EDM_OUT_MOVE 4        /* region, start = a, to = b, count = c */
#define EDM_OUT_DROP 5        /* region, start = a, count = b */
#define EDM_OUT_DROP_REGION 6 /* region */
struct edm_outbox {
    int32_t kind;
    int32_t n; /* pages, for EDM_OUT_EVICT */
    uint64_t sequence;
    uint64_t region, a, b, c;
    struct edm_page_ref *refs;
    uint8_t *pages;
};
/* As edm_worker_channel: evictions are carried by it; those that it could not carry, or that the DMS refused, come from
   edm_outbox_poll as without it. */
void edm_outbox_channel(struct edm_engine *engine, const void *ops);
/* The next message; 1, 0 after timeout_us, -ESHUTDOWN at the end. One message at a time: done before the next. */
int edm_outbox_poll(struct edm_engine *engine, struct edm_outbox *out, int timeout_us);
/* The DMS has carried it out (evictions: by refs[i].status); failed pages are sent again after the next poll. */
void edm_outbox_done(struct edm_engine *engine, const struct edm_outbox *out);

/* ---- the fault trace (native/trace.c) ---- */
#define EDM_TRACE_READ 0
#define EDM_TRACE_WRITE 1
#define EDM_TRACE_PROTECTED 2 /* the first write to a clean page */
#define EDM_TRACE_ZERO 1      /* outcomes: new page, UFFDIO_ZEROPAGE [12] */
#define EDM_TRACE_FETCHED 2   /* existing page, UFFDIO_COPY [13] */
#define EDM_TRACE_RESCUED 3   /* … from the write-back buffer */
#define EDM_TRACE_WRITABLE 4
#define EDM_TRACE_THERE 5 /* the page was there already */
#define EDM_TRACE_LOST 6
#define EDM_TRACE_ASKED 0    /* steps: in a request to the DMS [5] */
#define EDM_TRACE_ANSWERED 1 /* the DMS's reply is here [11] */
#define EDM_TRACE_DONE 2     /* the ioctl has returned, and has woken the thread [12, 13, 15] */
#define EDM_TRACE_LISTED 3   /* in the LSPT [14] */
/* One fault, from the moment its message was read [5]. */
struct edm_trace_record {
    uint64_t read_ns; /* CLOCK_MONOTONIC */
    uint64_t page;
    uint64_t region;
    uint32_t thread;
    uint16_t cpu; /* the fault worker's */
    uint8_t kind;
    uint8_t outcome;
    uint32_t step_ns[4]; /* after read_ns; 0: not reached */
};
/* Record faults from now on, up to `records` until they are taken. 0, -ENOMEM or -EINVAL. */
int edm_trace_start(struct edm_engine *engine, uint32_t records);
/* Take up to max records in the order in which they were settled; returns how many. *dropped: faults without a record.
 */
int edm_trace_take(struct edm_engine *engine, struct edm_trace_record *out, int max, uint64_t *dropped);

/* May this process use userfaultfd as the engine needs it? 0, -EPERM, -EINVAL (features missing), -ENOSYS … */
int edm_uffd_check(void);

/* How much of it this process has: the lowest rung on which it stands, or a negative errno. */
#define EDM_ACCESS_ALL 0
#define EDM_ACCESS_NO_FORKS 1  /* without CAP_SYS_PTRACE the kernel tells of no fork */
#define EDM_ACCESS_USER_MODE 2 /* … and of no fault in its own system calls: they give EFAULT on absent pages */
int edm_uffd_access(void);

/* May this process make an io_uring? With one a program keeps its uffd (native/app/tie.c). 0 or a negative errno. */
int edm_tie_access(void);

/* Take programs of other users too, if they descend from process `pid`. Before edm_engine_listen. */
void edm_engine_admit_below(struct edm_engine *engine, int32_t pid);

/* The holder: keeps every file descriptor of this process open after it has died. Once `launcher_pid` (0: nobody) has
   ended too it ends the programs; `waits`: it keeps them waiting instead, for as long as there are any, since somebody
   may start a DM-Handler that takes over. Returns its pid, or -errno. */
int edm_holder_start(int32_t launcher_pid, bool waits);

/* ---- fault points (native/points.h): for tests ---- */
#define EDM_POINT_KILL 1    /* SIGKILL for this process */
#define EDM_POINT_DELAY 2   /* 200 ms */
#define EDM_POINT_FAIL 3    /* what is done there fails, where it can */
#define EDM_POINT_HOLD 4    /* wait until `flag` is there again */
#define EDM_POINT_CORRUPT 5 /* a bit of what is there is turned over, where it can be */
struct edm_point_text {
    const char *name;
    const char *what;    /* has just come, or is about to */
    const char *fails;   /* NULL: nothing can */
    const char *damaged; /* NULL: nothing is */
};
/* A point by its number, counted from 1; NULL behind the last. */
const struct edm_point_text *edm_point_text(int number);
/* Arm one point of this process: it acts once, after it was passed `times` times, and removes the file `flag` when it
   does. Its number; -ENOENT; -EINVAL also where it cannot do that. */
int edm_point_arm(const char *name, int what, int times, const char *flag);

/* ---- replayed faults (native/replay.c): a program's touches, without userfaultfd ------------------------------- */

/* A program that is not there: its pages are an arena in this process, its touches and system calls are calls here, and
   the engine serves its faults as it would serve the kernel's. Any thread may call, several at once. */
struct edm_replay;

/* Give the engine a program of `pages` pages; `instance` as in edm_engine_listen. NULL with errno set. */
struct edm_replay *edm_replay_open(struct edm_engine *engine, uint32_t instance, uint64_t pages);
/* The program ends; no other thread may be in a call on it. Before or after edm_engine_free. */
void edm_replay_close(struct edm_replay *replay);
/* Touch a page as a program would, waiting for it: a write stores `value` in its first and last 8 bytes, a read gives
   the first 8 in *out. -EIO: the last 8 differ (never, or the engine is wrong); -EFAULT: SIGBUS of a poisoned page, or
   no such page; -ESHUTDOWN: the engine was stopped; -ESRCH: the program has ended. */
int edm_replay_touch(struct edm_replay *replay, uint64_t page, int write, uint64_t value, uint64_t *out);

/* What the program does. */
#define EDM_REPLAY_READ 1
#define EDM_REPLAY_WRITE 2
#define EDM_REPLAY_REMOVE 3 /* madvise(MADV_DONTNEED) of [a, a+n) */
#define EDM_REPLAY_UNMAP 4  /* munmap of [a, a+n), and a fresh mmap there */
#define EDM_REPLAY_REMAP 5  /* mremap of [a, a+n) to b, and a fresh mmap at a */
/* An address-space change (3 to 5), reported as the kernel does: returns when its events have been read. 0, -EINVAL,
   -ESHUTDOWN, -ESRCH. */
int edm_replay_event(struct edm_replay *replay, int what, uint64_t a, uint64_t n, uint64_t b);
/* fork: *child is the child's program, to be closed too. Returns when the engine serves it. */
int edm_replay_fork(struct edm_replay *replay, struct edm_replay **child);

struct edm_replay_op {
    uint32_t kind;  /* EDM_REPLAY_READ … */
    uint32_t count; /* pages, for kinds 3 to 5 */
    uint64_t page;
    uint64_t value; /* written; filled in by a read; the target page of a remap */
};
/* Carry out n operations in order on the calling thread; returns how many were done before one failed with *error
   (0: none did). */
uint64_t edm_replay_run(struct edm_replay *replay, struct edm_replay_op *ops, uint64_t n, int *error);

/* Pages present in the arena now: what the budget is to bound. */
uint64_t edm_replay_present(struct edm_replay *replay);
/* Pin pages (as io_uring's registered buffers are), or let them go: whatever is there refuses to move. 0 or -EINVAL. */
int edm_replay_pin(struct edm_replay *replay, uint64_t page, uint64_t count, int pinned);

#define EDM_REPLAY_ZERO 0
#define EDM_REPLAY_COPY 1
#define EDM_REPLAY_UNPROTECT 2
#define EDM_REPLAY_POISON 3
#define EDM_REPLAY_CALLS 4
/* After `after` more calls of that kind, the next `count` fail with `error` (a positive errno). 0 or -EINVAL. */
int edm_replay_fail(struct edm_replay *replay, int call, uint32_t after, uint32_t count, int error);

/* ---- wire layout (native/wire.c): called by both ends of a transport through edm.wire; docs/protocol.md --------- */

struct edm_wire_head {
    uint64_t request;
    uint32_t channel;
    uint32_t instance;
    uint32_t text_bytes;
    uint32_t batch; /* page references */
    uint32_t pages; /* pages behind them */
    uint32_t kind;  /* edm.wire.Kind */
};

#define EDM_WIRE_OK 0
#define EDM_WIRE_LENGTH 1   /* shorter than a header, or longer than the buffer */
#define EDM_WIRE_MAGIC 2    /* not EDM's */
#define EDM_WIRE_VERSION 3  /* another version's */
#define EDM_WIRE_CLAIM 4    /* says that it has another length */
#define EDM_WIRE_KIND 5     /* no such kind */
#define EDM_WIRE_SHAPE 6    /* not what a message of its kind looks like */
#define EDM_WIRE_CHECKSUM 7 /* damaged */
#define EDM_WIRE_PRESENT 8  /* its references tell of more or fewer pages than it has */

/* Write the header over references, text and pages that are in place in `frame`; returns the message's length. */
uint64_t edm_wire_seal(void *frame, uint32_t kind, uint32_t batch, uint32_t channel, uint32_t instance,
                       uint64_t request, uint32_t text_bytes, uint32_t pages);

/* Check the message of `length` bytes in `frame`, which holds at most `capacity`. Reads no byte beyond `length`, and
   leaves the message as it was. EDM_WIRE_OK with *head filled in, or the first thing that is wrong, with what is in the
   header as it was found, if there is one of EDM's. */
int edm_wire_open(void *frame, uint64_t length, uint64_t capacity, struct edm_wire_head *head);

/* From an accepted reply to a get: each reference to `refs` and each existing page to its place in `into`. `refs` holds
   the references asked for, all `head->batch`; returns 0, or -1 with nothing changed if the reply names other pages. */
int edm_wire_take(const void *frame, const struct edm_wire_head *head, struct edm_page_ref *refs, void *into);

/* The same for the references alone, where the pages have come by another way. */
int edm_wire_take_refs(const void *frame, const struct edm_wire_head *head, struct edm_page_ref *refs);

/* Of a message whose first `length` bytes are in `frame`, which is nothing checked yet: how many bytes of pages are
   still to come in a message of their own, 0 if none are or it is none of EDM's; and the number of its request. */
uint64_t edm_wire_rest(const void *frame, uint64_t length, uint64_t capacity, uint64_t *request);

/* Before a reply to a get is sealed: move the existing pages of a batch in `frame` together; returns how many. */
uint32_t edm_wire_gather(void *frame, uint32_t batch);

/* ---- requests for pages without Python (native/conversation.c): see edm/channel.py, which makes them ------------- */

/* One channel's requests to one memory server, over a carrier (native/carrier.h), which outlives it as `instance` and
   `reply` do. resend_s: 0 where the carrier loses nothing. NULL: no memory. */
struct edm_conversation;
struct edm_conversation *edm_conversation_new(const void *carrier, uint32_t channel, const uint32_t *instance,
                                              void *reply, uint64_t capacity, double resend_s);
void edm_conversation_free(struct edm_conversation *conversation);
/* "edm.channel_ops" */
const void *edm_conversation_table(const struct edm_conversation *conversation);
/* The buffer that requests are made in, of the largest message's size: once, and whenever it is _lost to the carrier.
 */
void edm_conversation_out(struct edm_conversation *conversation, void *frame);
bool edm_conversation_lost(const struct edm_conversation *conversation);
/* The number of a request that Python makes. */
uint64_t edm_conversation_next(struct edm_conversation *conversation);
/* … and of the last one made in either way; the length of the last one made here. */
uint64_t edm_conversation_request(const struct edm_conversation *conversation);
uint64_t edm_conversation_length(const struct edm_conversation *conversation);
/* As the table's calls, until `deadline` (CLOCK_MONOTONIC, seconds) and no longer than a second. 0; -ETIMEDOUT: no
   answer yet, Python may wait for it; -EBUSY: not even sent, and `out` is _lost; another negative errno: Python says
   what it is, by making the request anew. */
int edm_conversation_fetch(struct edm_conversation *conversation, struct edm_page_ref *refs, uint32_t n, void *into,
                           double deadline);
int edm_conversation_evict(struct edm_conversation *conversation, struct edm_page_ref *refs, uint32_t n,
                           const void *pages, double deadline);

/* ---- MPI without Python (native/mpi_link.c, mpi_serving.c): called by edm.plugins.transport_mpi ------------------ */

/* The MPI that mpi4py has loaded, as it was found at run time. Handles are ints or pointers, by their size. */
struct edm_mpi {
    uint32_t handle_bytes;
    uint32_t source_at, tag_at; /* where these stand in an MPI_Status */
    uint64_t comm, byte;        /* handles: EDM's communicator, MPI_BYTE */
    void *isend, *irecv, *recv_init, *start, *test, *get_count, *cancel, *test_cancelled, *wait, *request_free;
};

/* The tag of pages that come in a message of their own, over that of what stands before them. */
#define EDM_MPI_PAGES_TAG 15000
/* From so many pages in a reply they do. */
#define EDM_MPI_SPLIT_PAGES 32

struct edm_mpi_waits {
    double spin_s, keep_s; /* how long to spin, and of that not to offer the CPU */
    double sleep_s, sleep_max_s;
};

/* A DM-Handler's end: messages to and from one rank under one tag. `mpi` and `reply` outlive it. NULL: no memory. */
struct edm_mpi_link;
struct edm_mpi_link *edm_mpi_link_new(const struct edm_mpi *mpi, const struct edm_mpi_waits *waits, int rank, int tag,
                                      void *reply, uint64_t capacity);
const void *edm_mpi_link_carrier(const struct edm_mpi_link *link);
/* As native/carrier.h says; times in seconds of CLOCK_MONOTONIC. -ESHUTDOWN: closed; -ENOBUFS: the server takes no
   messages; -EIO: MPI said _error. */
int edm_mpi_link_send(struct edm_mpi_link *link, const void *frame, uint64_t length, double deadline);
int64_t edm_mpi_link_receive(struct edm_mpi_link *link, double until);
int edm_mpi_link_error(const struct edm_mpi_link *link);
/* Any thread: ends a wait in another. Not to be used after it, but by _free. */
void edm_mpi_link_close(struct edm_mpi_link *link);
void edm_mpi_link_free(struct edm_mpi_link *link);

/* A memory server's end. The message that waits for Python, and what was answered without it. */
struct edm_mpi_served {
    int rank, tag, length, error;
    uint64_t gets, pages_sent, evicts, pages_received;
};

#define EDM_MPI_IDLE 0    /* nothing for as long as it waits */
#define EDM_MPI_MESSAGE 1 /* one for Python is in `request` */
#define EDM_MPI_BUSY 2    /* something was answered */

/* server: an "edm.server_ops", or NULL. NULL: no memory. */
struct edm_mpi_serving;
struct edm_mpi_serving *edm_mpi_serving_new(const struct edm_mpi *mpi, const void *server, void *request,
                                            uint64_t capacity, const struct edm_mpi_waits *waits, int any_rank,
                                            int any_tag);
/* Take and answer messages; when there is none, spin, then sleep for longer and longer between tests, for idle_s (0: do
   not sleep). EDM_MPI_…; -EIO: MPI said _served.error; -ENOMEM. */
int edm_mpi_serve(struct edm_mpi_serving *serving, double idle_s);
const struct edm_mpi_served *edm_mpi_served(const struct edm_mpi_serving *serving);
/* Its replies that nobody has taken yet. */
uint32_t edm_mpi_serving_unsent(struct edm_mpi_serving *serving);
/* The receive that has failed is still there: MPI_ERR_PROC_FAILED_PENDING. */
void edm_mpi_serving_posted(struct edm_mpi_serving *serving);
/* Receive nothing more. */
void edm_mpi_serving_stop(struct edm_mpi_serving *serving);
void edm_mpi_serving_free(struct edm_mpi_serving *serving);

/* ---- ZeroMQ without Python (native/zmq_link.c, zmq_serving.c): called by edm.plugins.transport_zmq --------------- */

/* The libzmq that pyzmq has loaded, as it was found at run time. */
struct edm_zmq {
    void *msg_init, *msg_init_data, *msg_recv, *msg_send, *msg_size, *msg_data, *msg_more, *msg_gets, *msg_close;
    void *send, *recv, *poll, *getsockopt, *setsockopt;
};

/* A DM-Handler's end: messages over one DEALER, which pyzmq has set up and connected. `zmq`, `socket`, `reply` outlive
   it. NULL: no memory. */
struct edm_zmq_link;
struct edm_zmq_link *edm_zmq_link_new(const struct edm_zmq *zmq, void *socket, void *reply, uint64_t capacity);
const void *edm_zmq_link_carrier(const struct edm_zmq_link *link);
/* As native/carrier.h says; times in seconds of CLOCK_MONOTONIC. -ESHUTDOWN: closed; -EMSGSIZE: a reply that is no
   single message of EDM's size; -EINTR: a signal is for Python; another negative errno: libzmq's. */
int edm_zmq_link_send(struct edm_zmq_link *link, const void *frame, uint64_t length, double deadline);
int64_t edm_zmq_link_receive(struct edm_zmq_link *link, double until);
/* Any thread: ends a wait in another, within a tenth of a second; the socket is the caller's alone then. */
void edm_zmq_link_close(struct edm_zmq_link *link);
void edm_zmq_link_free(struct edm_zmq_link *link);

#define EDM_ZMQ_IDLE 0    /* nothing for as long as it waits */
#define EDM_ZMQ_MESSAGE 1 /* one for Python is in `request` */
#define EDM_ZMQ_BUSY 2    /* something was answered or thrown away */
#define EDM_ZMQ_KEY_CHARACTERS 40

/* A memory server's end. Who sent the message that waits for Python, and what was answered without it. */
struct edm_zmq_served {
    uint8_t identity[256];
    uint32_t identity_bytes;
    char key[41]; /* the sender's public key, "" where it has none */
    uint64_t length, gets, pages_sent;
};

/* server: an "edm.server_ops", or NULL: then all messages are Python's. keyed: whether an instance belongs to a key.
   NULL: no memory. */
struct edm_zmq_serving;
struct edm_zmq_serving *edm_zmq_serving_new(const struct edm_zmq *zmq, void *socket, const void *server, bool keyed,
                                            void *request, uint64_t capacity);
/* Take and answer messages; wait for the first for idle_ms (0: not at all). EDM_ZMQ_… or a negative errno of libzmq's;
   a signal ends the wait. */
int edm_zmq_serve(struct edm_zmq_serving *serving, int idle_ms);
const struct edm_zmq_served *edm_zmq_served(const struct edm_zmq_serving *serving);
/* From now on gets for `instance` from the sender of the last message for Python may be answered, or (0) none any more
   until Python says so again. */
void edm_zmq_serving_allow(struct edm_zmq_serving *serving, uint32_t instance);
/* Once the context of the socket is terminated: libzmq may hold replies until then. */
void edm_zmq_serving_free(struct edm_zmq_serving *serving);

/* ---- stores: the SPT's table (native/spt_table.c, spt_replay.c) ------------------------------------------------ */

/* Region and page number to slot, version and checksum, with slots counted by reference. One thread at a time. Every
   change returns 0, or -ENOMEM with nothing changed. Slots whose last reference goes are collected for edm_spt_gone. */
struct edm_spt;

struct edm_spt *edm_spt_new(void);
void edm_spt_free(struct edm_spt *spt);
/* Fill version, checksum, status (1: there, 0: not) of each ref, and its slot; returns how many are there. */
size_t edm_spt_lookup(const struct edm_spt *spt, struct edm_page_ref *refs, size_t n, uint64_t *slots);
int edm_spt_record(struct edm_spt *spt, const struct edm_page_ref *refs, const uint64_t *slots, size_t n);
int edm_spt_create(struct edm_spt *spt, uint64_t region);
int edm_spt_clone(struct edm_spt *spt, uint64_t region, uint64_t into);
int edm_spt_move(struct edm_spt *spt, uint64_t region, uint64_t start, uint64_t to, uint64_t count);
int edm_spt_drop(struct edm_spt *spt, uint64_t region, uint64_t start, uint64_t count);
int edm_spt_drop_region(struct edm_spt *spt, uint64_t region);
/* How many slots were let go of; copied to `out` and forgotten unless it is NULL. */
size_t edm_spt_gone(struct edm_spt *spt, uint64_t *out);
/* How many regions there are; the first `max` with their number of pages. */
size_t edm_spt_regions(const struct edm_spt *spt, uint64_t *ids, uint64_t *pages, size_t max);
/* How many pages a region has, the first `max` in index order with their slots; -ENOMEM. */
int64_t edm_spt_pages(const struct edm_spt *spt, uint64_t region, struct edm_page_ref *refs, uint64_t *slots,
                      size_t max);
/* Slots with more than one reference, as (slot, references beyond the first); how many there are. */
size_t edm_spt_shares(const struct edm_spt *spt, uint64_t *pairs, size_t max);
int edm_spt_share(struct edm_spt *spt, const uint64_t *pairs, size_t count);
/* Small numbers kept under a key; as (key, value), how many there are. */
int edm_spt_note(struct edm_spt *spt, uint64_t key, uint64_t value);
size_t edm_spt_notes(const struct edm_spt *spt, uint64_t *pairs, size_t max);
uint64_t edm_spt_count(const struct edm_spt *spt);
uint64_t edm_spt_memory(const struct edm_spt *spt);

/* Changes in a journal: a head of kind and count (two u32), then u64 words, or for RECORD refs and then slots. */
#define EDM_SPT_RECORD 1      /* count refs, count slots */
#define EDM_SPT_CREATE 2      /* region */
#define EDM_SPT_CLONE 3       /* region, into */
#define EDM_SPT_MOVE 4        /* region, start, to, count */
#define EDM_SPT_DROP 5        /* region, start, count */
#define EDM_SPT_DROP_REGION 6 /* region */
#define EDM_SPT_NOTE 7        /* key, value */
#define EDM_SPT_SHARE 8       /* count pairs (slot, references beyond the first) */

#define EDM_SPT_SEALED 1 /* frame flag: every page referred to up to here was synced before it was written */
#define EDM_SPT_LOOSE 2  /* frame flag: written under a sync policy that promises nothing after a loss of power */

struct edm_spt_frame {
    uint32_t magic;
    uint32_t flags;
    uint64_t number;
    uint64_t length; /* bytes of changes behind this header */
    uint32_t checksum;
    uint32_t chain;
};
struct edm_spt_replayed {
    uint64_t frames;  /* read so far; in: the number the first must have */
    uint64_t sealed;  /* frames up to and with the last sealed one */
    uint64_t stop_at; /* in: read no more than so many frames; 0: all */
    uint32_t chain;   /* of the last frame */
    uint32_t flags;   /* of all frames together */
};
uint32_t edm_spt_frame_chain(const struct edm_spt_frame *frame, uint32_t before);
/* Apply changes; spt NULL: only see whether they are well formed. 0, -EBADMSG or -ENOMEM. */
int edm_spt_apply(struct edm_spt *spt, const void *changes, size_t length);
/* Apply all whole frames; returns the bytes they take, or an error as edm_spt_apply. Stops at the first broken one. */
int64_t edm_spt_replay(struct edm_spt *spt, const void *journal, size_t length, struct edm_spt_replayed *state);

/* How many of n refs are of a region that is not the instance's. */
size_t edm_refs_foreign(const struct edm_page_ref *refs, size_t n, uint64_t instance);
/* The first of n pages whose CRC-32C is not its ref's checksum; n if there is none. */
size_t edm_spt_check(const struct edm_page_ref *refs, const void *pages, size_t n);

#define EDM_SCREEN_NEW 0      /* to be stored */
#define EDM_SCREEN_REPEAT 1   /* this version is stored already */
#define EDM_SCREEN_STALE 2    /* a newer version is */
#define EDM_SCREEN_OTHER 3    /* this version is, with other bytes */
#define EDM_SCREEN_CHECKSUM 4 /* the page is not what its checksum says */
#define EDM_SCREEN_FOREIGN 5  /* not the instance's region */
/* What to do with each page of an eviction, given what is stored of it; how many are not EDM_SCREEN_NEW, or -ENOMEM. */
int64_t edm_spt_screen(const struct edm_page_ref *refs, const void *pages, size_t n, uint64_t instance,
                       const uint8_t *found, const uint64_t *versions, const uint32_t *checksums, uint8_t *verdicts);

/* ---- stores: an LMDB file, looked at without LMDB (native/lmdb_*.c) ------------------------------------------- */

#define EDM_LMDB_BAD_MOST 16
#define EDM_LMDB_TABLES_MOST 8
struct edm_lmdb_bad {
    uint64_t page; /* of the LMDB file, 4096 bytes each */
    char table[40];
    char what[88];
};
struct edm_lmdb_table {
    char name[40];
    uint64_t entries;
    uint64_t key_sum;                 /* of the CRC-32C of all keys */
    uint64_t least_bytes, most_bytes; /* of its values */
    int integer_key;
};
struct edm_lmdb_report {
    uint64_t transaction;
    uint64_t pages;       /* in trees or free */
    uint64_t unaccounted; /* neither */
    uint32_t bad_count;   /* no more than are listed; more there may be */
    uint32_t table_count;
    uint32_t guards_damaged;     /* bit: of that meta page; the meta pages are sound */
    uint32_t older_meta_damaged; /* the one that is not in use */
    struct edm_lmdb_bad bad[EDM_LMDB_BAD_MOST];
    struct edm_lmdb_table tables[EDM_LMDB_TABLES_MOST];
};
/* Check every page of every tree. lost_power: transactions may be missing; deep: large values' headers, too, which is a
   read for each. 0, with what was found in the report, or -errno. */
int edm_lmdb_check(int file, int lost_power, int deep, struct edm_lmdb_report *report);
/* After a commit: write down what the meta pages hold, so that a flipped bit there is found. 0 or -errno. */
int edm_lmdb_guard(int file);

/* The first of n keys of a table of large values whose value, if there is one, does not stand behind the header that it
   should; n if all do. Deleting a value, or writing over it, frees as many pages as its header says. map: where LMDB
   has its file mapped; map_bytes 0: not known, and nothing is looked at. */
size_t edm_lmdb_unsound(const char *table, const uint64_t *keys, size_t n, uintptr_t map, size_t map_bytes);

/* The SPT's rows in LMDB (native/lmdb_rows.c): a key of two words and a row of four for each of n pages. The sum,
   modulo 2^64, of the rows' checksums. */
uint64_t edm_lmdb_rows(const struct edm_page_ref *refs, const uint64_t *slots, size_t n, uint64_t *keys,
                       uint64_t *rows);
/* How many rows there are of n pages, and the sum of their checksums. 0: not told, since the pages are not of one
   region and in order. */
int edm_lmdb_rows_there(const struct edm_spt *spt, const struct edm_page_ref *refs, size_t n, uint64_t *count,
                        uint64_t *sum);

/* Until leave, in this thread, a crash (SIGSEGV, SIGBUS, SIGABRT, SIGFPE) ends the process with this text on stderr,
   and status 1. The text must last that long. */
void edm_crash_guard_enter(const char *text);
void edm_crash_guard_leave(void);

/* ---- stores: page files (native/page_file.c) -------------------------------------------------------------------- */

/* Pages in slots of segment files in one directory; a slot in use is never written. One thread at a time. What returns
   int gives 0 or -errno (-EBADF: pf is NULL), and edm_pf_error says which slot (UINT64_MAX: none in particular). */
struct edm_pf;
struct edm_pf_error {
    int32_t error;
    uint64_t slot;
};
struct edm_pf_figures {
    uint64_t pages;
    uint64_t limit_pages;
    uint64_t segments;
    uint64_t disk_bytes;
    uint64_t missing;    /* segments the SPT refers to, whose file is gone */
    uint64_t header_bad; /* segments whose header is damaged */
};

/* dir: stays the caller's, open until edm_pf_close. limit_pages 0: none. NULL: no memory. */
struct edm_pf *edm_pf_open(int dir, uint32_t segment_pages, uint64_t limit_pages, int direct);
void edm_pf_close(struct edm_pf *pf);
/* Take over the segment file of that number; missing: there is none. 1: its header is damaged. */
int edm_pf_attach(struct edm_pf *pf, uint64_t number, int missing);
/* Once, after attaching: the slots in use. Segments without any are removed. */
int edm_pf_live(struct edm_pf *pf, const uint64_t *slots, size_t n);
/* The same where not all slots in use are known: nothing is removed, and nothing may be written. */
int edm_pf_mark(struct edm_pf *pf, const uint64_t *slots, size_t n);
/* Write n pages to fresh slots. -EDQUOT: the limit; nothing is kept on an error. */
int edm_pf_put(struct edm_pf *pf, const void *pages, const uint32_t *sums, size_t n, uint64_t *slots);
/* Read n slots. -ENOENT: not in use, or its file is gone; -ENODATA: the file is too short; -EBADMSG: checksum. */
int edm_pf_get(struct edm_pf *pf, const uint64_t *slots, size_t n, void *into);
void edm_pf_release(struct edm_pf *pf, const uint64_t *slots, size_t n);
int edm_pf_sync(struct edm_pf *pf);
/* Where in its file a slot's page begins. */
uint64_t edm_pf_offset(const struct edm_pf *pf, uint64_t slot);
/* Give the file system back what runs of at least so many free slots take. */
int edm_pf_trim(struct edm_pf *pf, uint32_t least_pages);
void edm_pf_stat(const struct edm_pf *pf, struct edm_pf_figures *out);
void edm_pf_error(const struct edm_pf *pf, struct edm_pf_error *out);

#define EDM_PF_READ 0
#define EDM_PF_WRITE 1
#define EDM_PF_SYNC 2
#define EDM_PF_OPEN 3
#define EDM_PF_PUNCH 4
#define EDM_PF_CALLS 5
/* For tests: after `after` calls of a kind, the next `count` (UINT32_MAX: all) fail with `error`; -1: come short. */
int edm_pf_fail(struct edm_pf *pf, int call, uint32_t after, uint32_t count, int error);

/* ---- the C tables of edm_ops.h that EDM's own parts offer (native/server.c, slabs.c) ----------------------------- */

/* The journal of the SPT store `file` as the next frame needs it; it is the SPT store's, which may write frames, too.
 */
struct edm_journal {
    int32_t fd;
    uint32_t flags;  /* of frames written here: EDM_SPT_LOOSE or 0 */
    uint32_t chain;  /* of the last frame */
    uint32_t held;   /* changes that are not written yet: until they are, nothing is written here */
    uint64_t end;    /* bytes */
    uint64_t frames; /* all, and ... */
    uint64_t pages;  /* ... the pages in those since the last flush */
    /* From here on the SPT store has to flush or compact: nothing is written here. */
    uint64_t most_bytes, most_frames, most_pages;
    void *frame;
    uint64_t frame_bytes; /* how large that is */
    uint64_t unwritten;   /* bytes of changes, behind the header in `frame`, of a write that failed */
    int32_t fail;         /* for tests: the errno to be had instead of the next write; -1: it comes short */
};
/* Whether n pages may be written here now, with the memory for it: 0 or -EAGAIN. */
int edm_journal_ready(struct edm_journal *journal, size_t n);
/* Write pages and their slots as one frame, after that said 0. 0; or a negative errno: the changes are `unwritten`, and
   the next frame goes where this one would have gone. */
int edm_journal_record(struct edm_journal *journal, const struct edm_page_ref *refs, const uint64_t *slots, size_t n);
/* Give the frame's memory back. */
void edm_journal_clear(struct edm_journal *journal);

/* A page server over an SPT table and a page store's table ("edm.page_store_ops"): gets of stored pages, evictions in
   which nothing is out of the ordinary; all else is left to Python. Both must outlive it. NULL: no memory.
   Every call but those through the table wants its lock held, or no other thread there. */
struct edm_server;
struct edm_server_counts {
    uint64_t gets;
    uint64_t found;
    uint64_t stored;
};
struct edm_page_name {
    uint64_t region, index;
};
struct edm_server *edm_server_new(struct edm_spt *spt, const void *page_store);
void edm_server_free(struct edm_server *server);
/* "edm.server_ops" */
const void *edm_server_table(const struct edm_server *server);
/* Its lock, for whoever changes the stores by other ways; 0 or -ETIMEDOUT. The same thread leaves. */
int edm_server_enter(struct edm_server *server, double timeout_s);
void edm_server_leave(struct edm_server *server);
/* What the table does, for who has the lock. 0 or -EAGAIN. */
int edm_server_get(struct edm_server *server, uint32_t instance, struct edm_page_ref *refs, size_t n, void *into);
int edm_server_evict(struct edm_server *server, uint32_t instance, struct edm_page_ref *refs, size_t n,
                     const void *pages);
/* Evictions are carried out here, too; not before this is called. journal: where they are committed; NULL: the SPT
   store keeps nothing. lazy: slots that are let go of wait for a flush; they are `most_waiting` at most. */
void edm_server_evicts(struct edm_server *server, struct edm_journal *journal, int lazy, uint64_t most_waiting);
/* The stores are closed: nothing is answered here any more. */
void edm_server_close(struct edm_server *server);
/* Whether those through the table are; any thread, without the lock. */
void edm_server_open_table(struct edm_server *server, int open);
/* Whether there are changes that are not committed, so that no eviction is carried out here. */
void edm_server_blocked(struct edm_server *server, int blocked);
/* Slots that wait, whoever let go of them: more of them (0 or -ENOMEM); how many there are; all, which are forgotten.
 */
int edm_server_put_by(struct edm_server *server, const uint64_t *slots, size_t n);
size_t edm_server_waiting(const struct edm_server *server);
void edm_server_take_waiting(struct edm_server *server, uint64_t *out);
/* Pages recorded here by an eviction that could not be committed: how many; copied to `out` and forgotten unless that
   is NULL. Until then it is blocked. */
size_t edm_server_unsaved(struct edm_server *server, struct edm_page_name *out);
/* Pages answered and stored so far; with the lock held. */
void edm_server_counts(struct edm_server *server, struct edm_server_counts *out);

/* "edm.channel_ops" around an "edm.server_ops" of this process. */
struct edm_call_channel;
struct edm_call_channel *edm_call_channel_new(const void *server, uint32_t instance);
void edm_call_channel_free(struct edm_call_channel *channel);
const void *edm_call_channel_table(const struct edm_call_channel *channel);

/* Pages in slots of slabs of memory, made as needed and given back when they are empty. One thread at a time. */
struct edm_slabs;
struct edm_slabs_figures {
    uint64_t pages;
    uint64_t bytes; /* of memory taken from the system */
};
/* NULL: no memory. */
struct edm_slabs *edm_slabs_new(uint32_t slab_pages, uint64_t limit_pages);
void edm_slabs_free(struct edm_slabs *slabs);
/* Let go of all pages and their memory. */
void edm_slabs_clear(struct edm_slabs *slabs);
/* -EDQUOT: the limit; -ENOMEM; nothing is kept on an error. */
int edm_slabs_put(struct edm_slabs *slabs, const void *pages, const uint32_t *sums, size_t n, uint64_t *slots);
/* sums: what the pages' checksums must be, besides what was put with them; or NULL. -ENOENT, -EBADMSG: see
 * edm_slabs_failed. */
int edm_slabs_get(struct edm_slabs *slabs, const uint64_t *slots, const uint32_t *sums, size_t n, void *into);
uint64_t edm_slabs_failed(const struct edm_slabs *slabs);
void edm_slabs_release(struct edm_slabs *slabs, const uint64_t *slots, size_t n);
/* Before the first put: slots up to this one belong to a former server, and are not given again. */
void edm_slabs_keep_off(struct edm_slabs *slabs, uint64_t slot);
/* Where a slot's page is; NULL: nowhere. For tests. */
void *edm_slabs_page(const struct edm_slabs *slabs, uint64_t slot);
void edm_slabs_stat(const struct edm_slabs *slabs, struct edm_slabs_figures *out);
/* "edm.page_store_ops" */
const void *edm_slabs_table(const struct edm_slabs *slabs);

/* "edm.page_store_ops" over page files; writes: puts, too. NULL: no memory. */
void *edm_pf_table_new(struct edm_pf *pf, int writes);
void edm_pf_table_free(void *table);
