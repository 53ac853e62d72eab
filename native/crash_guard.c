// A library that takes what is in a file for true may crash over a damaged one. Between enter and leave that ends the
// process with a line on stderr and status 1 instead of a signal; a crash anywhere else is as it always was.
#include <signal.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <unistd.h>

#include "edm_abi.h"

#define SIGNALS 4

static const int signals[SIGNALS] = {SIGSEGV, SIGBUS, SIGABRT, SIGFPE};
static struct sigaction before[SIGNALS];
static int installed;
// In the static block, so that the handler allocates nothing.
static __thread __attribute__((tls_model("initial-exec"))) const char *line;

static void crashed(int number, siginfo_t *info, void *context) {
    (void)info;
    (void)context;
    if (line) {
        // What cannot be written has nobody to read it.
        if (write(STDERR_FILENO, line, strlen(line)) < 0)
            _exit(2);
        _exit(1);
    }
    for (unsigned i = 0; i < SIGNALS; i++)
        if (signals[i] == number)
            sigaction(number, &before[i], NULL);
    if (number == SIGABRT)
        raise(number);
    // Else the instruction is tried again, and meets the handler that was here before.
}

void edm_crash_guard_enter(const char *text) {
    if (!installed) {
        struct sigaction action = {.sa_sigaction = crashed, .sa_flags = SA_SIGINFO | SA_ONSTACK};
        installed = 1;
        for (unsigned i = 0; i < SIGNALS; i++)
            sigaction(signals[i], &action, &before[i]);
    }
    line = text;
}

void edm_crash_guard_leave(void) { line = NULL; }
