// The last descriptor of a uffd that closes turns its absent pages into zeros. An io_uring that is never used keeps one
// open without a descriptor: the uffd is registered as a file of the ring, the ring lasts while it is mapped, and the
// mapping goes with the address space, at exit or exec. So the program waits when all of EDM has died, and no earlier.
// Source: io_uring_register(2), IORING_REGISTER_FILES; io_uring_setup(2) on closing the ring's descriptor.
#include "tie.h"

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <linux/io_uring.h>
#include <stdbool.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>

#include "calls.h"

#define PAGE 4096l

uint64_t tie_uffd(int uffd) {
    struct io_uring_params p;
    memset(&p, 0, sizeof p);
    p.flags = IORING_SETUP_R_DISABLED;  // it takes no requests, now or later
    long ring = CALL(SYS_io_uring_setup, 1, &p, 0);
    if (ring < 0)
        return 0;
    long at = CALL6(SYS_mmap, 0, PAGE, PROT_NONE, MAP_SHARED, ring, IORING_OFF_SQ_RING);
    bool tied = at > 0 && !CALL(SYS_madvise, at, PAGE, MADV_DONTFORK) &&
                !CALL6(SYS_io_uring_register, ring, IORING_REGISTER_FILES, &uffd, 1, 0, 0);
    if (!tied && at > 0)
        CALL(SYS_munmap, at, PAGE, 0);
    CALL(SYS_close, ring, 0, 0);
    return tied ? (uint64_t)at : 0;
}

void untie_uffd(uint64_t tie) {
    if (tie)
        CALL(SYS_munmap, tie, PAGE, 0);
}
