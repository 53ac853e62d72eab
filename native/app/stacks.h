// Where the program's threads have their stacks, passed on to the DM-Handler.
#pragma once
#include "../sidecar.h"

// From now on, for this process: `c` stays mapped in it.
void stacks_to(struct edm_ctl *c);
