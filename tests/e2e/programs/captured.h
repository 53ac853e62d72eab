// A program under EDM can be over before EDM has had its first look at it: on a machine that stands still for a moment
// just then. One that is to be evicted waits until its memory is registered; without EDM it does not wait.
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

// Whether the mapping with `at` in it is registered with a userfaultfd. Source: proc_pid_smaps(5), VmFlags um.
static int captured(const void *at) {
    static char line[4096];
    unsigned long from, to, place = (uintptr_t)at;
    int within = 0, is = 0;
    FILE *f = fopen("/proc/self/smaps", "r");
    while (f && fgets(line, sizeof line, f))
        if (sscanf(line, "%lx-%lx ", &from, &to) == 2)
            within = from <= place && place < to;
        else if (within && !strncmp(line, "VmFlags:", 8))
            is = strstr(line, " um") != NULL;
    if (f)
        fclose(f);
    return is;
}

static void wait_until_captured(const void *at) {
    const char *preloaded = getenv("LD_PRELOAD");
    while (preloaded && strstr(preloaded, "libedm_app") && !captured(at))
        usleep(1000);
}
