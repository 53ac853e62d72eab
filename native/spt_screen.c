// What the DMS asks of a batch before it does anything with it [6, 9].
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "spt_table.h"

size_t edm_refs_foreign(const struct edm_page_ref *refs, size_t n, uint64_t instance) {
    size_t foreign = 0;

    for (size_t i = 0; i < n; i++)
        foreign += refs[i].region >> 32 != instance;
    return foreign;
}

size_t edm_spt_check(const struct edm_page_ref *refs, const void *pages, size_t n) {
    const unsigned char *page = pages;

    for (size_t i = 0; i < n; i++)
        if (edm_crc32c(page + i * 4096, 4096) != refs[i].checksum)
            return i;
    return n;
}

static uint8_t verdict(const struct edm_page_ref *ref, const unsigned char *page, uint64_t instance, bool found,
                       uint64_t version, uint32_t checksum) {
    if (ref->region >> 32 != instance)
        return EDM_SCREEN_FOREIGN;
    if (edm_crc32c(page, 4096) != ref->checksum)
        return EDM_SCREEN_CHECKSUM;
    if (!found || ref->version > version)
        return EDM_SCREEN_NEW;
    if (ref->version < version)
        return EDM_SCREEN_STALE;
    return ref->checksum == checksum ? EDM_SCREEN_REPEAT : EDM_SCREEN_OTHER;
}

// A page that stands twice in the batch must not go back to an older version of itself.
static int screen_twins(const struct edm_page_ref *refs, size_t n, uint8_t *verdicts) {
    size_t capacity = 4, last = 0;

    while (capacity < 4 * n)
        capacity *= 2;
    uint32_t *seen = calloc(capacity, sizeof *seen);
    if (!seen)
        return -ENOMEM;
    for (size_t i = 0; i < n; i++) {
        if (verdicts[i] != EDM_SCREEN_NEW)
            continue;
        size_t at = (refs[i].index * 0x9e3779b97f4a7c15ull ^ refs[i].region) >> 16 & (capacity - 1);
        for (; seen[at]; at = (at + 1) & (capacity - 1)) {
            last = seen[at] - 1;
            if (refs[last].index == refs[i].index && refs[last].region == refs[i].region)
                break;
        }
        if (seen[at] && refs[i].version < refs[last].version)
            verdicts[i] = EDM_SCREEN_STALE;
        else
            seen[at] = (uint32_t)i + 1;
    }
    free(seen);
    return 0;
}

int64_t edm_spt_screen(const struct edm_page_ref *refs, const void *pages, size_t n, uint64_t instance,
                       const uint8_t *found, const uint64_t *versions, const uint32_t *checksums, uint8_t *verdicts) {
    const unsigned char *page = pages;
    int64_t odd = 0;

    for (size_t i = 0; i < n; i++)
        verdicts[i] = verdict(&refs[i], page + i * 4096, instance, found[i], versions[i], checksums[i]);
    if (n > 1 && screen_twins(refs, n, verdicts))
        return -ENOMEM;
    for (size_t i = 0; i < n; i++)
        odd += verdicts[i] != EDM_SCREEN_NEW;
    return odd;
}
