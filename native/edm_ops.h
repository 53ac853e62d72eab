/*
 * C interfaces that a plugin may offer beside its Python ones, so that a page fault never enters Python: the object's
 * attribute `__edm_ops__` is a PyCapsule whose name is the one given here, around one of these tables. What has no such
 * attribute is called through Python; see edm/ops.py and docs/plugins.md.
 *
 * Every table starts with `version` (EDM_OPS_VERSION) and `bytes` (its own size); a reader takes a table of the same
 * version that is at least as large as the one it knows. `self` is handed to every call and lives as long as the Python
 * object that offers the table. Calls are made without the GIL and never call into Python.
 *
 * Needs <stdint.h> and edm_abi.h (struct edm_page_ref) before it; plain declarations, cffi reads this file too.
 */

#define EDM_OPS_VERSION 1

/* "edm.channel_ops": offered by a Channel. One thread at a time. */
struct edm_channel_ops {
    uint32_t version, bytes;
    void *self;
    /* RequestGetPage for n refs: wait, and fill statuses, versions, checksums and pages in place, page i of `into` when
       refs[i].status is 1. 0; or a negative errno with nothing to be used: the caller then makes the same call through
       Python, where deadlines, repeats and errors are decided. */
    int (*fetch)(void *self, struct edm_page_ref *refs, uint32_t n, void *into);
    /* RequestEvictPage: fills statuses (0: stored). 0 or a negative errno, as above. */
    int (*evict)(void *self, struct edm_page_ref *refs, uint32_t n, const void *pages);
};

/* "edm.server_ops": offered by a PageServer. Any thread, at any time: it has a lock of its own, which its Python calls
   take as well. */
struct edm_server_ops {
    uint32_t version, bytes;
    void *self;
    /* As PageServer.get and .evict. 0; -EAGAIN: the same call through Python decides. */
    int (*get)(void *self, uint32_t instance, struct edm_page_ref *refs, uint32_t n, void *into);
    int (*evict)(void *self, uint32_t instance, struct edm_page_ref *refs, uint32_t n, const void *pages);
};

/* "edm.page_store_ops": offered by a PageStore. One thread at a time. A table may end behind `get`, and what is NULL is
   not offered. */
struct edm_page_store_ops {
    uint32_t version, bytes;
    void *self;
    /* As PageStore.get. 0 or a negative errno: the same call through Python says what it was. */
    int (*get)(void *self, const uint64_t *slots, uint32_t n, void *into);
    /* The same for who knows the pages' checksums, and so need not check what comes: -EBADMSG if one is not that. */
    int (*get_known)(void *self, const uint64_t *slots, const uint32_t *sums, uint32_t n, void *into);
    /* As PageStore.put, of a store whose `sync` has nothing to do: 0, or a negative errno with nothing kept. */
    int (*put)(void *self, const void *pages, const uint32_t *sums, uint32_t n, uint64_t *slots);
    /* As PageStore.free; there where `put` is. */
    void (*release)(void *self, const uint64_t *slots, uint32_t n);
};

/* "edm.policy_ops": offered by what EvictionPolicySpec.open returns. The engine keeps leaves (up to 64 neighbouring
   pages that leave together) in queues and evicts from queue 0 on, coldest first; the policy says where a leaf stands.
   Called with the engine's lock held, often: no waiting, no system calls. */
#define EDM_POLICY_QUEUES 4
#define EDM_POLICY_NOWHERE 0xffffffffu /* the leaf stands in no queue yet */
#define EDM_POLICY_STAY 0xffffffffu
#define EDM_POLICY_LEAVE 0xffffffffu

enum edm_policy_idle { EDM_POLICY_UNKNOWN = -1, EDM_POLICY_TOUCHED = 0, EDM_POLICY_IDLE = 1 };

struct edm_policy_view {
    uint64_t capacity; /* pages: the local memory */
    uint64_t pages[4]; /* resident in each queue (EDM_POLICY_QUEUES) */
};

struct edm_policy_leaf {
    uint32_t queue; /* where it stands, or EDM_POLICY_NOWHERE */
    uint32_t pages; /* resident */
    uint64_t away;  /* pages evicted anywhere since one of it last was; UINT64_MAX: none ever was */
    uint32_t back;  /* 1: the page that came had been evicted */
    uint32_t reserved;
};

struct edm_policy_ops {
    uint32_t version, bytes;
    void *self;
    /* Not 0: `leaving` wants to know whether the leaf was touched, from the kernel's idle bits where it has them. */
    uint32_t looks, reserved;
    /* A page came into a leaf: the queue at whose hot end it stands from now on, or EDM_POLICY_STAY. */
    uint32_t (*arrived)(void *self, const struct edm_policy_view *view, const struct edm_policy_leaf *leaf);
    /* After that, until it returns 0: 1, and the coldest leaf of *from goes to the hot end of *to. NULL: never. */
    int (*balance)(void *self, const struct edm_policy_view *view, uint32_t *from, uint32_t *to);
    /* A leaf is about to leave: EDM_POLICY_LEAVE, or the queue at whose hot end it stands instead. `idle`: enum
       edm_policy_idle. NULL: it leaves. */
    uint32_t (*leaving)(void *self, const struct edm_policy_view *view, const struct edm_policy_leaf *leaf, int idle);
};
