// Keeps CPUs awake while a program faults. Between a fault and its answer the program's CPU has nothing to do, and a
// CPU that sleeps takes several times as long to wake as the fault itself, most of all a virtual one, which the host
// has to start again. So while faults follow each other closely, the kernel is asked to let no CPU sleep (a request for
// latency, see pm_qos_interface in the kernel's documentation). Where that cannot be, and one thread faults, threads of
// class SCHED_IDLE take what is left of the other CPUs: they are not idle then, so that the program stays on the CPU of
// its fault thread, and whoever else wants them has them at once. Several threads that fault want the other CPUs.
#include "engine.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/futex.h>
#include <sched.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <unistd.h>

#define AWAKE_NEAR_NS 500000u     // faults so close to each other are a row
#define AWAKE_ROW 4               // in a row, until CPUs are kept awake
#define AWAKE_LINGER_NS 10000000  // after the last one

#define NEAR_NS 200000u  // the same for CPUs that are occupied
#define ROW 16
#define LINGER_NS 300000u
#define ALONE_NS 100000000u  // after a fault of another thread

#define PM_QOS_NO_CONSTRAINT 2000000000  // what a request has until it is written to. Source: linux/pm_qos.h

static void latency_ask(struct edm_engine *g, int32_t us) {
    if (write(g->latency_fd, &us, sizeof us) != (ssize_t)sizeof us && !g->idle_refused) {
        g->idle_refused = true;
        engine_error(g, "asking for a latency of %d us: errno %d", us, errno);
    }
}

// Called with the lock held.
static void stay_awake(struct edm_engine *g, uint64_t now) {
    g->idle_row = now - g->idle_last < AWAKE_NEAR_NS ? g->idle_row + 1 : 0;
    g->idle_last = now;
    if (g->idle_row < AWAKE_ROW)
        return;
    g->idle_until = now + AWAKE_LINGER_NS;
    if (g->awake)
        return;
    g->awake = true;
    latency_ask(g, (int32_t)g->cfg.idle_us);
}

// Called by the LPET with the lock held, in each of its rounds.
void idle_rest(struct edm_engine *g) {
    if (!g->awake || now_ns() < g->idle_until)
        return;
    g->awake = false;
    latency_ask(g, PM_QOS_NO_CONSTRAINT);
}

static bool wanted(struct edm_engine *g, const struct seat *seat) {
    return now_ns() < atomic_load(&g->idle_until) && atomic_load(&g->home) != seat->cpu;
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

// Called with the lock held.
static void stay_occupied(struct edm_engine *g, uint32_t thread, uint64_t now) {
    if (thread != g->beside_thread) {
        if (g->beside_thread)
            g->beside_alone = now + ALONE_NS;
        g->beside_thread = thread;
    }
    g->idle_row = now - g->idle_last < NEAR_NS ? g->idle_row + 1 : 0;
    g->idle_last = now;
    if (g->idle_row < ROW || now < g->beside_alone)
        return;
    atomic_store(&g->idle_until, now + LINGER_NS);
    for (uint32_t i = 0; i < g->nseats; i++)
        if (atomic_load(&g->seat[i].asleep) && atomic_load(&g->home) != g->seat[i].cpu)
            seat_wake(&g->seat[i]);
}

// Called with the lock held for each fault that a worker has read.
void idle_fault(struct edm_engine *g, uint32_t thread) {
    if (g->latency_fd >= 0)
        stay_awake(g, now_ns());
    else if (g->nseats)
        stay_occupied(g, thread, now_ns());
}

// On every CPU that this process may use, unless there is only one, or more than there are seats.
static void seats_start(struct edm_engine *g) {
    cpu_set_t may;
    if (sched_getaffinity(0, sizeof may, &may))
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

void idle_start(struct edm_engine *g) {
    if (g->cfg.idle == EDM_IDLE_OCCUPY)
        seats_start(g);
    if (g->cfg.idle != EDM_IDLE_AWAKE)
        return;
    g->latency_fd = open("/dev/cpu_dma_latency", O_WRONLY | O_CLOEXEC);
    if (g->latency_fd < 0)
        engine_error(g, "/dev/cpu_dma_latency: errno %d", errno);
}

void idle_stop(struct edm_engine *g) {
    if (g->latency_fd >= 0)
        close(g->latency_fd);  // and with it what was asked for
    g->latency_fd = -1;
    for (uint32_t i = 0; i < g->nseats; i++) {
        seat_wake(&g->seat[i]);
        pthread_join(g->seat[i].thread, NULL);
    }
    g->nseats = 0;
}
