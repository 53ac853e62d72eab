// Where a fault worker runs. The faulting thread is blocked, so its CPU is free; waking a thread on another CPU costs
// an order of magnitude more than the fault itself. So the worker goes where the program's faults come from. Where no
// CPU sleeps none is dear to wake, and the kernel places both, unless others want all of them: each would wait for its
// turn there, twice a fault.
#include "engine.h"

#include <fcntl.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define LOOK_EVERY 64                // faults
#define LOOK_SELDOM 256              // … where the program was found on this CPU, and faults are quick
#define QUICK_NS 30000               // a fault between two CPUs that sleep takes several times as long
#define SETTLED 2                    // looks in a row that found the program on the same other CPU
#define CROWDED_LEAST_NS 200000000u  // after CPUs were found crowded, until the kernel may place threads again
#define CROWDED_MOST_NS 3200000000u  // … where it finds them crowded each time

static ssize_t stat_read(struct worker *w, int tid, char *text, size_t bytes) {
    char path[32];
    if (w->stat_tid != tid) {
        worker_forget_thread(w);
        snprintf(path, sizeof path, "/proc/%d/stat", tid);
        w->stat_fd = open(path, O_RDONLY | O_CLOEXEC);
        if (w->stat_fd < 0)
            return -1;
        w->stat_tid = tid;
    }
    return pread(w->stat_fd, text, bytes, 0);
}

void worker_forget_thread(struct worker *w) {
    if (w->stat_tid)
        close(w->stat_fd);
    w->stat_tid = 0;
}

// The CPU a thread ran on last, or -1. Source: proc_pid_stat(5), field 39.
static int thread_cpu(struct worker *w, int tid) {
    char text[512];
    ssize_t n = stat_read(w, tid, text, sizeof text - 1);
    if (n <= 0) {
        worker_forget_thread(w);  // it has ended; its number may be another's
        return -1;
    }
    text[n] = 0;
    char *p = strrchr(text, ')');  // the name before it may hold anything
    for (int field = 2; p && field < 39; field++)
        p = strchr(p + 1, ' ');
    return p ? atoi(p + 1) : -1;
}

static bool run_on(int tid, int cpu) {
    cpu_set_t set;
    CPU_ZERO(&set);
    CPU_SET(cpu, &set);
    return sched_setaffinity(tid, sizeof set, &set) == 0;
}

// To where it is to be, if it is not there yet: home is a CPU, or -1, any of those it had. cpu: where it was put.
static void settle(int tid, int home, int *cpu, const cpu_set_t *had) {
    if (home == *cpu)
        return;
    if (home >= 0 ? run_on(tid, home) : sched_setaffinity(tid, sizeof *had, had) == 0)
        *cpu = home;
}

void thread_home(struct edm_engine *g, int *cpu) { settle(0, atomic_load(&g->home), cpu, &g->cpus); }

void sidecar_home(struct space *s) {
    int home = atomic_load(&s->engine->home);
    if (home >= 0 && s->sidecar_cpu < 0 && sched_getaffinity(s->sidecar_pid, sizeof s->sidecar_cpus, &s->sidecar_cpus))
        return;
    settle(s->sidecar_pid, home, &s->sidecar_cpu, &s->sidecar_cpus);
}

bool cpus_crowded(const struct edm_engine *g) { return atomic_load(&g->crowded_until); }

// A fault worker's offer of its CPU was taken for a whole turn, twice within a short time.
void cpus_found_crowded(struct edm_engine *g) {
    uint64_t now = now_ns(), none = 0, before = atomic_load(&g->crowded_ns);
    bool again = now - atomic_load(&g->crowded_over) < CROWDED_LEAST_NS;
    uint64_t ns = !again ? CROWDED_LEAST_NS : before < CROWDED_MOST_NS / 2 ? before * 2 : CROWDED_MOST_NS;
    if (atomic_compare_exchange_strong(&g->crowded_until, &none, now + ns))
        atomic_store(&g->crowded_ns, ns);
}

// Whether workers go where the faults come from.
static bool follows(struct edm_engine *g) {
    if (!g->cfg.follow || g->cfg.idle != EDM_IDLE_AWAKE)
        return g->cfg.follow;
    uint64_t until = atomic_load(&g->crowded_until), now = until ? now_ns() : 0;
    if (until && now >= until && atomic_compare_exchange_strong(&g->crowded_until, &until, 0))
        atomic_store(&g->crowded_over, now);
    return until > now;
}

// Called for each fault this worker takes; moves the worker when the program was seen several times on another CPU. The
// first worker takes the engine's other threads along: on the program's own CPU a page that leaves needs no interrupt
// on another one, and nobody has to be woken there.
void worker_follow(struct edm_engine *g, int worker, int tid) {
    if (worker < 0 || tid <= 0)
        return;
    struct worker *w = &g->worker[worker];
    if (!follows(g)) {
        settle(0, -1, &w->cpu, &g->cpus);
        w->beside = false;
        if (worker == 0)
            atomic_store(&g->home, -1);
        return;
    }
    if (++w->faults < w->patience && w->cpu >= 0)
        return;
    w->faults = 0;
    int cpu = thread_cpu(w, tid);
    uint64_t now = now_ns();
    bool quick = now - w->looked_ns < (uint64_t)w->patience * QUICK_NS;
    w->looked_ns = now;
    w->seen = cpu == w->seen_cpu ? w->seen + 1 : 0;
    w->seen_cpu = cpu;
    if (cpu >= 0 && cpu < CPU_SETSIZE && cpu != w->cpu && (w->cpu < 0 || w->seen >= SETTLED) && run_on(0, cpu)) {
        w->cpu = cpu;
        if (worker == 0)
            atomic_store(&g->home, cpu);
    }
    w->beside = cpu >= 0 && cpu == w->cpu;
    w->patience = w->beside && quick ? LOOK_SELDOM : LOOK_EVERY;
}
