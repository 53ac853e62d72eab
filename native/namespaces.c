// PID namespaces: what a program takes for a process's number may be another's here. The kernel names the thread of a
// fault by the number that it has in its own namespace, and a sidecar knows no other of itself either.
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "engine.h"

// The number of the one that a process is in ("pid"), or its children will be ("pid_for_children"): "pid:[4026531836]".
// 0, with errno, where that may not be seen, or where there is nobody in it as yet. Source: namespaces(7).
static uint32_t namespace_of(int pid, const char *which) {
    char path[48], name[64];
    snprintf(path, sizeof path, "/proc/%d/ns/%s", pid, which);
    ssize_t n = readlink(path, name, sizeof name - 1);
    name[n > 0 ? n : 0] = 0;
    const char *number = strchr(name, '[');
    return number ? (uint32_t)strtoul(number + 1, NULL, 10) : 0;
}

// A line of a process's or a thread's status, without its name, that ends at its end. Source: proc_pid_status(5).
static const char *status_of(int pid, const char *name, char *text, size_t room) {
    char path[32];
    snprintf(path, sizeof path, "/proc/%d/status", pid);
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    ssize_t n = fd >= 0 ? read(fd, text, room - 1) : -1;
    if (fd >= 0)
        close(fd);
    text[n > 0 ? n : 0] = 0;
    char *line = strstr(text, name), *end = line ? strchr(line + 1, '\n') : NULL;
    if (end)
        *end = 0;
    return end ? line + strlen(name) : NULL;
}

// The last of a process's numbers, from the outermost namespace to its own.
static int own_number(int pid) {
    char text[4096];
    const char *numbers = status_of(pid, "\nNSpid:", text, sizeof text);
    return numbers ? atoi(strrchr(numbers, '\t') + 1) : 0;
}

int process_of_thread(int number) {
    char text[4096];
    const char *process = status_of(number, "\nTgid:", text, sizeof text);
    return process ? atoi(process) : number;
}

uint32_t children_apart(int pid) {
    uint32_t theirs = namespace_of(pid, "pid_for_children");
    // Of a process that is ending there is none of these to be seen.
    if (!theirs)
        return errno == ENOENT && namespace_of(pid, "uts") ? APART_SOMEWHERE : 0;
    return theirs == namespace_of(getpid(), "pid") ? 0 : theirs;
}

uint32_t process_apart(int pid) {
    uint32_t theirs = namespace_of(pid, "pid");
    return theirs == namespace_of(getpid(), "pid") ? 0 : theirs;
}

static bool is(int pid, uint32_t apart, int number) {
    if (own_number(pid) != number)
        return false;
    uint32_t theirs = process_apart(pid);
    return apart == APART_SOMEWHERE ? theirs != 0 : theirs == apart;
}

// Among the children of a process: quick. Source: proc_tid_children(5).
static int child_here(int parent, uint32_t apart, int number) {
    char path[48], text[4096];
    int found = 0;
    snprintf(path, sizeof path, "/proc/%d/task", parent);
    DIR *threads = parent > 0 ? opendir(path) : NULL;
    for (struct dirent *e; threads && !found && (e = readdir(threads));) {
        snprintf(path, sizeof path, "/proc/%d/task/%.10s/children", parent, e->d_name);
        int fd = *e->d_name == '.' ? -1 : open(path, O_RDONLY | O_CLOEXEC);
        ssize_t n = fd >= 0 ? read(fd, text, sizeof text - 1) : -1;
        if (fd >= 0)
            close(fd);
        text[n > 0 ? n : 0] = 0;
        for (char *at = text, *end; !found && (end = strchr(at, ' ')); at = end + 1)
            if (is(atoi(at), apart, number))
                found = atoi(at);
    }
    if (threads)
        closedir(threads);
    return found;
}

int process_here(int parent, uint32_t apart, int number) {
    int found = child_here(parent, apart, number);
    DIR *all = found ? NULL : opendir("/proc");
    for (struct dirent *e; all && !found && (e = readdir(all));) {
        int one = atoi(e->d_name);
        if (one > 0 && is(one, apart, number))
            found = one;
    }
    if (all)
        closedir(all);
    return found;
}

int number_here(int pid, int number) {
    uint32_t apart = process_apart(pid);
    return apart ? process_here(0, apart, number) : number;
}
