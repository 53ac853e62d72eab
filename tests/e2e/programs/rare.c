// Rare uses of memory that is evicted all the while: robust mutexes of threads that end, threads on stacks of the
// program's own, coroutines, code made at run time, stacks that grow down wherever they are, processes that share one
// memory and outlive who made it, limits on files.
#include "steps.h"

#include <linux/aio_abi.h>
#include <netinet/in.h>
#include <poll.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <ucontext.h>

#define PAGES 128ul

// ---- what the kernel does when a thread ends ---------------------------------------------------------------------

static void *end_holding(void *mutex) {
    pthread_mutex_lock(mutex);
    push_out();
    push_out();
    return NULL;
}

static void robust_mutexes(void) {
    char *p = area(PAGES);
    pthread_mutexattr_t robust;
    pthread_mutexattr_init(&robust);
    pthread_mutexattr_setrobust(&robust, PTHREAD_MUTEX_ROBUST);
    fill(p, 0, PAGES, 1);
    leave();
    for (uint64_t k = 0; k < 8; k++) {
        pthread_mutex_t *mutex = (pthread_mutex_t *)(p + (k * 7 + 3) * PAGE);
        pthread_t t;
        MUST(!pthread_mutex_init(mutex, &robust) && !pthread_create(&t, NULL, end_holding, mutex));
        pthread_join(t, NULL);
        struct timespec until;
        clock_gettime(CLOCK_REALTIME, &until);
        until.tv_sec += 10;
        int r = pthread_mutex_timedlock(mutex, &until);
        if (r != EOWNERDEAD)
            WRONG("the mutex of a thread that ended: %s", strerror(r));
        MUST(!pthread_mutex_consistent(mutex) && !pthread_mutex_unlock(mutex));
    }
    look(p, 64, PAGES - 64, 1, "beside them");
    munmap(p, PAGES * PAGE);
}

static void *short_life(void *argument) { return argument; }

static void own_stacks(void) {
    const uint64_t stack = 8;
    char *p = area(64 * stack);
    fill(p, 0, 64 * stack, 1);
    leave();
    look(p, 0, 64 * stack, 1, "before");
    for (uint64_t k = 0; k < 300; k++) {
        pthread_t t;
        pthread_attr_t own;
        void *result;
        struct timespec until;
        MUST(!pthread_attr_init(&own) &&
             !pthread_attr_setstack(&own, p + k * 5 % 64 * stack * PAGE, stack * PAGE) &&
             !pthread_create(&t, &own, short_life, (void *)(uintptr_t)k));
        clock_gettime(CLOCK_REALTIME, &until);
        until.tv_sec += 10;
        if (pthread_timedjoin_np(t, &result, &until) || result != (void *)(uintptr_t)k)
            WRONG("thread %lu cannot be joined", (unsigned long)k);
        pthread_attr_destroy(&own);
        if (k % 16 == 0)
            push_out();
    }
    munmap(p, 64 * stack * PAGE);
}

// ---- stacks and code in the heap ---------------------------------------------------------------------------------

#define COROUTINES 8
static ucontext_t resumer, coroutine[COROUTINES];
static int finished;

static void run_coroutine(int me) {
    volatile uint64_t mine[1500];
    for (uint64_t i = 0; i < 1500; i += 50)
        mine[i] = word_at((uint64_t)me, i);
    for (int turn = 0; turn < 4; turn++) {
        swapcontext(&coroutine[me], &resumer);
        for (uint64_t i = 0; i < 1500; i += 50)
            if (mine[i] != word_at((uint64_t)me, i))
                WRONG("coroutine %d: word %lu of its stack is another", me, (unsigned long)i);
    }
    finished++;
}

static void coroutines(void) {
    char *beside = area(8);
    fill(beside, 0, 8, 1);
    finished = 0;
    for (int i = 0; i < COROUTINES; i++) {
        MUST(!getcontext(&coroutine[i]));
        coroutine[i].uc_stack = (stack_t){.ss_sp = area(16), .ss_size = 16 * PAGE};
        coroutine[i].uc_link = &resumer;
        makecontext(&coroutine[i], (void (*)(void))run_coroutine, 1, i);
    }
    for (int turn = 0; turn < 5; turn++)
        for (int i = 0; i < COROUTINES; i++) {
            MUST(!swapcontext(&resumer, &coroutine[i]));
            push_out();
        }
    if (finished != COROUTINES)
        WRONG("%d coroutines have finished", finished);
    look(beside, 0, 8, 1, "beside them");
}

// mov $N, %eax; ret, or movz w0, #N; ret: in each page another number.
static void write_code(char *at, uint32_t number) {
#if defined(__x86_64__)
    unsigned char code[6] = {0xb8, (unsigned char)number, (unsigned char)(number >> 8), 0, 0, 0xc3};
#else
    uint32_t code[2] = {0x52800000u | number << 5, 0xd65f03c0u};
#endif
    memcpy(at, code, sizeof code);
    __builtin___clear_cache(at, at + sizeof code);
}

static void made_code(void) {
    char *p = area(PAGES);
    static const int ways[] = {PROT_READ | PROT_EXEC, PROT_READ | PROT_WRITE | PROT_EXEC};
    for (uint32_t round = 0; round < 2; round++) {
        for (uint64_t i = 0; i < PAGES; i++)
            write_code(p + i * PAGE + 64, (uint32_t)i + 1000 * round);
        leave();
        MUST(!mprotect(p, PAGES * PAGE, ways[round % 2]));
        leave();
        for (uint64_t i = 0; i < PAGES; i++) {
            uint32_t (*code)(void);
            char *at = p + i * PAGE + 64;
            memcpy(&code, &at, sizeof code);
            if (code() != (uint32_t)i + 1000 * round)
                WRONG("page %lu has other code", (unsigned long)i);
        }
        MUST(!mprotect(p, PAGES * PAGE, PROT_READ | PROT_WRITE));
    }
    fill(p, 0, PAGES, 1);
    leave();
    look(p, 0, PAGES, 1, "data again");
    munmap(p, PAGES * PAGE);
}

static char *barred;
static volatile uint64_t noticed;
#define BARRED (3 * PAGES)

static void on_barred(int number, siginfo_t *info, void *context) {
    (void)context;
    uint64_t page = (uint64_t)((char *)info->si_addr - barred) / PAGE;
    if (page >= BARRED || mprotect(barred + page * PAGE, PAGE, PROT_READ | PROT_WRITE))
        signal(number, SIG_DFL);
    noticed++;
}

// As incremental collectors do: all is protected, and the first write to each page is heard of; more than may be here.
static void write_barrier(void) {
    struct sigaction act = {.sa_sigaction = on_barred, .sa_flags = SA_SIGINFO}, old;
    MUST(!sigaction(SIGSEGV, &act, &old));
    barred = area(BARRED);
    fill(barred, 0, BARRED, 1);
    for (uint64_t round = 0; round < 4; round++) {
        MUST(!mprotect(barred, BARRED * PAGE, PROT_READ));
        leave();
        noticed = 0;
        for (uint64_t i = round % 3; i < BARRED; i += 3)
            fill(barred, i, 1, 2 + round);
        if (noticed != PAGES)
            WRONG("%lu pages were heard of, of %lu", (unsigned long)noticed, PAGES);
        leave();
        for (uint64_t i = 0; i < BARRED; i++) {
            uint64_t ago = (round + 3 - i % 3) % 3;
            look(barred, i, 1, ago > round ? 1 : 2 + round - ago, "written or not");
        }
    }
    MUST(!sigaction(SIGSEGV, &old, NULL));
    munmap(barred, BARRED * PAGE);
}

static void growing_down(void) {
    char *top = area(1024) + 1000 * PAGE;
    MUST(!munmap(top - 1000 * PAGE, 1024 * PAGE));
    char *p = mmap(top, 4 * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_GROWSDOWN | MAP_FIXED, -1, 0);
    MUST(p == top);
    fill(p, 0, 4, 1);
    leave();
    char *low = p - PAGES * PAGE;
    for (uint64_t i = PAGES; i-- > 0;)
        fill(low, i, 1, 2);
    leave();
    look(low, 0, PAGES, 2, "grown");
    look(p, 0, 4, 1, "above");
    munmap(low, (PAGES + 4) * PAGE);
}

// ---- one memory, several processes -------------------------------------------------------------------------------

static char *shared;
static int told;

// In the memory of a process that has ended meanwhile.
static int look_later(void *argument) {
    (void)argument;
    usleep(200000);
    look(shared, 0, PAGES, 2, "after the other had ended");
    fill(shared, 0, PAGES, 3);
    look(shared, 0, PAGES, 3, "written after the other had ended");
    _exit(write(told, "k", 1) != 1);
}

static void heard(int from) {
    struct pollfd p = {from, POLLIN, 0};
    char c = 0;
    if (poll(&p, 1, 20000) != 1)
        WRONG("it hangs");
    if (read(from, &c, 1) != 1 || c != 'k')
        WRONG("it has failed");
    close(from);
}

static void outlived(bool by_vfork) {
    int p[2], ready[2];
    char c;
    shared = area(PAGES);
    MUST(!pipe(p) && !pipe(ready));
    pid_t child = fork();
    if (child == 0) {
        fill(shared, 0, PAGES, 2);
        told = p[1];
        char *stack = area(64);
        leave();
        if (!by_vfork)
            _exit(clone(look_later, stack + 64 * PAGE, CLONE_VM | SIGCHLD, NULL) < 0);
        pid_t vforked = vfork();
        if (vforked == 0) {
            if (write(ready[1], "r", 1) == 1)
                look_later(NULL);
            _exit(1);
        }
        _exit(0);
    }
    close(p[1]);
    close(ready[1]);
    if (by_vfork) {
        MUST(read(ready[0], &c, 1) == 1);
        kill(child, SIGKILL);
    }
    MUST(waitpid(child, NULL, 0) == child);
    close(ready[0]);
    heard(p[0]);
    munmap(shared, PAGES * PAGE);
}

static void clone_outlives(void) { outlived(false); }

static void vfork_outlives(void) { outlived(true); }

// A program that may not write large files starts others, and forks.
static void small_files(void) {
    char *p = area(PAGES);
    fill(p, 0, PAGES, 1);
    pid_t child = fork();
    if (child == 0) {
        struct rlimit limit = {PAGE, PAGE};
        MUST(!setrlimit(RLIMIT_FSIZE, &limit));
        pid_t grandchild = fork();
        if (grandchild == 0) {
            leave();
            look(p, 0, PAGES, 1, "grandchild");
            execlp("true", "true", NULL);
            _exit(3);
        }
        ended_well(grandchild, "grandchild");
        _exit(0);
    }
    ended_well(child, "child");
    look(p, 0, PAGES, 1, "parent");
}

// Who has not got the privileges for it may not look at its memory from then on.
static void not_dumpable(void) {
    char *p = area(PAGES);
    fill(p, 0, PAGES, 1);
    leave();
    MUST(!prctl(PR_SET_DUMPABLE, 0, 0, 0, 0));
    for (uint64_t round = 0; round < 3; round++) {
        look(p, 0, PAGES, 1 + round, "not dumpable");
        fill(p, 0, PAGES, 2 + round);
        leave();
    }
    MUST(!prctl(PR_SET_DUMPABLE, 1, 0, 0, 0));
    look(p, 0, PAGES, 4, "dumpable again");
    munmap(p, PAGES * PAGE);
}

// ---- the kernel at work on pages while the program goes on -------------------------------------------------------

static void asynchronous_files(void) {
    aio_context_t context = 0;
    MUST(!syscall(SYS_io_setup, 16, &context));
    struct iocb *request = (struct iocb *)area(1), **list = (struct iocb **)area(1);
    struct io_event *event = (struct io_event *)area(1);
    char *from = area(PAGES), *to = area(PAGES), path[300];
    for (int flags = 0; flags <= O_DIRECT; flags += O_DIRECT) {
        snprintf(path, sizeof path, "%s/rare-XXXXXX", getenv("TMPDIR") ? getenv("TMPDIR") : "/var/tmp");
        int fd = mkostemp(path, flags);
        MUST(fd >= 0 || errno == EINVAL);
        if (fd < 0)
            continue;
        unlink(path);
        fill(from, 0, PAGES, 1);
        fill(to, 0, PAGES, 2);
        for (int write = 1; write >= 0; write--) {
            for (uint64_t k = 0; k < 8; k++) {
                request[k] = (struct iocb){.aio_lio_opcode = write ? IOCB_CMD_PWRITE : IOCB_CMD_PREAD,
                                           .aio_fildes = (uint32_t)fd,
                                           .aio_buf = (uint64_t)(uintptr_t)((write ? from : to) + k * 16 * PAGE),
                                           .aio_nbytes = 16 * PAGE,
                                           .aio_offset = (int64_t)(k * 16 * PAGE)};
                list[k] = request + k;
            }
            leave();
            MUST(syscall(SYS_io_submit, context, 8, list) == 8);
            push_out();
            MUST(syscall(SYS_io_getevents, context, 8, 8, event, NULL) == 8);
            for (int k = 0; k < 8; k++)
                if (event[k].res != 16 * (int64_t)PAGE)
                    WRONG("request %d gave %ld", k, (long)event[k].res);
        }
        leave();
        look(to, 0, PAGES, 1, "read");
        close(fd);
    }
    MUST(!syscall(SYS_io_destroy, context));
}

#ifndef SO_ZEROCOPY
#define SO_ZEROCOPY 60
#define MSG_ZEROCOPY 0x4000000
#endif

static void sent_without_copies(void) {
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    socklen_t length = sizeof address;
    int listener = socket(AF_INET, SOCK_STREAM, 0), out = socket(AF_INET, SOCK_STREAM, 0), one = 1;
    MUST(!bind(listener, (struct sockaddr *)&address, length) && !listen(listener, 1) &&
         !getsockname(listener, (struct sockaddr *)&address, &length) &&
         !setsockopt(out, SOL_SOCKET, SO_ZEROCOPY, &one, sizeof one) &&
         !connect(out, (struct sockaddr *)&address, length));
    int in = accept(listener, NULL, NULL);
    char *from = area(32), *to = area(32);
    for (uint64_t round = 0; round < 4; round++) {
        fill(from, 0, 32, 1 + round);
        fill(to, 0, 32, 90);
        leave();
        MUST(send(out, from, 32 * PAGE, MSG_ZEROCOPY) == 32 * (ssize_t)PAGE);
        push_out();
        MUST(recv(in, to, 32 * PAGE, MSG_WAITALL) == 32 * (ssize_t)PAGE);
        leave();
        look(to, 0, 32, 1 + round, "received");
        look(from, 0, 32, 1 + round, "sent");
    }
    close(in);
    close(out);
    close(listener);
}

int main(int argc, char **argv) {
    static const struct step steps[] = {
        {"robust_mutexes", robust_mutexes},
        {"own_stacks", own_stacks},
        {"coroutines", coroutines},
        {"made_code", made_code},
        {"write_barrier", write_barrier},
        {"growing_down", growing_down},
        {"clone_outlives", clone_outlives},
        {"vfork_outlives", vfork_outlives},
        {"small_files", small_files},
        {"not_dumpable", not_dumpable},
        {"asynchronous_files", asynchronous_files},
        {"sent_without_copies", sent_without_copies},
    };
    churn_start();
    int status = run_steps(steps, COUNT(steps), argc, argv);
    churn_stop();
    return status;
}
