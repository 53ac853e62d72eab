// Whose hands the program is in.
#pragma once
#include <stdbool.h>

// Whether valgrind carries out the program's instructions. Its memory is valgrind's then, and valgrind knows neither
// userfaultfd nor a task beside the program: it is not to be captured.
bool emulated(void);
