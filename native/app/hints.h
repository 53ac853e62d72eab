// What the program tells the kernel of its memory with madvise(2), passed on to the DM-Handler.
#pragma once
#include "../sidecar.h"

// From now on, for this process: `c` stays mapped in it.
void hints_to(struct edm_ctl *c);

// What the DM-Handler has to know before a first page leaves, into a new control page.
void hints_begin(struct edm_ctl *c);

// Into a ring of the control page, whose next note has number *next; that of `what` is not looked at.
void hint_write(struct edm_hint *ring, uint32_t size, uint32_t *next, struct edm_hint what);
