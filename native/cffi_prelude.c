/* What edm_abi.h needs before it: it holds plain declarations only, so that cffi reads the same file as the compiler. */
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "edm_abi.h"
