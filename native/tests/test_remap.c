// Where a program's mappings are, as mremap of libedm_app.so sees it: by a query of Linux 6.11, and by reading the list
// as before it. Both have to say the same, and what /proc/self/maps says.
#include "../app/remap.c"

#include <sys/stat.h>

#include "check.h"

bool restricted(void) { return false; }

static void same(int fd, uint64_t at, const struct mapping *should, const char *which) {
    struct mapping m;
    if (!mapping_in_text(fd, at, &m) || m.a != should->a || m.b != should->b)
        FAIL("%s: the text gives [%lx, %lx) for %lx instead of [%lx, %lx)", which, (long)m.a, (long)m.b, (long)at,
             (long)should->a, (long)should->b);
    if (!!(m.kind & SHARED_OR_FILE) != !!(should->kind & SHARED_OR_FILE))
        FAIL("%s: the text is wrong about the kind of %lx", which, (long)at);
    struct mapping q;
    if (!mapping_from(fd, at, &q) || q.a != m.a || q.b != m.b || (q.kind & SHARED_OR_FILE) != (m.kind & SHARED_OR_FILE))
        FAIL("%s: the query differs from the text for %lx", which, (long)at);
}

// A mapping of a file whose line is longer than what is read at a time.
static void map_long_name(void) {
    char directory[] = "/tmp/edm-test-remap-XXXXXX", name[256];
    CHECK(mkdtemp(directory) && !chdir(directory));
    memset(name, 'n', 240);
    name[240] = 0;
    for (int i = 0; i < 8; i++)
        CHECK(!mkdir(name, 0700) && !chdir(name));
    int fd = open(name, O_CREAT | O_RDWR, 0600);
    CHECK(fd >= 0 && !ftruncate(fd, 4096) && mmap(NULL, 4096, PROT_READ, MAP_PRIVATE, fd, 0) != MAP_FAILED &&
          !close(fd) && !unlink(name));
    for (int i = 0; i < 8; i++)
        CHECK(!chdir("..") && !rmdir(name));
    CHECK(!chdir("/") && !rmdir(directory));
}

static char *area(uint64_t pages) {
    char *p = mmap(NULL, pages * PAGE, PROT_NONE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    CHECK(p != MAP_FAILED);
    return p;
}

static void put(char *at, uint64_t pages, int prot) {
    CHECK(mmap(at, pages * PAGE, prot, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) == at);
}

int main(void) {
    map_long_name();
    char *p = area(1024);
    for (uint64_t i = 0; i < 500; i++)
        put(p + 2 * i * PAGE, 1 + i % 3 / 2, i % 2 ? PROT_READ : PROT_READ | PROT_WRITE);
    CHECK(!munmap(p + 1001 * PAGE, 10 * PAGE));

    // As another reader of the list has it; nothing of this may map memory meanwhile.
    static struct mapping all[4096];
    static char text[1 << 20];
    uint64_t have = 0, n = 0, longest = 0;
    int fd = open_maps();
    CHECK(fd >= 0);
    for (ssize_t r; (r = read(fd, text + have, sizeof text - 1 - have)) > 0;)
        have += (uint64_t)r;
    for (char *line = text, *end; (end = strchr(line, '\n')); line = end + 1, n++) {
        unsigned long a, b, inode;
        char perms[5];
        CHECK(n < 4096 && sscanf(line, "%lx-%lx %4s %*x %*s %lu", &a, &b, perms, &inode) == 4);
        all[n] = (struct mapping){a, b, perms[3] == 's' || inode ? SHARED_OR_FILE : 0};
        if ((uint64_t)(end - line) > longest)
            longest = (uint64_t)(end - line);
    }
    CHECK(n > 500 && longest > 1500);
    for (uint64_t i = 0; i < n && all[i].a < 1ull << 47; i++) {
        if (i && all[i - 1].b < all[i].a)
            same(fd, all[i - 1].b, &all[i], "in a gap");
        same(fd, all[i].a, &all[i], "at its begin");
        same(fd, all[i].b - 1, &all[i], "at its end");
    }

    // One without EDM: side by side, and of one kind. A mark that EDM has nothing to do with keeps two of them apart.
    char *q = area(64);
    put(q, 8, PROT_READ);
    put(q + 8 * PAGE, 8, PROT_READ);
    put(q + 16 * PAGE, 8, PROT_READ | PROT_WRITE);
    put(q + 32 * PAGE, 8, PROT_READ);
    CHECK(!madvise(q + 4 * PAGE, 8 * PAGE, MADV_DONTDUMP));
    uint64_t at = (uint64_t)q;
    CHECK(one_without_edm(fd, at, at + 16 * PAGE));
    CHECK(one_without_edm(fd, at + 5 * PAGE, at + 9 * PAGE));
    CHECK(!one_without_edm(fd, at, at + 17 * PAGE));
    CHECK(!one_without_edm(fd, at + 24 * PAGE, at + 40 * PAGE));
    CHECK(!one_without_edm(fd, at + 32 * PAGE, at + 41 * PAGE));

    // Moved, mapping by mapping: what was where, gaps and all, and what follows.
    char *to = area(64);
    put(q, 24, PROT_READ | PROT_WRITE);
    memset(q, 1, 24 * PAGE);
    CHECK(!madvise(q + 4 * PAGE, 8 * PAGE, MADV_DONTDUMP));
    CHECK(!munmap(q + 6 * PAGE, PAGE));
    long error;
    CHECK(move_each(fd, at, 24 * PAGE, 0, false, (uint64_t)to, &error) == 24 * PAGE && !error);
    for (uint64_t i = 0; i < 24; i++)
        CHECK(i == 6 || (to[i * PAGE] == 1 && to[(i + 1) * PAGE - 1] == 1));
    struct mapping m;
    CHECK(mapping_from(fd, at, &m) && m.a == at + 24 * PAGE);

    // What fails in the middle is as it was: it may not grow so far, and its first mappings have been moved by then.
    put(to + 6 * PAGE, 1, PROT_READ | PROT_WRITE);
    struct order o = {(uint64_t)to, 24 * PAGE, 1ull << 47, MREMAP_MAYMOVE | MREMAP_FIXED, at};
    CHECK(move_all(fd, &o, at) < 0);
    for (uint64_t i = 0; i < 24; i++)
        CHECK(to[i * PAGE] == (i != 6));
    return 0;
}
