// A page that reads as SIGBUS, as one does of which every copy is lost. "ready ADDRESS", then waits for the end of
// standard input.
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <stdint.h>
#include <stdio.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#define PAGE 4096ul
#ifndef UFFDIO_POISON  // kernel headers older than Linux 6.6
#define UFFD_FEATURE_POISON (1 << 14)
struct uffdio_poison {
    struct uffdio_range range;
    __u64 mode;
    __s64 updated;
};
#define UFFDIO_POISON _IOWR(UFFDIO, 8, struct uffdio_poison)
#endif

int main(void) {
    int fd = (int)syscall(SYS_userfaultfd, O_CLOEXEC);
    struct uffdio_api api = {.api = UFFD_API, .features = UFFD_FEATURE_POISON};
    char *p = mmap(NULL, 16 * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0), c;
    p[0] = 1;
    struct uffdio_register r = {.range = {(uintptr_t)p, 16 * PAGE}, .mode = UFFDIO_REGISTER_MODE_MISSING};
    struct uffdio_poison lost = {.range = {(uintptr_t)p + 5 * PAGE, PAGE}};
    if (fd >= 0 && !ioctl(fd, UFFDIO_API, &api) && !ioctl(fd, UFFDIO_REGISTER, &r) &&
        !ioctl(fd, UFFDIO_POISON, &lost)) {
        printf("ready %p\n", (void *)(p + 5 * PAGE));
        fflush(stdout);
        while (read(0, &c, 1) > 0) {
        }
        return 0;
    }
    printf("no\n");
    return 0;
}
