// The one line of C++: std::sort, as users' programs have it.
#include <algorithm>

#include "measure.h"

void sort_64(uint64_t *first, uint64_t *last) { std::sort(first, last); }
