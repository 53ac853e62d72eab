// Where a fault worker runs. The faulting thread is blocked, so its CPU is free; waking a thread on another CPU costs
// an order of magnitude more than the fault itself. So the worker goes where the program's faults come from.
#include "engine.h"

#include <fcntl.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define LOOK_EVERY 64    // faults
#define LOOK_SELDOM 256  // … where the program was found on this CPU, and faults are quick
#define QUICK_NS 30000   // a fault between two CPUs that sleep takes several times as long
#define SETTLED 2        // looks in a row that found the program on the same other CPU

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

// The calling thread goes where the engine's threads are to be, if it is not there yet; `cpu` is where it was put.
void thread_home(struct edm_engine *g, int *cpu) {
    int home = atomic_load(&g->home);
    if (home >= 0 && home != *cpu && run_on(0, home))
        *cpu = home;
}

void sidecar_home(struct space *s) {
    int home = atomic_load(&s->engine->home);
    if (home >= 0 && home != s->sidecar_cpu && run_on(s->sidecar_pid, home))
        s->sidecar_cpu = home;
}

// Called for each fault this worker takes; moves the worker when the program was seen several times on another CPU. The
// first worker takes the engine's other threads along: on the program's own CPU a page that leaves needs no interrupt
// on another one, and nobody has to be woken there.
void worker_follow(struct edm_engine *g, int worker, int tid) {
    if (!g->cfg.follow || worker < 0 || tid <= 0)
        return;
    struct worker *w = &g->worker[worker];
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
