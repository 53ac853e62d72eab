// `timed FILE COMMAND...`: runs the command and writes "seconds user-seconds system-seconds" of it to the file. Under
// `edm run` it is captured, as the command is: what EDM does in other processes is in none of the three, but for the
// time it takes the command. With $SMALL_PAGES the command has no transparent huge pages, as captured programs have
// none.
#include <spawn.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

extern char **environ;

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec / 1e9;
}

static double seconds(struct timeval t) { return (double)t.tv_sec + (double)t.tv_usec / 1e6; }

int main(int argc, char **argv) {
    if (argc < 3 || (getenv("SMALL_PAGES") && prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0)))
        return 125;
    pid_t pid;
    int status;
    struct rusage used;
    double began = now();
    if (posix_spawnp(&pid, argv[2], NULL, NULL, argv + 2, environ) || wait4(pid, &status, 0, &used) != pid)
        return 125;
    double took = now() - began;
    FILE *file = fopen(argv[1], "w");
    if (!file || fprintf(file, "%.6f %.6f %.6f\n", took, seconds(used.ru_utime), seconds(used.ru_stime)) < 0 ||
        fclose(file))
        return 125;
    return WIFEXITED(status) ? WEXITSTATUS(status) : 125;
}
