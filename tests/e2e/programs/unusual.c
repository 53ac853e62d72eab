// What few programs do, to memory that is evicted all the while: rings that the kernel writes samples and packets to,
// looking at themselves through /proc and writing to clear_refs, names of mappings, huge pages turned on again,
// children whose system calls and memory somebody else has in hand, limits that are reached.
#include "steps.h"

#include <arpa/inet.h>
#include <linux/filter.h>
#include <linux/if_ether.h>
#include <linux/if_packet.h>
#include <linux/perf_event.h>
#include <linux/seccomp.h>
#include <stddef.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/uio.h>

#define PAGES 128ul
#ifndef PR_SET_VMA
#define PR_SET_VMA 0x53564d41
#define PR_SET_VMA_ANON_NAME 0
#endif
#ifndef SYS_process_mrelease
#define SYS_process_mrelease 448
#endif

// With the top of the stack in each sample, which the kernel reads without waiting for a page.
static void sampled(void) {
    struct perf_event_attr what = {.type = PERF_TYPE_SOFTWARE,
                                   .size = sizeof what,
                                   .config = PERF_COUNT_SW_CPU_CLOCK,
                                   .sample_period = 100000,
                                   .sample_type = PERF_SAMPLE_IP | PERF_SAMPLE_CALLCHAIN | PERF_SAMPLE_STACK_USER,
                                   .sample_stack_user = 4096,
                                   .exclude_kernel = 1};
    int fd = (int)syscall(SYS_perf_event_open, &what, 0, -1, -1, 0);
    void *ring = fd < 0 ? MAP_FAILED : mmap(NULL, 17 * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    char *p = area(PAGES);
    fill(p, 0, PAGES, 1);
    for (int i = 0; i < 10; i++) {
        push_out();
        look(p, 0, PAGES, 1, "sampled");
    }
    if (ring != MAP_FAILED)
        munmap(ring, 17 * PAGE);
    close(fd);
    munmap(p, PAGES * PAGE);
}

#define FRAMES 128
#define FRAME 2048
#define SENT 20
static void captured_packets(void) {
    struct tpacket_req rings = {8 * FRAME, FRAMES / 8, FRAME, FRAMES};
    struct sockaddr_in to = {.sin_family = AF_INET, .sin_port = htons(9), .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    int version = TPACKET_V2, listener = socket(AF_PACKET, SOCK_RAW, htons(ETH_P_IP)),
        out = socket(AF_INET, SOCK_DGRAM, 0);
    char *p = area(PAGES), *ring;
    uint64_t seen = 0;
    fill(p, 0, PAGES, 1);
    leave();
    if (listener < 0 || setsockopt(listener, SOL_PACKET, PACKET_VERSION, &version, sizeof version) ||
        setsockopt(listener, SOL_PACKET, PACKET_RX_RING, &rings, sizeof rings)) {
        look(p, 0, PAGES, 1, "without packets");  // not permitted here
        return;
    }
    ring = mmap(NULL, FRAMES * FRAME, PROT_READ | PROT_WRITE, MAP_SHARED, listener, 0);
    MUST(ring != MAP_FAILED);
    look(p, 0, PAGES, 1, "before");
    leave();
    for (uint64_t i = 0; i < SENT; i++)
        MUST(sendto(out, p + i * PAGE, 1000, 0, (struct sockaddr *)&to, sizeof to) == 1000 || errno == ECONNREFUSED);
    for (int tries = 0; tries < 1000 && seen != (1 << SENT) - 1; tries++, usleep(1000))
        for (int i = 0; i < FRAMES; i++) {
            struct tpacket2_hdr *h = (void *)(ring + i * FRAME);
            if (!(h->tp_status & TP_STATUS_USER) || h->tp_snaplen < 1042)
                continue;
            for (uint64_t k = 0; k < SENT; k++)
                if (!memcmp((char *)h + h->tp_mac + 42, p + k * PAGE, 1000))
                    seen |= 1ull << k;
            h->tp_status = TP_STATUS_KERNEL;
        }
    if (seen != (1 << SENT) - 1)
        WRONG("these packets were seen: %lx", (unsigned long)seen);
    munmap(ring, FRAMES * FRAME);
    close(listener);
    close(out);
    munmap(p, PAGES * PAGE);
}

static void read_whole(const char *path, const char *wanted) {
    char *text = malloc(1 << 20);
    size_t at = 0;
    ssize_t got;
    int fd = open(path, O_RDONLY);
    while (fd >= 0 && at < (1 << 20) - 1 && (got = read(fd, text + at, (1 << 20) - 1 - at)) > 0)
        at += (size_t)got;
    text[at] = 0;
    if (fd >= 0 && !strstr(text, wanted))
        WRONG("%s has no %s", path, wanted);
    close(fd);
    free(text);
}

static void looks_at_itself(void) {
    char *p = area(PAGES);
    uint64_t entry[PAGES];
    unsigned char here[PAGES];
    fill(p, 0, PAGES, 1);
    int pagemap = open("/proc/self/pagemap", O_RDONLY), clear = open("/proc/self/clear_refs", O_WRONLY);
    for (char what = '1'; what <= '5'; what++) {
        leave();
        MUST(clear < 0 || write(clear, &what, 1) == 1 || errno == EINVAL);
        read_whole("/proc/self/smaps", "Rss:");
        read_whole("/proc/self/smaps_rollup", "Rss:");
        read_whole("/proc/self/numa_maps", "");
        MUST(!mincore(p, PAGES * PAGE, here));
        look(p, 0, PAGES, 1, "looked at");
    }
    MUST(pread(pagemap, entry, sizeof entry, (off_t)((uintptr_t)p / PAGE * 8)) == sizeof entry);
    close(pagemap);
    close(clear);
    munmap(p, PAGES * PAGE);
}

static void named(void) {
    char *p = area(PAGES);
    fill(p, 0, PAGES, 1);
    leave();
    bool named = !prctl(PR_SET_VMA, PR_SET_VMA_ANON_NAME, p, PAGES * PAGE, "mine");
    leave();
    look(p, 0, PAGES, 1, "named");
    if (named)
        read_whole("/proc/self/maps", "[anon:mine]");
    MUST(!named || !prctl(PR_SET_VMA, PR_SET_VMA_ANON_NAME, p + 8 * PAGE, 16 * PAGE, "another"));
    fill(p, 0, PAGES, 2);
    leave();
    look(p, 0, PAGES, 2, "named in part");
    munmap(p, PAGES * PAGE);
}

static void huge_again(void) {
    const uint64_t pages = 1536;
    MUST(!prctl(PR_SET_THP_DISABLE, 0, 0, 0, 0));
    char *p = area(pages);
    MUST(!madvise(p, pages * PAGE, MADV_HUGEPAGE) || errno == EINVAL);
    fill(p, 0, pages, 1);
    leave();
    pid_t child = fork();
    if (child == 0) {
        fill(p, 0, 100, 2);
        leave();
        look(p, 0, 100, 2, "child, its own");
        look(p, 100, pages - 100, 1, "child");
        _exit(0);
    }
    look(p, 0, pages, 1, "parent");
    ended_well(child, "child");
    munmap(p, pages * PAGE);
}

// A child that is killed, and its memory given back at once.
static void released(void) {
    char *p = area(PAGES), read_[PAGE], c;
    int hold[2];
    fill(p, 0, PAGES, 1);
    leave();
    MUST(!pipe(hold));
    pid_t child = fork();
    if (child == 0) {
        look(p, 0, PAGES / 2, 1, "child");
        _exit((int)read(hold[0], &c, 1));
    }
    int fd = (int)syscall(SYS_pidfd_open, child, 0);
    struct iovec to = {read_, PAGE}, from = {p + 100 * PAGE, PAGE};
    MUST(process_vm_readv(child, &to, 1, &from, 1, 0) == (ssize_t)PAGE);
    if (memcmp(read_, p + 100 * PAGE, PAGE))
        WRONG("another page was read of the child");
    MUST(!syscall(SYS_pidfd_send_signal, fd, SIGKILL, NULL, 0));
    syscall(SYS_process_mrelease, fd, 0);  // ESRCH if it is over already
    MUST(waitpid(child, NULL, 0) == child);
    leave();
    look(p, 0, PAGES, 1, "parent");
    close(fd);
    munmap(p, PAGES * PAGE);
}

// Who has a child's system calls in hand reads what they are about of its memory.
static void supervise(int listener, const char *expected) {
    struct seccomp_notif *call = (struct seccomp_notif *)area(1);
    char name[16] = {0};
    MUST(!ioctl(listener, SECCOMP_IOCTL_NOTIF_RECV, call));
    struct iovec to = {name, strlen(expected)}, from = {(void *)(uintptr_t)call->data.args[1], strlen(expected)};
    MUST(process_vm_readv((pid_t)call->pid, &to, 1, &from, 1, 0) == (ssize_t)from.iov_len);
    if (strcmp(name, expected))
        WRONG("the name is '%s'", name);
    struct seccomp_notif_resp answer = {.id = call->id, .error = -EXDEV};
    MUST(!ioctl(listener, SECCOMP_IOCTL_NOTIF_SEND, &answer));
}

static void supervised(void) {
    static const char expected[] = "/nowhere/x";
    struct sock_filter filter[] = {BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
                                   BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_mkdirat, 0, 1),
                                   BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_USER_NOTIF),
                                   BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW)};
    struct sock_fprog program = {COUNT(filter), filter};
    char *p = area(PAGES);
    int told[2], listener;
    fill(p, 0, PAGES, 1);
    leave();
    MUST(!pipe(told));
    pid_t child = fork();
    if (child == 0) {
        MUST(!prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0));
        int fd = (int)syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, SECCOMP_FILTER_FLAG_NEW_LISTENER, &program);
        MUST(fd >= 0 && write(told[1], &fd, sizeof fd) == sizeof fd);
        char *name = area(8);
        strcpy(name, expected);
        leave();
        if (syscall(SYS_mkdirat, AT_FDCWD, name, 0) != -1 || errno != EXDEV)
            WRONG("the supervised call: %s", strerror(errno));
        look(p, 0, PAGES, 1, "supervised");
        _exit(0);
    }
    MUST(read(told[0], &listener, sizeof listener) == sizeof listener);
    int pidfd = (int)syscall(SYS_pidfd_open, child, 0);
    listener = (int)syscall(SYS_pidfd_getfd, pidfd, listener, 0);
    MUST(listener >= 0);
    supervise(listener, expected);
    ended_well(child, "supervised child");
    close(listener);
    close(pidfd);
    munmap(p, PAGES * PAGE);
}

// A table of descriptors that is full, files that may not grow, few pages that may be locked.
static void limits_reached(void) {
    char *p = area(PAGES), path[300];
    fill(p, 0, PAGES, 1);
    leave();
    snprintf(path, sizeof path, "%s/unusual-XXXXXX", getenv("TMPDIR") ? getenv("TMPDIR") : "/var/tmp");
    pid_t child = fork();
    if (child == 0) {
        int file = mkstemp(path);
        MUST(file >= 0 && !unlink(path) && signal(SIGXFSZ, SIG_IGN) != SIG_ERR);
        struct rlimit few = {(rlim_t)file + 1, (rlim_t)file + 1}, small = {4 * PAGE, 4 * PAGE},
                      locked = {8 * PAGE, 8 * PAGE};
        MUST(!setrlimit(RLIMIT_NOFILE, &few) && !setrlimit(RLIMIT_FSIZE, &small) &&
             !setrlimit(RLIMIT_MEMLOCK, &locked));
        MUST(!setresuid(65534, 65534, 65534) || errno == EPERM);
        if (write(file, p, 8 * PAGE) != 4 * (ssize_t)PAGE || write(file, p, 1) != -1 || errno != EFBIG)
            WRONG("a file beyond its limit");
        if (dup(file) != -1 || errno != EMFILE)
            WRONG("a descriptor beyond the limit");
        leave();
        if (mlock(p, 8 * PAGE) || !mlock(p + 16 * PAGE, PAGE))
            WRONG("pages were locked beyond the limit, or not up to it");
        pid_t grandchild = fork();
        if (grandchild == 0) {
            fill(p, 0, PAGES / 2, 2);
            leave();
            look(p, 0, PAGES / 2, 2, "grandchild, its own");
            look(p, PAGES / 2, PAGES / 2, 1, "grandchild");
            _exit(0);
        }
        ended_well(grandchild, "grandchild");
        look(p, 0, PAGES, 1, "child");
        _exit(0);
    }
    ended_well(child, "child");
    look(p, 0, PAGES, 1, "parent");
    munmap(p, PAGES * PAGE);
}

int main(int argc, char **argv) {
    static const struct step steps[] = {
        {"sampled", sampled},
        {"captured_packets", captured_packets},
        {"looks_at_itself", looks_at_itself},
        {"named", named},
        {"huge_again", huge_again},
        {"released", released},
        {"supervised", supervised},
        {"limits_reached", limits_reached},
    };
    churn_start();
    int status = run_steps(steps, COUNT(steps), argc, argv);
    churn_stop();
    return status;
}
