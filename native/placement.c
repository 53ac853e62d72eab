// Where a fault worker runs. The faulting thread is blocked, so its CPU is free; waking a thread on another CPU costs
// an order of magnitude more than the fault itself. So the worker goes where the program's faults come from.
#include "engine.h"

#include <fcntl.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define LOOK_EVERY 32  // faults

// The CPU a thread ran on last, or -1. Source: proc_pid_stat(5), field 39.
static int thread_cpu(int tid) {
    char path[32], text[512];
    snprintf(path, sizeof path, "/proc/%d/stat", tid);
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        return -1;
    ssize_t n = read(fd, text, sizeof text - 1);
    close(fd);
    if (n <= 0)
        return -1;
    text[n] = 0;
    char *p = strrchr(text, ')');  // the name before it may hold anything
    for (int field = 2; p && field < 39; field++)
        p = strchr(p + 1, ' ');
    return p ? atoi(p + 1) : -1;
}

// Called for each fault this worker takes; moves the worker when the program was seen twice on another CPU.
void worker_follow(struct edm_engine *g, int worker, int tid) {
    if (!g->cfg.follow || worker < 0 || tid <= 0)
        return;
    struct worker *w = &g->worker[worker];
    if (++w->faults < LOOK_EVERY)
        return;
    w->faults = 0;
    int cpu = thread_cpu(tid);
    bool settled = cpu == w->seen_cpu;
    w->seen_cpu = cpu;
    if (cpu < 0 || cpu >= CPU_SETSIZE || cpu == w->cpu || !settled)
        return;
    cpu_set_t set;
    CPU_ZERO(&set);
    CPU_SET(cpu, &set);
    if (sched_setaffinity(0, sizeof set, &set) == 0)
        w->cpu = cpu;
}
