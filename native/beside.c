// Keeps a program on the CPU of the fault thread that serves it. A thread that is woken goes to an idle CPU where there
// is one, and waking one there, and being woken from there, takes several times as long as the fault itself. So while
// one thread of a program faults again and again, threads of class SCHED_IDLE take what is left of the other CPUs: they
// are not idle then, and whoever else wants them has them at once. Several threads that fault want the other CPUs.
#include "engine.h"

#include <linux/futex.h>
#include <sched.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <unistd.h>

#define NEAR_NS 200000u      // faults so close to each other are a row
#define ROW 16               // in a row, until it is worth it
#define LINGER_NS 300000u    // after the last one
#define ALONE_NS 100000000u  // after a fault of another thread

static bool wanted(struct edm_engine *g, const struct seat *seat) {
    return now_ns() < atomic_load(&g->beside_until) && atomic_load(&g->home) != seat->cpu;
}

static void *seat_taken(void *argument) {
    struct seat *seat = argument;
    struct edm_engine *g = seat->engine;
    prctl(PR_SET_NAME, "edm-beside", 0, 0, 0);
    struct sched_param least = {0};
    cpu_set_t here;
    CPU_ZERO(&here);
    CPU_SET(seat->cpu, &here);
    if (sched_setscheduler(0, SCHED_IDLE, &least) || sched_setaffinity(0, sizeof here, &here))
        return NULL;
    while (!atomic_load(&g->stop)) {
        if (wanted(g, seat)) {
            for (int i = 0; i < 64; i++)
                __builtin_ia32_pause();
            continue;
        }
        int turn = atomic_load(&seat->turn);
        atomic_store(&seat->asleep, true);
        if (!wanted(g, seat) && !atomic_load(&g->stop))
            syscall(SYS_futex, &seat->turn, FUTEX_WAIT_PRIVATE, turn, NULL, NULL, 0);
        atomic_store(&seat->asleep, false);
    }
    return NULL;
}

static void seat_wake(struct seat *seat) {
    atomic_fetch_add(&seat->turn, 1);
    syscall(SYS_futex, &seat->turn, FUTEX_WAKE_PRIVATE, 1, NULL, NULL, 0);
}

// Called with the lock held for each fault that a worker has read.
void beside_fault(struct edm_engine *g, uint32_t thread) {
    if (!g->nseats)
        return;
    uint64_t now = now_ns();
    if (thread != g->beside_thread) {
        if (g->beside_thread)
            g->beside_alone = now + ALONE_NS;
        g->beside_thread = thread;
    }
    g->beside_row = now - g->beside_last < NEAR_NS ? g->beside_row + 1 : 0;
    g->beside_last = now;
    if (g->beside_row < ROW || now < g->beside_alone)
        return;
    atomic_store(&g->beside_until, now + LINGER_NS);
    for (uint32_t i = 0; i < g->nseats; i++)
        if (atomic_load(&g->seat[i].asleep) && atomic_load(&g->home) != g->seat[i].cpu)
            seat_wake(&g->seat[i]);
}

// On every CPU that this process may use, unless there is only one, or more than there are seats.
void beside_start(struct edm_engine *g) {
    cpu_set_t may;
    if (!g->cfg.keep_beside || sched_getaffinity(0, sizeof may, &may))
        return;
    int n = CPU_COUNT(&may);
    if (n < 2 || n > MAX_SEATS)
        return;
    for (int cpu = 0; cpu < CPU_SETSIZE; cpu++) {
        if (!CPU_ISSET(cpu, &may))
            continue;
        struct seat *seat = &g->seat[g->nseats];
        seat->engine = g;
        seat->cpu = cpu;
        if (pthread_create(&seat->thread, NULL, seat_taken, seat))
            return;
        g->nseats++;
    }
}

void beside_stop(struct edm_engine *g) {
    for (uint32_t i = 0; i < g->nseats; i++) {
        seat_wake(&g->seat[i]);
        pthread_join(g->seat[i].thread, NULL);
    }
    g->nseats = 0;
}
