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

struct name {
    char of[64];
};

// "pid": the one that a process is in; "pid_for_children". Empty where that may not be seen.
static struct name namespace_of(int pid, const char *which) {
    char path[48];
    struct name name = {""};
    snprintf(path, sizeof path, "/proc/%d/ns/%s", pid, which);
    ssize_t n = readlink(path, name.of, sizeof name.of - 1);
    name.of[n > 0 ? n : 0] = 0;
    return name;
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

// A namespace that is without a process as yet has no name. Source: pid_namespaces(7).
bool children_apart(int pid) {
    struct name theirs = namespace_of(pid, "pid_for_children");
    if (!*theirs.of)
        return errno == ENOENT && *namespace_of(pid, "pid").of;
    return strcmp(theirs.of, namespace_of(getpid(), "pid").of) != 0;
}

int number_here(int pid, int number) {
    struct name theirs = namespace_of(pid, "pid"), ours = namespace_of(getpid(), "pid");
    if (!*theirs.of || !strcmp(theirs.of, ours.of))
        return number;
    DIR *all = opendir("/proc");
    int found = 0;
    for (struct dirent *e; all && !found && (e = readdir(all));) {
        int one = atoi(e->d_name);
        if (one > 0 && own_number(one) == number && !strcmp(namespace_of(one, "pid").of, theirs.of))
            found = one;
    }
    if (all)
        closedir(all);
    return found;
}
