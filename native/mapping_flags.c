// What the kernel says of a program's mappings at this moment, flag by flag: /proc/PID/smaps has it, and nothing else
// does. Slow, since the kernel walks the page tables for it. Source: proc_pid_smaps(5), VmFlags.
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "engine.h"

// Adds to `out` what of [a, b) has the flag, "um" for instance. False when the program cannot be looked at: it has
// gone.
bool mappings_flagged(int pid, const char *flag, uint64_t a, uint64_t b, struct ranges *out) {
    char path[32], word[5], *line = NULL;
    snprintf(path, sizeof path, "/proc/%d/smaps", pid);
    snprintf(word, sizeof word, " %s", flag);
    FILE *f = fopen(path, "re");
    if (!f)
        return false;
    size_t size = 0;
    struct range m = {0, 0};
    bool any = false;
    while (getline(&line, &size, f) > 0) {
        unsigned long from, to;
        char perm[5];
        if (sscanf(line, "%lx-%lx %4s", &from, &to, perm) == 3) {
            any = true;
            m = (struct range){from >> PAGE_SHIFT, to >> PAGE_SHIFT};
            if (m.a >= b)
                break;
        } else if (!strncmp(line, "VmFlags:", 8) && m.b > a && strstr(line, word)) {
            ranges_add(out, m.a > a ? m.a : a, m.b < b ? m.b : b);
        }
    }
    free(line);
    fclose(f);
    return any;
}
