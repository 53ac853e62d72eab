// Threads in trouble while their pages are away: signals during faults, on an alternate stack too; pthread_cancel;
// threads made and joined by the hundred; exit_group, exec and death by a signal with faults in flight.
#include "steps.h"

#include <semaphore.h>
#include <sys/time.h>

#define PAGES 512ul
static char *data;

// ---- a timer's signal every millisecond, whose handler uses memory that is away -------------------------------

static _Atomic uint64_t taken;

static void on_alarm(int number) {
    (void)number;
    uint64_t i = taken++ * 7 % PAGES;
    if (((volatile uint64_t *)data)[i * 512 + 9] != word_at(1, i * 512 + 9))
        WRONG("handler: page %lu is another", (unsigned long)i);
}

static void with_alarms(int flags) {
    struct sigaction act = {.sa_handler = on_alarm, .sa_flags = flags}, old;
    struct itimerval every = {{0, 1000}, {0, 1000}}, never = {{0, 0}, {0, 0}};
    fill(data, 0, PAGES, 1);
    taken = 0;
    MUST(!sigaction(SIGALRM, &act, &old) && !setitimer(ITIMER_REAL, &every, NULL));
    char *mine = area(PAGES);
    for (uint64_t round = 0; round < 2 || taken < 30; round++) {
        fill(mine, 0, PAGES, 2 + round);
        push_out();
        look(mine, 0, PAGES, 2 + round, "interrupted");
    }
    MUST(!setitimer(ITIMER_REAL, &never, NULL) && !sigaction(SIGALRM, &old, NULL));
    munmap(mine, PAGES * PAGE);
}

static void alarms(void) { with_alarms(SA_RESTART); }

static void alternate_stack(void) {
    stack_t mine = {.ss_sp = area(16), .ss_size = 16 * PAGE}, old;
    MUST(!sigaltstack(&mine, &old));
    push_out();
    with_alarms(SA_RESTART | SA_ONSTACK);
    MUST(!sigaltstack(&old, NULL));
}

// ---- cancelled in the midst of touching pages -----------------------------------------------------------------

static _Atomic int cleaned;

static void clean(void *argument) {
    cleaned++;
    free(argument);
}

static void *until_cancelled(void *argument) {
    uint64_t me = (uint64_t)(uintptr_t)argument;
    pthread_setcanceltype(me % 2 ? PTHREAD_CANCEL_DEFERRED : PTHREAD_CANCEL_ASYNCHRONOUS, NULL);
    volatile char *mine = data;
    uint64_t *heap = malloc(1000);
    pthread_cleanup_push(clean, heap);
    for (uint64_t i = me * 31;; i++) {
        (void)mine[i % PAGES * PAGE];
        if (me % 2)
            pthread_testcancel();
    }
    pthread_cleanup_pop(1);
    return NULL;
}

static void cancel(void) {
    fill(data, 0, PAGES, 3);
    cleaned = 0;
    for (int round = 0; round < 6; round++) {
        pthread_t t[6];
        for (uint64_t i = 0; i < 6; i++)
            MUST(!pthread_create(&t[i], NULL, until_cancelled, (void *)(uintptr_t)i));
        usleep(3000);
        for (int i = 0; i < 6; i++) {
            void *result;
            MUST(!pthread_cancel(t[i]) && !pthread_join(t[i], &result));
            if (result != PTHREAD_CANCELED)
                WRONG("thread %d was not cancelled", i);
        }
    }
    look(data, 0, PAGES, 3, "what they read");
    printf("%s: %s cleaned up\n", step_name, cleaned >= 18 ? "those that had begun" : "too few");
}

// ---- the kernel's own writes when a thread ends -----------------------------------------------------------------

static void *short_life(void *argument) {
    uint64_t me = (uint64_t)(uintptr_t)argument;
    if (((volatile uint64_t *)data)[me % PAGES * 512] != word_at(4, me % PAGES * 512))
        WRONG("thread %lu: page %lu is another", (unsigned long)me, (unsigned long)(me % PAGES));
    return argument;
}

static void many_threads(void) {
    fill(data, 0, PAGES, 4);
    for (uint64_t k = 0; k < 2000; k += 20) {
        pthread_t t[20];
        for (uint64_t i = 0; i < 20; i++)
            MUST(!pthread_create(&t[i], NULL, short_life, (void *)(uintptr_t)(k + i)));
        for (uint64_t i = 0; i < 20; i++) {
            void *result;
            MUST(!pthread_join(t[i], &result));
            if (result != (void *)(uintptr_t)(k + i))
                WRONG("thread %lu gave %p", (unsigned long)(k + i), result);
        }
    }
    look(data, 0, PAGES, 4, "afterwards");
}

// ---- the end, with faults in flight -----------------------------------------------------------------------------

static void *toucher(void *argument) {
    volatile char *mine = data;
    for (uint64_t i = (uint64_t)(uintptr_t)argument * 97;; i++)
        mine[i % PAGES * PAGE]++;
    return NULL;
}

static void ends(int how) {
    for (int round = 0; round < 4; round++) {
        pid_t child = fork();
        if (child == 0) {
            pthread_t t;
            for (uint64_t i = 0; i < 4; i++)
                MUST(!pthread_create(&t, NULL, toucher, (void *)(uintptr_t)i));
            usleep(4000);
            if (how == 0)
                _exit(7);
            if (how == 1)
                raise(SIGTERM);
            execl("/bin/sh", "sh", "-c", "exit 9", NULL);
            _exit(3);
        }
        int status = -1;
        MUST(child > 0 && waitpid(child, &status, 0) == child);
        int should = how == 0 ? 7 << 8 : how == 1 ? SIGTERM : 9 << 8;
        if (status != should)
            WRONG("status %#x instead of %#x", status, should);
    }
    look(data, 0, PAGES, 5, "of the parent");
}

static void exit_group(void) {
    fill(data, 0, PAGES, 5);
    ends(0);
}

static void death(void) {
    fill(data, 0, PAGES, 5);
    ends(1);
}

static void exec_away(void) {
    fill(data, 0, PAGES, 5);
    ends(2);
}

// Stopped and continued while it faults.
static void stop_and_go(void) {
    fill(data, 0, PAGES, 6);
    pid_t child = fork();
    if (child == 0) {
        for (int round = 0; round < 6; round++) {
            push_out();
            look(data, 0, PAGES, 6, "stopped now and then");
        }
        _exit(0);
    }
    int status = -1;
    for (int k = 0; k < 400; k++) {
        kill(child, SIGSTOP);
        usleep(500);
        kill(child, SIGCONT);
        usleep(1500);
        if (waitpid(child, &status, WNOHANG) == child)
            break;
        status = -1;
    }
    if (status == -1)
        MUST(waitpid(child, &status, 0) == child);
    if (status)
        WRONG("child: status %#x", status);
}

int main(int argc, char **argv) {
    static const struct step steps[] = {
        {"alarms", alarms},         {"alternate_stack", alternate_stack},
        {"cancel", cancel},         {"many_threads", many_threads},
        {"exit_group", exit_group}, {"death", death},
        {"exec_away", exec_away},   {"stop_and_go", stop_and_go},
    };
    data = area(PAGES);
    churn_start();
    int status = run_steps(steps, COUNT(steps), argc, argv);
    churn_stop();
    return status;
}
