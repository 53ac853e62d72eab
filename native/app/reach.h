// Memory that the kernel reaches into without waiting for a page: by /proc/PID/mem and ptrace(2), the program's own or
// another's. In libedm_app.so for all programs, in libedm_debugger.so for one that looks at captured ones from outside.
#pragma once
#include <stdbool.h>
#include <stdint.h>

#define REACH_SELF 0

// Find the C library's calls, and what the program was given: before it begins.
void reach_begin(void);

// Have pages of a process come: by its number here, by the negative of what it has in a /proc of another PID namespace,
// or REACH_SELF; `write`: to be written to. Whether any was not there: they may be there some time after that. Of a
// process that is not captured: none.
bool reach_bring(int32_t pid, uint64_t first, uint32_t count, bool write);

// Between these two no page of our own leaves. The kernel writes to a page that it only has a reference to.
void reach_hold(void);
void reach_let_go(void);
