/* What edm_abi.h needs before it: it holds plain declarations only, for cffi and the compiler to read the same file. */
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "edm_abi.h"
