// Whose memory this is.
#pragma once
#include <stdbool.h>

// Whether this process has the control page: not a child that has not come yet, or never will. Without a system call,
// which the program may have forbidden itself.
bool own_process(void);

// Whether the program has restricted its system calls (seccomp) since it was started: it might be killed for one that
// it has not made itself.
bool restricted(void);
