// mremap(2) over memory of which a part is captured and another is not yet, or was later.
#pragma once

// From now on, for this process and what it forks.
void remap_begin(void);
