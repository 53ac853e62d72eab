// Whose memory this is.
#pragma once
#include <stdbool.h>

// Whether this process has the control page: not a child that has not come yet, or never will. Without a system call,
// which the program may have forbidden itself.
bool own_process(void);
