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
    /* As PageServer.get and .evict. 0; -EAGAIN with nothing changed: the same call through Python decides. */
    int (*get)(void *self, uint32_t instance, struct edm_page_ref *refs, uint32_t n, void *into);
    int (*evict)(void *self, uint32_t instance, struct edm_page_ref *refs, uint32_t n, const void *pages);
};

/* "edm.page_store_ops": offered by a PageStore. One thread at a time. */
struct edm_page_store_ops {
    uint32_t version, bytes;
    void *self;
    /* As PageStore.get. 0 or a negative errno: the same call through Python says what it was. */
    int (*get)(void *self, const uint64_t *slots, uint32_t n, void *into);
};
