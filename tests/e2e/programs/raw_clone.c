// A child made by clone(2) itself, past the C library, that then forks by fork(3). Each finds what was written before.
// Prints "same" where all do. Arguments: seconds that the child waits before it forks, MiB.
#define _GNU_SOURCE
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

static int ended(pid_t child) {
    int status;
    return waitpid(child, &status, 0) == child && status == 0;
}

int main(int argc, char **argv) {
    if (argc != 3)
        return 2;
    size_t size = (size_t)atoi(argv[2]) << 20;
    char *memory = malloc(size);
    if (!memory)
        return 1;
    memset(memory, 7, size);
    pid_t child = (pid_t)syscall(SYS_clone, SIGCHLD, 0, 0, 0, 0);
    if (child == 0) {
        sleep((unsigned)atoi(argv[1]));
        pid_t grandchild = fork();
        int same = grandchild ? ended(grandchild) : 1;
        for (size_t i = 0; i < size; i++)
            same &= memory[i] == 7;
        _exit(!same);
    }
    if (!ended(child))
        return 1;
    puts("same");
    return 0;
}
