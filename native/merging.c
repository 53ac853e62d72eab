// KSM: the kernel may put one page in the place of several that hold the same bytes. A page that was write-protected is
// not any more when it has been merged, and a write to it, which gives the program a page of its own again, is told to
// nobody. So nothing of a program that lets its pages be merged counts as clean. libedm_app.so says so before the
// kernel may begin; here others are found out that asked it past the C library. Source: mm/ksm.c replace_page.
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "engine.h"

// Source: Documentation/admin-guide/mm/ksm.rst, /proc/PID/ksm_stat: it has rmap_items once KSM looks at its pages.
void merging_look(struct space *s) {
    char text[512];
    ssize_t n = s->ksm_fd >= 0 && !s->merges ? pread(s->ksm_fd, text, sizeof text - 1, 0) : 0;
    if (n <= 0)
        return;
    text[n] = 0;
    const char *items = strstr(text, "ksm_rmap_items ");
    s->merges = (items && strtoull(items + strlen("ksm_rmap_items "), NULL, 10)) || strstr(text, "merge_any: yes") ||
                strstr(text, "mergeable: yes");
}

// Of the leaf's pages that are to leave, those that may: none is write-protected any more.
uint64_t merging_unprotect(struct leaf *l, uint64_t mask) {
    struct space *s = l->space;
    for (uint64_t m = mask; m; m &= m - 1) {
        int i = __builtin_ctzll(m);
        if (!(l->e[i].flags & PF_CLEAN))
            continue;
        if (s->ops->unprotect(s, l->base + (uint64_t)i))
            mask &= ~(1ull << i);
        else
            l->e[i].flags &= ~PF_CLEAN;
    }
    return mask;
}
