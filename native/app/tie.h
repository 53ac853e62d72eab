// Ties a uffd to the address space that called: it then lasts as long as that does, whoever else lets go of it.
#pragma once
#include <stdint.h>

// Where the tie is mapped, or 0 where the kernel or a sandbox does not allow io_uring.
uint64_t tie_uffd(int uffd);

// Cuts it: of an address space that is not captured after all.
void untie_uffd(uint64_t tie);
