// Whether a page that a madvise(MADV_DONTNEED) is about to drop can come back. The parent stops its child inside that call,
// again and again, for longer than a burst of events is waited for, while the child's other thread makes the handler evict;
// after each call every page of the range must read as zeros. Prints how many rounds there were; exit 1 on an old byte.
#include <pthread.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#define PAGE 4096ul
#define RANGE (512 * PAGE)
#define CHURN (24ul << 20)

static volatile int stop;

static void *churn(void *memory) {
    volatile unsigned char *m = memory;
    for (uint64_t at = 0; !stop; at = (at + 7 * PAGE) % CHURN)
        m[at]++;
    return NULL;
}

static int child(int rounds) {
    unsigned char *range = mmap(NULL, RANGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    unsigned char *other = mmap(NULL, CHURN, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    pthread_t thread;
    if (range == MAP_FAILED || other == MAP_FAILED || pthread_create(&thread, NULL, churn, other))
        return 2;
    for (int round = 1; round <= rounds; round++) {
        for (size_t i = 0; i < RANGE; i += PAGE)
            range[i] = (unsigned char)(round | 1);
        if (madvise(range, RANGE, MADV_DONTNEED))
            return 2;
        for (size_t i = 0; i < RANGE; i += PAGE)
            if (range[i]) {
                printf("round %d: page %zu came back\n", round, i / PAGE);
                return 1;
            }
    }
    stop = 1;
    pthread_join(thread, NULL);
    printf("%d rounds\n", rounds);
    return 0;
}

int main(int argc, char **argv) {
    int rounds = argc > 1 ? atoi(argv[1]) : 300, stops = argc > 2 ? atoi(argv[2]) : 3, status = 0;
    pid_t pid = fork();
    if (pid == 0) {
        int result = child(rounds);
        fflush(stdout);
        _exit(result);
    }
    for (int i = 0; i < stops; i++) {
        usleep(150000 + (useconds_t)i * 37000);
        kill(pid, SIGSTOP);
        usleep(1300000);
        kill(pid, SIGCONT);
    }
    waitpid(pid, &status, 0);
    return WIFEXITED(status) ? WEXITSTATUS(status) : 3;
}
