// Forks in the ways of the C library while pages are evicted; parent and child check and write every page of theirs.
// Usage: forks [MIB [UID]]: with a UID, it becomes that user first.
#define _GNU_SOURCE
#include "captured.h"
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#define PAGE 4096u

static uint32_t value(uint32_t page, uint32_t round) { return page * 2654435761u ^ round * 40503u ^ 1u; }

static int wrong(uint8_t *m, uint32_t pages, uint32_t round) {
    int n = 0;
    for (uint32_t p = 0; p < pages; p++)
        for (uint32_t at = 0; at < PAGE; at += 1024)
            n += *(uint32_t *)(m + p * PAGE + at) != value(p, round);
    return n;
}

static void fill(uint8_t *m, uint32_t pages, uint32_t round) {
    for (uint32_t p = 0; p < pages; p++)
        for (uint32_t at = 0; at < PAGE; at += 1024)
            *(uint32_t *)(m + p * PAGE + at) = value(p, round);
}

static int child(uint8_t *m, uint32_t pages, uint32_t round, int deeper) {
    if (wrong(m, pages, round))
        return 1;
    if (deeper) {
        pid_t pid = fork();
        int status;
        if (pid == 0)
            _exit(child(m, pages, round, deeper - 1));
        if (pid < 0 || waitpid(pid, &status, 0) != pid || status)
            return 2;
    }
    fill(m, pages, round + 1000);
    return wrong(m, pages, round + 1000) ? 3 : 0;
}

int main(int argc, char **argv) {
    uint32_t pages = (uint32_t)(argc > 1 ? atoi(argv[1]) : 16) << 8;
    uint8_t *m = mmap(NULL, (size_t)pages * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (m == MAP_FAILED)
        return 9;
    fill(m, pages, 0);  // in user mode only what is there is captured
    wait_until_captured(m);
    if (argc > 2 && (setgid((gid_t)atoi(argv[2])) || setuid((uid_t)atoi(argv[2]))))
        return 9;
    for (uint32_t round = 0; round < 4; round++) {
        fill(m, pages, round);
        usleep(20000);
        pid_t pid = round % 2 ? _Fork() : fork();
        int status;
        if (pid == 0)
            _exit(child(m, pages, round, round == 2));
        int before = wrong(m, pages, round);
        if (pid < 0 || waitpid(pid, &status, 0) != pid || status || before || wrong(m, pages, round)) {
            printf("round %u: child %x, parent %d\n", round, (unsigned)status, before);
            return 1;
        }
    }
    printf("every page as it was, as user %u\n", (unsigned)getuid());
    return 0;
}
