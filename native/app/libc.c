// What glibc and musl have under different names, or one of them not at all. A reference to a symbol that is not there
// would end the program before main, in musl's dynamic linker; so would a library that only glibc has: hence the weak
// ones, for which no library is named. Source: musl, ldso/dynlink.c.
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include "libc.h"

#include <dlfcn.h>
#include <errno.h>
#include <sched.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/syscall.h>

#include "calls.h"

#pragma weak __clone
#pragma weak __register_atfork
#pragma weak _r_debug

extern int __clone(int (*run)(void *), void *stack, int flags, void *argument, ...);
extern int __register_atfork(void (*before)(void), void (*parent)(void), void (*child)(void), void *library);
extern void *__dso_handle __attribute__((visibility("hidden")));

typedef int atfork(void (*)(void), void (*)(void), void (*)(void));

int clone_task(int (*run)(void *), void *stack, int flags, void *argument) {
    return __clone ? __clone(run, stack, flags, argument) : clone(run, stack, flags, argument);
}

int at_fork(void (*before)(void), void (*parent)(void), void (*child)(void)) {
    if (__register_atfork)
        return __register_atfork(before, parent, child, &__dso_handle);
    void *found = dlsym(RTLD_DEFAULT, "pthread_atfork");
    atfork *theirs;
    memcpy(&theirs, &found, sizeof theirs);
    return theirs ? theirs(before, parent, child) : ENOSYS;
}

const struct r_debug *loaded_libraries(void) {
    if (&_r_debug)
        return &_r_debug;
    struct r_debug *const *theirs = dlsym(RTLD_DEFAULT, "_dl_debug_addr");
    return theirs ? *theirs : NULL;
}

uint64_t cleared_at_exit(void) {
    uint64_t address = 0;
    return CALL6(SYS_prctl, PR_GET_TID_ADDRESS, &address, 0, 0, 0, 0) ? 0 : address;
}
