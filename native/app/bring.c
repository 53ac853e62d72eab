// What reach.c asks for, of the DM-Handler of this run: it has the program's own pages, and those of all other programs
// of the run.
#include "bring.h"

#include <errno.h>
#include <stddef.h>
#include <sys/syscall.h>
#include <time.h>

#include "calls.h"
#include "own.h"
#include "reach.h"
#include "talk.h"

#define QUICK_TURNS 1000  // for a lock that is held for a few microseconds
#define LOCK_TURNS 11000  // ten seconds and more

static struct edm_ctl *control;

void bring_to(struct edm_ctl *c) { __atomic_store_n(&control, c, __ATOMIC_RELEASE); }

static struct edm_ctl *own(void) {
    struct edm_ctl *c = __atomic_load_n(&control, __ATOMIC_ACQUIRE);
    return c && own_process() ? c : NULL;
}

// Whether there was an answer.
static bool ask(const struct edm_ask *what, struct edm_answer *answer) {
    int s = greet_handler(EDM_HELLO_ASK);
    long n = -1;
    if (s >= 0 && send_message(s, what, sizeof *what, NULL, 0) > 0)
        do
            n = CALL6(SYS_recvfrom, s, answer, sizeof *answer, 0, 0, 0);
        while (n == -EINTR);
    close_fd(s);
    return n == (long)sizeof *answer && answer->magic == EDM_CTL_MAGIC;
}

// As with a fault, a captured program waits while there is no DM-Handler.
bool reach_bring(int32_t pid, uint64_t first, uint32_t count, bool write) {
    struct edm_ask what = {EDM_CTL_MAGIC, write ? EDM_ASK_BRING_WRITABLE : EDM_ASK_BRING, pid, count, first};
    struct edm_answer answer;
    if (restricted())
        return false;
    while (!ask(&what, &answer)) {
        struct timespec pause = {0, 10000000};
        if (!own())
            return false;
        CALL(SYS_nanosleep, &pause, 0, 0);
    }
    uint64_t any = 0;
    for (uint32_t i = 0; i < EDM_ASK_PAGES / 64 && !answer.status; i++)
        any |= answer.pages[i];
    return any != 0;
}

void reach_hold(void) {
    struct edm_ctl *c = own();
    if (!c)
        return;
    __atomic_fetch_add(&c->forking, 1, __ATOMIC_SEQ_CST);
    // A move that began before. A sidecar that was killed in one keeps the lock: one that does not end it for five
    // seconds is ended (native/sidecar.c), so that nothing moves any more after that.
    struct timespec pause = {0, 1000000};
    for (int i = 0; i < LOCK_TURNS && __atomic_load_n(&c->lock, __ATOMIC_SEQ_CST) == EDM_LOCK_SIDECAR; i++)
        if (i < QUICK_TURNS)
            CALL(SYS_sched_yield, 0, 0, 0);
        else
            CALL(SYS_nanosleep, &pause, 0, 0);
}

void reach_let_go(void) {
    struct edm_ctl *c = own();
    if (c)
        __atomic_fetch_sub(&c->forking, 1, __ATOMIC_SEQ_CST);
}
