// The floor: what the kernel itself asks for a fault that user space answers, and for a page of a cached file.
#include <errno.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "measure.h"

#define CHUNK 256u

static void pin_here(void) {
    cpu_set_t set;
    CPU_ZERO(&set);
    CPU_SET(sched_getcpu(), &set);
    if (sched_setaffinity(0, sizeof set, &set))
        die("pinning to a CPU: %s", strerror(errno));
}

static int open_uffd(void) {
    int fd = (int)syscall(SYS_userfaultfd, O_CLOEXEC);
    if (fd < 0) {
        int dev = open("/dev/userfaultfd", O_RDWR | O_CLOEXEC);
        fd = dev < 0 ? -1 : ioctl(dev, USERFAULTFD_IOC_NEW, O_CLOEXEC);
    }
    if (fd < 0)
        die("userfaultfd: %s", strerror(errno));
    struct uffdio_api api = {.api = UFFD_API};
    if (ioctl(fd, UFFDIO_API, &api))
        die("UFFDIO_API: %s", strerror(errno));
    return fd;
}

// The shortest handler there can be: read a fault, copy one page, again. It inherits the CPU of the faulting thread.
static void *bare_handler(void *argument) {
    int fd = *(int *)argument;
    static uint8_t page[PAGE] __attribute__((aligned(PAGE)));
    memset(page, 1, sizeof page);
    struct uffd_msg m;
    while (read(fd, &m, sizeof m) == (ssize_t)sizeof m) {
        struct uffdio_copy c = {
            .dst = m.arg.pagefault.address & ~(PAGE - 1), .src = (uintptr_t)page, .len = PAGE, .mode = 0};
        if (ioctl(fd, UFFDIO_COPY, &c))
            die("UFFDIO_COPY: %s", strerror(errno));
    }
    return NULL;
}

// Over as many pages as a program under EDM has here. A write costs more: the kernel takes and clears memory for it
// before it asks, and gives it back. Source: mm/memory.c, do_anonymous_page.
int floor_fault(const struct measure *m, bool write) {
    pin_here();
    uint64_t pages = m->region_pages / CHUNK * CHUNK;
    uint8_t *region = region_map(pages, false);
    uint32_t *order = permutation(pages, 1);
    int fd = open_uffd();
    struct uffdio_register r = {.range = {(uintptr_t)region, pages * PAGE}, .mode = UFFDIO_REGISTER_MODE_MISSING};
    if (ioctl(fd, UFFDIO_REGISTER, &r))
        die("UFFDIO_REGISTER: %s", strerror(errno));
    pthread_t thread;
    if (pthread_create(&thread, NULL, bare_handler, &fd))
        die("cannot start the handler");
    struct samples s = {0};
    volatile uint64_t sum = 0;
    for (uint64_t done = 0, i = 0; done < m->accesses; done += CHUNK, i += CHUNK) {
        if (i == pages) {
            madvise(region, pages * PAGE, MADV_DONTNEED);
            i = 0;
        }
        uint64_t t = clock_ns();
        for (uint64_t k = i; k < i + CHUNK; k++) {
            volatile uint64_t *at = (volatile uint64_t *)(region + order[k] * PAGE);
            if (write)
                *at = k;
            else
                sum += *at;
        }
        samples_add(&s, (double)(clock_ns() - t) / CHUNK);
    }
    printf("{");
    samples_print("ns", &s);
    printf("}\n");
    fflush(stdout);
    _exit(0);  // the handler waits in read
}

int floor_pread(const struct measure *m) {
    pin_here();
    uint64_t pages = m->region_pages;
    int fd = open(m->file, O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
    if (fd < 0)
        die("%s: %s", m->file, strerror(errno));
    static uint8_t page[PAGE];
    for (uint64_t i = 0; i < pages; i++) {
        memset(page, (int)(i | 1), sizeof page);
        if (pwrite(fd, page, PAGE, (off_t)(i * PAGE)) != (ssize_t)PAGE)
            die("writing %s: %s", m->file, strerror(errno));
    }
    uint32_t *order = permutation(pages, 2);
    struct samples s = {0};
    for (uint64_t done = 0, i = 0; done < m->accesses; done += CHUNK) {
        uint64_t t = clock_ns();
        for (uint32_t k = 0; k < CHUNK; k++, i++)
            if (pread(fd, page, PAGE, (off_t)(order[i % pages] * PAGE)) != (ssize_t)PAGE)
                die("reading %s: %s", m->file, strerror(errno));
        samples_add(&s, (double)(clock_ns() - t) / CHUNK);
    }
    unlink(m->file);
    printf("{");
    samples_print("ns", &s);
    printf("}\n");
    return 0;
}

static _Atomic int turn;

// The other side: hands the line back each time it gets it, on the second CPU.
static void *hand_back(void *cpu) {
    if (pthread_setaffinity_np(pthread_self(), sizeof(cpu_set_t), cpu))
        die("pinning to a CPU: %s", strerror(errno));
    for (int seen = 0; seen >= 0;)
        if ((seen = atomic_load(&turn)) == 1)
            atomic_store(&turn, 0);
    return NULL;
}

// How far the first two CPUs we may use are from each other: a cache line there and back. Under a hypervisor that
// changes while a machine runs, by as much as six times, and with it whatever is handed from one to the other.
int floor_apart(const struct measure *m) {
    cpu_set_t allowed, one[2];
    if (sched_getaffinity(0, sizeof allowed, &allowed))
        die("sched_getaffinity: %s", strerror(errno));
    int found = 0;
    for (int cpu = 0; cpu < CPU_SETSIZE && found < 2; cpu++)
        if (CPU_ISSET(cpu, &allowed)) {
            CPU_ZERO(&one[found]);
            CPU_SET(cpu, &one[found++]);
        }
    if (found < 2)
        die("there is one CPU only");
    pthread_t thread;
    if (sched_setaffinity(0, sizeof one[0], &one[0]) || pthread_create(&thread, NULL, hand_back, &one[1]))
        die("cannot run on two CPUs: %s", strerror(errno));
    struct samples s = {0};
    for (uint64_t done = 0; done < m->accesses; done += CHUNK) {
        uint64_t t = clock_ns();
        for (uint32_t k = 0; k < CHUNK; k++) {
            atomic_store(&turn, 1);
            while (atomic_load(&turn))
                ;
        }
        samples_add(&s, (double)(clock_ns() - t) / CHUNK);
    }
    atomic_store(&turn, -1);
    pthread_join(thread, NULL);
    printf("{");
    samples_print("ns", &s);
    printf("}\n");
    return 0;
}
