// What the program asks of userfaultfds of its own, where EDM's has the memory.
#pragma once
#include "../sidecar.h"

// The C library's ioctl is looked for here, before main.
void own_uffd_find(void);

// From now on, for this process: `c` stays mapped in it.
void own_uffd_to(struct edm_ctl *c);

// What the DM-Handler has to know before a first page leaves, into a new control page.
void own_uffd_begin(struct edm_ctl *c);
