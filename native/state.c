// The segment of state.h: made once, mapped by each DM-Handler in turn.
#include "state.h"

#include <errno.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "engine.h"

#define STATE_VERSION 4

static uint64_t whole_pages(uint64_t bytes) { return (bytes + PAGE_SIZE_ - 1) & ~(PAGE_SIZE_ - 1); }

// Head, spaces, items, tables of acknowledged.c, slots. Most of it is never touched, and takes no memory.
static const uint64_t head_bytes = PAGE_SIZE_;
static uint64_t spaces_bytes(void) { return whole_pages(STATE_SPACES * sizeof(struct state_space)); }
static uint64_t items_bytes(void) { return whole_pages((uint64_t)STATE_ITEMS * sizeof(struct outbox_item)); }
static uint64_t known_bytes(void) { return whole_pages((2ull << STATE_KNOWN_MOST) * sizeof(struct state_known)); }
static uint64_t slots_at(void) { return head_bytes + spaces_bytes() + items_bytes() + known_bytes(); }
static uint64_t all_bytes(uint32_t slots) { return slots_at() + (uint64_t)slots * PAGE_SIZE_; }

static int state_map(struct edm_engine *g, int fd, uint32_t slots) {
    char *p = mmap(NULL, all_bytes(slots), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, fd, 0);
    if (p == MAP_FAILED)
        return -errno;
    g->state_fd = fd;
    g->state = (struct state_head *)(void *)p;
    g->state_space = (struct state_space *)(void *)(p + head_bytes);
    g->item = (struct outbox_item *)(void *)(p + head_bytes + spaces_bytes());
    g->known_pages = (struct state_known *)(void *)(p + head_bytes + spaces_bytes() + items_bytes());
    g->slots = (uint8_t *)(p + slots_at());
    g->nslots_all = slots;
    return 0;
}

// Beyond the buffer, room for one batch that has left its program: the LPET's, or one found half moved.
int state_create(struct edm_engine *g, uint32_t slots) {
    uint32_t all = slots + EDM_STAGING_PAGES;
    int fd = (int)syscall(SYS_memfd_create, "edm-state", 1u /* MFD_CLOEXEC */);
    int r = fd < 0 || ftruncate(fd, (off_t)all_bytes(all)) ? -errno : state_map(g, fd, all);
    if (r) {
        if (fd >= 0)
            close(fd);
        return r;
    }
    *g->state = (struct state_head){.magic = STATE_MAGIC,
                                    .version = STATE_VERSION,
                                    .segment = {fd, -1},
                                    .listen = {-1, -1},
                                    .dev = {-1, -1},
                                    .slots = slots};
    return 0;
}

int state_take_over(struct edm_engine *g, int fd) {
    struct state_head head;
    if (pread(fd, &head, sizeof head, 0) != sizeof head)
        return -EINVAL;
    if (head.magic != STATE_MAGIC || head.version != STATE_VERSION)
        return -EPROTO;
    return state_map(g, fd, head.slots + EDM_STAGING_PAGES);
}

void state_close(struct edm_engine *g) {
    if (g->state)
        munmap(g->state, all_bytes(g->nslots_all));
    if (g->state_fd >= 0)
        close(g->state_fd);
    g->state = NULL;
    g->state_fd = -1;
}

// Whether something was done, by a DM-Handler that died: by what was committed then. What its successor commits for one
// program says nothing of the others.
static void settle(struct state_space *t, uint64_t committed) {
    if (t->moving && committed > t->moved_from)
        t->moving = 0;
    STATE_BARRIER();
    t->moved_from = NOT_YET;
    uint64_t at = t->event_mark % EVENT_AT + (committed > t->event_mark / EVENT_AT);
    __atomic_store_n(&t->event_mark, NOT_YET * EVENT_AT + at, __ATOMIC_RELEASE);
    if (committed > t->late_mark / EVENT_AT)
        t->late[t->late_mark % EVENT_AT].event = 0;
    STATE_BARRIER();
    t->late_mark = NOT_YET * EVENT_AT;
}

void state_settle(struct edm_engine *g) {
    for (uint32_t i = 0; i < g->state->spaces; i++) {
        struct state_space *t = &g->state_space[i];
        if (t->used && t->born <= g->state->committed)
            settle(t, g->state->committed);
        else
            t->used = 0;
    }
}

void state_commit(struct edm_engine *g) { __atomic_store_n(&g->state->committed, g->seq, __ATOMIC_RELEASE); }

// Valid with the next outbox item.
struct state_space *state_space_new(struct edm_engine *g) {
    uint32_t i = g->state_hint;
    while (i < STATE_SPACES && g->state_space[i].used)
        i++;
    if (i == STATE_SPACES)
        return NULL;
    g->state_hint = i + 1;
    struct state_space *t = &g->state_space[i];
    memset(t, 0, sizeof *t);  // the events too: the kernel must find memory there
    t->born = g->seq + 1;
    t->event_mark = t->late_mark = NOT_YET * EVENT_AT;
    t->uffd[0] = t->uffd[1] = t->ctl[0] = t->ctl[1] = -1;
    STATE_BARRIER();
    if (g->state->spaces <= i)
        g->state->spaces = i + 1;
    t->used = 1;
    return t;
}

void state_space_gone(struct edm_engine *g, struct space *s) {
    uint32_t i = (uint32_t)(s->state - g->state_space);
    s->state->used = 0;
    s->state = NULL;
    if (i < g->state_hint)
        g->state_hint = i;
}
