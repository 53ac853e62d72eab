// Process trees: what a fork, vfork, spawn, double fork, daemon or exec sees, and leaves to the others, of memory that
// is evicted all the while.
#include "steps.h"

#include <linux/filter.h>
#include <linux/seccomp.h>
#include <spawn.h>
#include <stddef.h>
#include <sys/prctl.h>

#define PAGES 512ul  // 2 MiB
extern char **environ;
static char *self, *data;

// Pages that were only read since they came back, and are the child's to write.
static void child_writes_what_was_read(void) {
    for (uint64_t round = 0; round < 12; round++) {
        fill(data, 0, PAGES, 60 + round);
        push_out();
        look(data, 0, PAGES, 60 + round, "parent");
        pid_t child = fork();
        if (child == 0) {
            fill(data, PAGES / 8 * 7, PAGES / 8, 90 + round);
            push_out();
            look(data, PAGES / 8 * 7, PAGES / 8, 90 + round, "child, its own");
            _exit(0);
        }
        ended_well(child, "child");
    }
}

// Parent and child write the same pages, each sees its own, the child those of the moment of the fork besides.
static void fork_both_write(void) {
    fill(data, 0, PAGES, 1);
    push_out();
    pid_t child = fork();
    if (child == 0) {
        fill(data, 0, PAGES / 2, 2);
        push_out();
        look(data, 0, PAGES / 2, 2, "child, its own");
        look(data, PAGES / 2, PAGES / 2, 1, "child, from before");
        _exit(0);
    }
    fill(data, PAGES / 4, PAGES / 2, 3);
    push_out();
    look(data, 0, PAGES / 4, 1, "parent, from before");
    look(data, PAGES / 4, PAGES / 2, 3, "parent, its own");
    look(data, PAGES / 4 * 3, PAGES / 4, 1, "parent, from before");
    ended_well(child, "child");
}

// The parent moves an area to where nothing was at the fork, maps another in its place, and moves it back over that: in
// the child it was there all the while.
static void moved_there_and_back(void) {
    for (uint64_t round = 0; round < 4; round++) {
        char *p = area(128);
        fill(p, 0, 128, 40 + round);
        push_out();
        int go[2];
        char c;
        MUST(!pipe(go));
        pid_t child = fork();
        if (child == 0) {
            close(go[1]);
            MUST(read(go[0], &c, 1) == 0);
            look(p, 0, 128, 40 + round, "child, after the parent moved it");
            _exit(0);
        }
        char *away = area(128);
        MUST(mremap(p, 128 * PAGE, 128 * PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, away) == away);
        area_at(p, 128, MAP_FIXED);
        MUST(mremap(away, 128 * PAGE, 128 * PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, p) == p);
        close(go[0]);
        close(go[1]);
        ended_well(child, "child");
        look(p, 0, 128, 40 + round, "parent, moved back");
        MUST(!munmap(p, 128 * PAGE));
    }
}

// The child looks only when the parent has overwritten everything, dropped a part and unmapped another.
static void fork_time_contents(void) {
    char *other = area(256);
    int go[2];
    MUST(!pipe(go));
    fill(data, 0, PAGES, 4);
    fill(other, 0, 256, 5);
    push_out();
    pid_t child = fork();
    if (child == 0) {
        char c;
        close(go[1]);
        if (read(go[0], &c, 1) != 1)
            _exit(3);
        look(data, 0, PAGES, 4, "child, after the parent wrote");
        look(other, 0, 256, 5, "child, after the parent unmapped");
        _exit(0);
    }
    fill(data, 0, PAGES / 2, 6);
    MUST(!madvise(data + PAGES / 2 * PAGE, PAGES / 2 * PAGE, MADV_DONTNEED));
    MUST(!munmap(other, 256 * PAGE));
    push_out();
    MUST(write(go[1], "g", 1) == 1);
    look(data, 0, PAGES / 2, 6, "parent");
    look(data, PAGES / 2, PAGES / 2, 0, "parent, dropped");
    ended_well(child, "child");
    close(go[0]);
    close(go[1]);
}

// Three generations, each with a layer of its own above what it was given; all alive at once.
static void generations(void) {
    fill(data, 0, PAGES, 7);
    push_out();
    for (uint64_t depth = 0; depth < 3; depth++) {
        pid_t child = fork();
        if (child == 0) {
            fill(data, depth * 100, 100, 8 + depth);
            push_out();
            continue;
        }
        if (child < 0)
            _exit(2);
        look(data, depth * 100, PAGES - depth * 100, 7, "generation, from the first");
        for (uint64_t k = 0; k < depth; k++)
            look(data, k * 100, 100, 8 + k, "generation, from before");
        ended_well(child, "next generation");
        if (depth)
            _exit(0);
        return;
    }
    for (uint64_t k = 0; k < 3; k++)
        look(data, k * 100, 100, 8 + k, "last generation");
    look(data, 300, PAGES - 300, 7, "last generation");
    _exit(0);
}

// A vfork's child has the parent's memory, not a copy.
static void vfork_shares(void) {
    static volatile int done;
    done = 0;
    fill(data, 0, PAGES, 11);
    push_out();
    pid_t child = vfork();
    if (child == 0) {
        for (uint64_t i = 0; i < PAGES; i += 8)
            ((volatile uint64_t *)data)[i * 512 + 5] = i;
        done = 1;
        _exit(0);
    }
    ended_well(child, "child");
    for (uint64_t i = 0; i < PAGES; i += 8) {
        if (!done || ((volatile uint64_t *)data)[i * 512 + 5] != i)
            WRONG("page %lu: what the child wrote is not here", (unsigned long)i);
        ((volatile uint64_t *)data)[i * 512 + 5] = word_at(11, i * 512 + 5);
    }
    look(data, 0, PAGES, 11, "parent");
}

// Another captured program below this one: it runs the step "work" of this file.
static char *work[] = {"tree", "work", NULL};

static void vfork_exec(void) {
    fill(data, 0, PAGES, 12);
    pid_t child = vfork();
    if (child == 0) {
        execv(self, work);
        _exit(3);
    }
    look(data, 0, PAGES, 12, "parent, beside it");
    ended_well(child, "program");
}

static void spawn(void) {
    pid_t one, two;
    fill(data, 0, PAGES, 13);
    MUST(!posix_spawn(&one, self, NULL, NULL, work, environ));
    MUST(!posix_spawnp(&two, self, NULL, NULL, work, environ));
    push_out();
    look(data, 0, PAGES, 13, "parent");
    ended_well(one, "first");
    ended_well(two, "second");
}

static void fork_exec(void) {
    fill(data, 0, PAGES, 14);
    push_out();
    pid_t child = fork();
    if (child == 0) {
        look(data, 0, PAGES, 14, "child, before its exec");
        execv(self, work);
        _exit(3);
    }
    fill(data, 0, PAGES, 15);
    push_out();
    look(data, 0, PAGES, 15, "parent");
    ended_well(child, "program");
}

// A process that runs on after its parent has ended, and says at the end what it saw.
static void report(int to, const char *what) {
    look(data, 0, PAGES, 16, what);
    fill(data, 0, PAGES, 17);
    push_out();
    look(data, 0, PAGES, 17, what);
    if (write(to, "ok", 2) != 2)
        _exit(3);
    _exit(0);
}

static void reported(int from, const char *who) {
    char text[3] = "";
    if (read(from, text, 2) != 2 || strcmp(text, "ok"))
        WRONG("%s: no good word from it", who);
    close(from);
}

static void double_fork(void) {
    int p[2];
    MUST(!pipe(p));
    fill(data, 0, PAGES, 16);
    push_out();
    pid_t child = fork();
    if (child == 0) {
        pid_t grandchild = fork();
        if (grandchild == 0) {
            usleep(50000);  // its parent has gone by now
            report(p[1], "grandchild");
        }
        _exit(grandchild < 0);
    }
    close(p[1]);
    ended_well(child, "child");
    fill(data, 0, PAGES, 18);
    reported(p[0], "grandchild");
    look(data, 0, PAGES, 18, "parent");
}

static void as_daemon(void) {
    int p[2];
    MUST(!pipe(p));
    fill(data, 0, PAGES, 16);
    pid_t child = fork();
    if (child == 0) {
        if (daemon(0, 0))
            _exit(2);
        report(p[1], "daemon");
    }
    close(p[1]);
    ended_well(child, "what became a daemon");
    reported(p[0], "daemon");
}

// A fork of one thread while others run, write and fork too.
static void *forker(void *argument) {
    uint64_t me = (uint64_t)(uintptr_t)argument;
    char *mine = area(128);
    for (uint64_t round = 0; round < 4; round++) {
        fill(mine, 0, 128, 100 * me + round);
        pid_t child = fork();
        if (child == 0) {
            look(mine, 0, 128, 100 * me + round, "child of a thread");
            fill(mine, 0, 128, 99);
            look(mine, 0, 128, 99, "child of a thread, its own");
            _exit(0);
        }
        look(mine, 0, 128, 100 * me + round, "thread");
        ended_well(child, "child of a thread");
    }
    munmap(mine, 128 * PAGE);
    return NULL;
}

static void forks_in_threads(void) {
    pthread_t t[3];
    for (uint64_t i = 0; i < 3; i++)
        MUST(!pthread_create(&t[i], NULL, forker, (void *)(uintptr_t)(i + 1)));
    push_out();
    for (int i = 0; i < 3; i++)
        pthread_join(t[i], NULL);
    fill(data, 0, PAGES, 19);
    push_out();
    look(data, 0, PAGES, 19, "afterwards");
}

// A child that the C library knows nothing of, and that forks and maps like any other.
static void raw_clone(void) {
    fill(data, 0, PAGES, 25);
    push_out();
    pid_t child = (pid_t)syscall(SYS_clone, SIGCHLD, 0, 0, 0, 0);
    if (child == 0) {
        look(data, 0, PAGES, 25, "child");
        fill(data, 0, PAGES / 2, 26);
        MUST(!madvise(data, PAGES / 4 * PAGE, MADV_WILLNEED));
        pid_t grandchild = fork();
        if (grandchild == 0) {
            look(data, 0, PAGES / 2, 26, "grandchild");
            MUST(!madvise(data, PAGES / 2 * PAGE, MADV_DONTNEED));
            look(data, 0, PAGES / 2, 0, "grandchild, dropped");
            push_out();
            look(data, PAGES / 2, PAGES / 2, 25, "grandchild");
            _exit(0);
        }
        ended_well(grandchild, "grandchild");
        look(data, 0, PAGES / 2, 26, "child, afterwards");
        munmap(data, PAGES / 2 * PAGE);
        look(area_at(data, PAGES / 2, MAP_FIXED), 0, PAGES / 2, 0, "child, mapped again");
        _exit(0);
    }
    MUST(child > 0);
    fill(data, 0, PAGES, 27);
    push_out();
    ended_well(child, "child");
    look(data, 0, PAGES, 27, "parent");
}

// What it finds of memory that is wanted away from it, or empty.
static void raw_clone_madvised(void) {
    char *gone = area(64), *wiped = area(64);
    fill(gone, 0, 64, 31);
    fill(wiped, 0, 64, 32);
    MUST(!madvise(gone, 64 * PAGE, MADV_DONTFORK) && !madvise(wiped, 64 * PAGE, MADV_WIPEONFORK));
    push_out();
    usleep(10000);
    push_out();
    pid_t child = (pid_t)syscall(SYS_clone, SIGCHLD, 0, 0, 0, 0);
    if (child == 0) {
        look(wiped, 0, 64, 0, "child, wiped on fork");
        look(area_at(gone, 64, MAP_FIXED), 0, 64, 0, "child, mapped where nothing was");
        _exit(0);
    }
    ended_well(child, "child");
    look(gone, 0, 64, 31, "parent");
    look(wiped, 0, 64, 32, "parent");
}

// A child of one that allows itself no other system calls than it needs: any other is death by SIGSYS.
static void filtered_fork(void) {
    static const int allowed[] = {SYS_clone,
                                  SYS_clone3,
                                  SYS_wait4,
                                  SYS_set_robust_list,
                                  SYS_rt_sigprocmask,
                                  SYS_rseq,
                                  SYS_gettid,
                                  SYS_write,
                                  SYS_mmap,
                                  SYS_munmap,
                                  SYS_brk,
                                  SYS_madvise,
                                  SYS_futex,
                                  SYS_rt_sigreturn,
                                  SYS_prctl,
                                  SYS_exit,
                                  SYS_exit_group,
                                  SYS_sched_yield,
                                  SYS_mprotect,
                                  SYS_set_tid_address,
                                  SYS_newfstatat};
    struct sock_filter f[COUNT(allowed) + 3];
    int n = 0;
    f[n++] = (struct sock_filter)BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr));
    for (int i = 0; i < COUNT(allowed); i++, n++)
        f[n] = (struct sock_filter)BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, (uint32_t)allowed[i],
                                            (uint8_t)(COUNT(allowed) - i), 0);
    f[n++] = (struct sock_filter)BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_KILL_PROCESS);
    f[n++] = (struct sock_filter)BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW);
    struct sock_fprog program = {(unsigned short)n, f};
    fill(data, 0, PAGES, 28);
    pid_t child = fork();
    if (child == 0) {
        MUST(!prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) && !prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program));
        push_out();
        pid_t grandchild = fork();
        if (grandchild == 0) {
            look(data, 0, PAGES, 28, "grandchild");
            fill(data, 0, PAGES, 29);
            push_out();
            look(data, 0, PAGES, 29, "grandchild, written");
            _exit(0);
        }
        fill(data, 0, PAGES / 2, 30);
        ended_well(grandchild, "grandchild");
        look(data, 0, PAGES / 2, 30, "child");
        look(data, PAGES / 2, PAGES / 2, 28, "child, not written");
        _exit(0);
    }
    ended_well(child, "child");
    look(data, 0, PAGES, 28, "parent");
}

#define MORE 2048ul  // pages, more than stay here

// Memory wanted away from, or as zeros in, a child.
static void madvised_fork(void) {
    char *gone = area(64), *wiped = area(64);
    fill(gone, 0, 64, 20);
    fill(wiped, 0, 64, 21);
    MUST(!madvise(gone, 64 * PAGE, MADV_DONTFORK) && !madvise(wiped, 64 * PAGE, MADV_WIPEONFORK));
    push_out();
    pid_t child = fork();
    if (child == 0) {
        unsigned char there;
        if (!mincore(gone, PAGE, &there) || errno != ENOMEM)
            WRONG("child: MADV_DONTFORK memory is there");
        look(wiped, 0, 32, 0, "child, wiped on fork");
        // Where nothing had left before the fork, what is wiped is in the child's table as if it were here.
        char *more = area(MORE);
        fill(more, 0, MORE, 23);
        look(wiped, 0, 64, 0, "child, wiped on fork, later");
        fill(wiped, 0, 64, 24);
        look(more, 0, MORE, 23, "child");
        look(wiped, 0, 64, 24, "child, wiped and written");
        _exit(0);
    }
    ended_well(child, "child");
    look(gone, 0, 64, 20, "parent");
    look(wiped, 0, 64, 21, "parent");
}

// As it was, or zeros, page for page.
static void look_at_freed(char *freed, const char *where) {
    for (uint64_t page = 0; page < PAGES / 4; page++)
        look(freed, page, 1, *(volatile uint64_t *)(freed + page * PAGE) ? 25 : 0, where);
}

// What came back clean, and is then given up with MADV_FREE, stays, and stays write-protected.
static void freed_fork(void) {
    char *freed = area(PAGES / 4);
    for (int round = 0; round < 4; round++) {
        fill(freed, 0, PAGES / 4, 25);
        push_out();
        look(freed, 0, PAGES / 4, 25, "come back");
        MUST(!madvise(freed, PAGES / 4 * PAGE, MADV_FREE));
        usleep(20000);
        pid_t child = fork();
        push_out();
        look_at_freed(freed, child ? "parent" : "child");
        if (child == 0) {
            fill(freed, 0, PAGES / 4, 26);
            look(freed, 0, PAGES / 4, 26, "child, written");
            _exit(0);
        }
        ended_well(child, "child");
        look_at_freed(freed, "parent");
    }
}

// The program that others start; not by itself.
static int do_work(void) {
    fill(data, 0, PAGES, 22);
    push_out();
    look(data, 0, PAGES, 22, "work");
    return 0;
}

int main(int argc, char **argv) {
    static const struct step steps[] = {
        {"fork_both_write", fork_both_write},
        {"child_writes_what_was_read", child_writes_what_was_read},
        {"fork_time_contents", fork_time_contents},
        {"moved_there_and_back", moved_there_and_back},
        {"generations", generations},
        {"vfork_shares", vfork_shares},
        {"vfork_exec", vfork_exec},
        {"spawn", spawn},
        {"fork_exec", fork_exec},
        {"double_fork", double_fork},
        {"as_daemon", as_daemon},
        {"forks_in_threads", forks_in_threads},
        {"raw_clone", raw_clone},
        {"raw_clone_madvised", raw_clone_madvised},
        {"filtered_fork", filtered_fork},
        {"madvised_fork", madvised_fork},
        {"freed_fork", freed_fork},
    };
    self = realpath("/proc/self/exe", NULL);
    data = area(PAGES);
    if (argc == 2 && !strcmp(argv[1], "work"))
        return do_work();
    return run_steps(steps, COUNT(steps), argc, argv);
}
