// After a REMOVE event: the kernel tells of madvise(MADV_DONTNEED) before it drops the pages. What is found there until
// it has done so is about to go, and must not be taken for the program's; what is found after that stays (MADV_FREE),
// and joins the LSPT. No event says when, so each thread is looked at until it has been seen outside that system call.
#include <dirent.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "engine.h"

#ifndef SYS_process_madvise
#define SYS_process_madvise 440
#endif

#define SETTLE_NS 1000000000u  // events come in bursts: nothing is looked at before

static ssize_t read_text(int pid, int tid, const char *name, char *text, size_t size) {
    char path[64];
    snprintf(path, sizeof path, "/proc/%d/task/%d/%s", pid, tid, name);
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        return -1;
    ssize_t n = read(fd, text, size - 1);
    close(fd);
    if (n >= 0)
        text[n] = 0;
    return n;
}

// Whether a thread is seen to be somewhere else. Source: proc_pid_syscall(5); "running" tells nothing.
static bool elsewhere(int pid, int tid) {
    char text[256];
    if (read_text(pid, tid, "syscall", text, sizeof text) <= 0 || text[0] == 'r')
        return false;
    long number = strtol(text, NULL, 10);
    return number != SYS_madvise && number != SYS_process_madvise;
}

// Time it has spent outside the kernel, in ticks; UINT64_MAX when the thread has gone. Source: proc_pid_stat(5),
// field 14.
static uint64_t user_ticks(int pid, int tid) {
    char text[512];
    if (read_text(pid, tid, "stat", text, sizeof text) <= 0)
        return UINT64_MAX;
    char *p = strrchr(text, ')');
    for (int field = 2; p && field < 14; field++)
        p = strchr(p + 1, ' ');
    return p ? strtoull(p, NULL, 10) : 0;
}

static void look_at_threads(struct space *s) {
    char path[32];
    snprintf(path, sizeof path, "/proc/%d/task", s->pid);
    DIR *d = opendir(path);
    if (!d)
        return;
    for (struct dirent *e; (e = readdir(d));) {
        int tid = atoi(e->d_name);
        uint64_t ticks = tid > 0 && !elsewhere(s->pid, tid) ? user_ticks(s->pid, tid) : UINT64_MAX;
        if (ticks == UINT64_MAX)
            continue;
        if (s->nsuspects % 16 == 0)
            s->suspect = xrealloc(s->suspect, (s->nsuspects + 16) * sizeof *s->suspect);
        s->suspect[s->nsuspects++] = (struct suspect){tid, ticks};
    }
    closedir(d);
}

// Every thread that was there when the last of the events was read has left that system call since: it was seen in
// another one, or waiting for a page, or it has run in user mode, or it has ended.
static bool all_elsewhere(struct space *s) {
    if (!s->suspects_taken) {
        look_at_threads(s);
        s->suspects_taken = true;
    }
    for (uint32_t i = 0; i < s->nsuspects;) {
        int tid = s->suspect[i].tid;
        uint64_t ticks = user_ticks(s->pid, tid);
        if (ticks > s->suspect[i].user_ticks || elsewhere(s->pid, tid))
            s->suspect[i] = s->suspect[--s->nsuspects];
        else
            i++;
    }
    return s->nsuspects == 0;
}

void removed_note(struct space *s, uint64_t a, uint64_t b) {
    ranges_add(&s->removed, a, b);
    s->removed_at_ns = now_ns();
    s->suspects_taken = false;
    s->nsuspects = 0;
}

// Each thread is looked at for a moment; where one has not been seen outside by then, pages join as after an event.
void removed_unknown(struct space *s) {
    struct timespec t = {0, 2000000};
    s->suspects_taken = false;
    s->nsuspects = 0;
    for (int i = 0; i < 25; i++) {
        if (all_elsewhere(s))
            return;
        nanosleep(&t, NULL);
    }
    removed_note(s, 0, LSPT_MAX_PAGE);
}

bool removed_settled(struct space *s) {
    return s->removed.n && now_ns() - s->removed_at_ns >= SETTLE_NS && all_elsewhere(s);
}
