// Pages that other calls than the program's own touches need.
#pragma once
#include "../sidecar.h"

// From now on, for this process: `c` stays mapped in it.
void bring_to(struct edm_ctl *c);
