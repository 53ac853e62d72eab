// Memory that may be written to and executed, as the heaps of some languages are: by itself, and beside other memory in
// stretches shorter than what leaves at once.
#include "steps.h"

#define PAGES 1024ul
#define STRETCH 16ul
#define ROUNDS 2

static void protect(char *p, uint64_t from, uint64_t pages, int how) {
    MUST(!mprotect(p + from * PAGE, pages * PAGE, how));
}

static void heap(void) {
    char *p = area(PAGES);
    protect(p, 0, PAGES, PROT_READ | PROT_WRITE | PROT_EXEC);
    for (uint64_t seed = 1; seed <= ROUNDS; seed++) {
        fill(p, 0, PAGES, seed);
        leave();
        look(p, 0, PAGES, seed, "executable");
    }
    munmap(p, PAGES * PAGE);
}

// Of four stretches one is executable, one may not be written to, and the other two are as usual; next time others are.
static void stretches(void) {
    static const int ways[] = {PROT_READ | PROT_WRITE | PROT_EXEC, PROT_READ | PROT_WRITE, PROT_READ,
                               PROT_READ | PROT_WRITE};
    char *p = area(PAGES);
    for (uint64_t seed = 1; seed <= ROUNDS; seed++) {
        fill(p, 0, PAGES, seed);
        for (uint64_t i = 0; i < PAGES; i += STRETCH)
            protect(p, i, STRETCH, ways[(i / STRETCH + seed) % 4]);
        leave();
        look(p, 0, PAGES, seed, "stretches");
        leave();
        pid_t pid = fork();
        if (!pid) {
            look(p, 0, PAGES, seed, "in the child");
            _exit(0);
        }
        look(p, 0, PAGES, seed, "beside the child");
        ended_well(pid, "the child");
        protect(p, 0, PAGES, PROT_READ | PROT_WRITE);
        look(p, 0, PAGES, seed, "all writable");
    }
    munmap(p, PAGES * PAGE);
}

int main(int argc, char **argv) {
    static const struct step steps[] = {{"heap", heap}, {"stretches", stretches}};
    churn_start();
    int status = run_steps(steps, COUNT(steps), argc, argv);
    churn_stop();
    return status;
}
