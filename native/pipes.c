// Buffers that a program has given to pipes (vmsplice), as libedm_app.so noted them before the call. A pipe has a
// reference to their pages, which a move would not mind; but what the program writes to a page that has come back from
// the memory server is not in the page that the pipe has. So those that were given last stay. When one has been read is
// not told: it may leave once enough others have been given. Nor is what was unmapped forgotten: a buffer may be given
// again that is mapped at the same place, and is not told again then.
#include "engine.h"

#define LOCAL_PART 4       // of the budget, at most, for them
#define MOST_PAGES 16384u  // of a program

void pipes_look(struct space *s) {
    uint32_t next = s->ctl ? __atomic_load_n(&s->ctl->given_next, __ATOMIC_SEQ_CST) : 0;
    if (next == s->given_seen)
        return;
    uint64_t local = s->engine->limit / LOCAL_PART, most = local && local < MOST_PAGES ? local : MOST_PAGES;
    bool all = true;
    ranges_free(&s->given);
    uint32_t kept = 0;
    for (uint32_t i = 1; i <= EDM_GIVEN && i <= next && most; kept = i++) {
        const struct edm_hint *h = &s->ctl->given[(next - i) % EDM_GIVEN];
        if (__atomic_load_n(&h->number, __ATOMIC_ACQUIRE) != next - i + 1) {
            all = false;  // being written, before its call; or over, by one that is
            continue;
        }
        uint64_t a = h->address >> PAGE_SHIFT, n = ((h->address % PAGE_SIZE_ + h->bytes - 1) >> PAGE_SHIFT) + 1;
        n = n < most ? n : most;
        if (a >= LSPT_MAX_PAGE || n > LSPT_MAX_PAGE - a)
            continue;
        ranges_add(&s->given, a, a + n);
        most -= n;
    }
    __atomic_store_n(&s->ctl->given_kept, kept, __ATOMIC_RELEASE);
    if (all)
        s->given_seen = next;
}
