// edm-measure MODE key=value…: one pattern of accesses, timed from inside the program. Modes: floor-fault,
// floor-fault-write, floor-pread, new, wide, read-random, write-random, read-sequential, write-sequential, threads,
// rescue, evict, sort.
#include "measure.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <time.h>
#include <unistd.h>

#define CHUNK 256u
#define MAX_THREADS 64

uint64_t clock_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

void die(const char *format, ...) {
    va_list a;
    va_start(a, format);
    fputs("edm-measure: ", stderr);
    vfprintf(stderr, format, a);
    fputc('\n', stderr);
    va_end(a);
    exit(1);
}

static void *must(void *p) {
    if (!p)
        die("out of memory");
    return p;
}

void samples_add(struct samples *s, double ns) {
    if (s->n == s->cap) {
        s->cap = s->cap ? s->cap * 2 : 1024;
        s->v = must(realloc(s->v, s->cap * sizeof *s->v));
    }
    s->v[s->n++] = ns;
}

void samples_print(const char *name, struct samples *s) {
    printf("\"%s\": [", name);
    for (uint32_t i = 0; i < s->n; i++)
        printf("%s%.1f", i ? "," : "", s->v[i]);
    printf("], \"%s_faults\": %llu, \"%s_accesses\": %llu, \"%s_total\": %llu", name, (unsigned long long)s->faults,
           name, (unsigned long long)s->accesses, name, (unsigned long long)s->ns);
}

// ---- the region -----------------------------------------------------------------------------------------------

// Whether the mapping that holds `at` is registered with a userfaultfd ("um": missing faults). Source:
// proc_pid_smaps(5).
static bool is_captured(const void *at) {
    FILE *f = must(fopen("/proc/self/smaps", "re"));
    char line[512];
    bool here = false, found = false;
    while (fgets(line, sizeof line, f)) {
        unsigned long a, b;
        if (sscanf(line, "%lx-%lx ", &a, &b) == 2)
            here = (uintptr_t)at >= a && (uintptr_t)at < b;
        else if (here && strncmp(line, "VmFlags:", 8) == 0)
            found = strstr(line, " um") != NULL;
    }
    fclose(f);
    return found;
}

uint8_t *region_map(uint64_t pages, bool captured) {
    void *p = mmap(NULL, pages * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED)
        die("mmap of %llu pages: %s", (unsigned long long)pages, strerror(errno));
    madvise(p, pages * PAGE, MADV_NOHUGEPAGE);
    for (int i = 0; captured && !is_captured((uint8_t *)p + pages * PAGE / 2); i++) {
        if (i == 2000)
            die("the region was not captured within 2 s");
        usleep(1000);
    }
    return p;
}

uint64_t page_mark(uint64_t i) { return (i + 1) * 0x9e3779b97f4a7c15u | 1; }

static uint64_t next_random(uint64_t *x) {
    *x ^= *x << 13;
    *x ^= *x >> 7;
    *x ^= *x << 17;
    return *x;
}

uint32_t *permutation(uint64_t n, uint64_t seed) {
    uint32_t *v = must(malloc(n * sizeof *v));
    uint64_t x = seed * 0x9e3779b97f4a7c15u + 1;
    for (uint64_t i = 0; i < n; i++)
        v[i] = (uint32_t)i;
    for (uint64_t i = n - 1; i > 0; i--) {
        uint64_t k = next_random(&x) % (i + 1);
        uint32_t t = v[i];
        v[i] = v[k], v[k] = t;
    }
    return v;
}

// Page faults of this thread. Every one on the region is userfaultfd's; after the wait the kernel tries it again and
// counts it as minor or major by which locks it took. Source: mm/memory.c, mm_account_fault.
static uint64_t faults_taken(void) {
    struct rusage u;
    getrusage(RUSAGE_THREAD, &u);
    return (uint64_t)u.ru_minflt + (uint64_t)u.ru_majflt;
}

static void write_page(uint8_t *region, uint64_t i) { *(volatile uint64_t *)(region + i * PAGE) = page_mark(i); }

static void read_page(const uint8_t *region, uint64_t i) {
    uint64_t got = *(const volatile uint64_t *)(region + i * PAGE);
    if (got != page_mark(i))
        die("page %llu holds %#llx in place of %#llx: wrong bytes", (unsigned long long)i, (unsigned long long)got,
            (unsigned long long)page_mark(i));
}

static void touch(uint8_t *region, uint64_t i, bool write) {
    if (write)
        write_page(region, i);
    else
        read_page(region, i);
}

// Visits n pages from order[from] on (order NULL: in sequence), wrapping at `pages`; s NULL: not measured. One sample a
// chunk: its time over its faults (per_fault) or over its accesses. Whatever evictions delay the program is in it.
static void visit(struct samples *s, uint8_t *region, const uint32_t *order, uint64_t pages, uint64_t from, uint64_t n,
                  bool write, bool per_fault) {
    for (uint64_t done = 0; done < n; done += CHUNK) {
        uint64_t f = faults_taken(), t = clock_ns();
        for (uint64_t k = 0; k < CHUNK; k++) {
            uint64_t at = (from + done + k) % pages;
            touch(region, order ? order[at] : at, write);
        }
        t = clock_ns() - t;
        f = faults_taken() - f;
        if (!s)
            continue;
        s->ns += t;
        s->faults += f;
        s->accesses += CHUNK;
        if (!per_fault)
            samples_add(s, (double)t / CHUNK);
        else if (f)
            samples_add(s, (double)t / (double)f);
    }
}

static int print_one(struct samples *s) {
    printf("{");
    samples_print("ns", s);
    printf("}\n");
    return 0;
}

// ---- modes ----------------------------------------------------------------------------------------------------

static int new_pages(const struct measure *m) {
    uint64_t pages = m->budget_pages / 2;
    uint32_t *order = permutation(pages, 3);
    uint8_t *region = region_map(pages, true);
    struct samples s = {0};
    visit(&s, region, order, pages, 0, pages, true, true);
    return print_one(&s);
}

#define BLOCK_PAGES 512u   // 2 MiB: what one page of the kernel's page table covers
#define WIDE (1ull << 40)  // bytes of address space
#define NARROW (1ull << 30)

// New pages in random order, in blocks that are spread over `span` bytes; the time of each chunk over its faults.
static void spread(const struct measure *m, struct samples *s, uint64_t span) {
    uint64_t pages = m->budget_pages / 4 / BLOCK_PAGES * BLOCK_PAGES, apart = span / PAGE / (pages / BLOCK_PAGES);
    uint32_t *order = permutation(pages, 6);
    uint8_t *region = region_map(span / PAGE, true);
    for (uint64_t done = 0; done < pages; done += CHUNK) {
        uint64_t f = faults_taken(), t = clock_ns();
        for (uint64_t k = done; k < done + CHUNK; k++)
            write_page(region, order[k] / BLOCK_PAGES * apart + order[k] % BLOCK_PAGES);
        t = clock_ns() - t;
        f = faults_taken() - f;
        s->ns += t;
        s->faults += f;
        s->accesses += CHUNK;
        if (f)
            samples_add(s, (double)t / (double)f);
    }
    free(order);
}

static int wide(const struct measure *m) {
    struct samples narrow = {0}, wide = {0};
    spread(m, &narrow, NARROW);
    spread(m, &wide, WIDE);
    printf("{");
    samples_print("narrow", &narrow);
    printf(", ");
    samples_print("ns", &wide);
    printf("}\n");
    return 0;
}

static uint8_t *filled(const struct measure *m) {
    uint8_t *region = region_map(m->region_pages, true);
    visit(NULL, region, NULL, m->region_pages, 0, m->region_pages, true, false);
    return region;
}

// Every page is visited once in random order before the same order is timed: the distance between two visits of a page
// is the whole region.
static int random_misses(const struct measure *m, bool write) {
    uint32_t *order = permutation(m->region_pages, 4);
    uint8_t *region = filled(m);
    visit(NULL, region, order, m->region_pages, 0, m->region_pages, write, false);
    struct samples s = {0};
    visit(&s, region, order, m->region_pages, 0, m->accesses, write, true);
    return print_one(&s);
}

static int sequential(const struct measure *m, bool write) {
    uint8_t *region = filled(m);
    visit(NULL, region, NULL, m->region_pages, 0, m->region_pages, write, false);
    struct samples s = {0};
    visit(&s, region, NULL, m->region_pages, 0, m->region_pages, write, false);
    return print_one(&s);
}

struct walker {
    const struct measure *m;
    uint8_t *region;
    uint32_t *order;
    uint64_t from, n;
    struct samples s;
};

static void *walk(void *argument) {
    struct walker *w = argument;
    visit(&w->s, w->region, w->order, w->m->region_pages, w->from, w->n, false, true);
    return NULL;
}

// The same number of accesses by one thread, then spread over several.
static int threads(const struct measure *m) {
    uint32_t *order = permutation(m->region_pages, 5);
    uint8_t *region = filled(m);
    visit(NULL, region, order, m->region_pages, 0, m->region_pages, false, false);
    struct samples one = {0};
    visit(&one, region, order, m->region_pages, 0, m->accesses, false, true);
    struct walker w[MAX_THREADS];
    pthread_t id[MAX_THREADS];
    uint64_t share = m->region_pages / m->threads, t = clock_ns();
    for (uint32_t i = 0; i < m->threads; i++) {
        w[i] = (struct walker){m, region, order, m->accesses + i * share, m->accesses / m->threads, {0}};
        if (pthread_create(&id[i], NULL, walk, &w[i]))
            die("cannot start a thread");
    }
    struct samples many = {0};
    for (uint32_t i = 0; i < m->threads; i++) {
        pthread_join(id[i], NULL);
        many.faults += w[i].s.faults;
        many.accesses += w[i].s.accesses;
    }
    many.ns = clock_ns() - t;
    if (!many.faults)
        die("no fault was seen");
    samples_add(&many, (double)many.ns / (double)many.faults);
    printf("{");
    samples_print("one", &one);
    printf(", ");
    samples_print("ns", &many);
    printf("}\n");
    return 0;
}

static uint64_t present(int pagemap, const uint8_t *region, uint64_t first, uint64_t *entries, uint64_t n) {
    ssize_t got = pread(pagemap, entries, n * 8, (off_t)(((uintptr_t)region / PAGE + first) * 8));
    return got < 0 ? 0 : (uint64_t)got / 8;
}

#define LAP 2048        // pages written between two looks, so that some leave
#define SETTLE_US 5000  // eviction has stopped, and what left last waits to be sent
#define RESCUED 32      // pages asked back after each look, not neighbours

// Pages that have just left are asked back before they are sent to the DMS: pages are written in sequence, and pagemap
// tells how far eviction, which follows behind, has come. How many were rescues is for EDM's counters to say.
static int rescues(const struct measure *m) {
    uint8_t *region = filled(m);
    int pagemap = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
    if (pagemap < 0)
        die("/proc/self/pagemap: %s", strerror(errno));
    uint64_t *entry = must(calloc(m->region_pages, sizeof *entry));
    struct samples s = {0};
    uint64_t pages = m->region_pages;
    for (uint64_t i = 0; i < m->accesses; i++) {
        write_page(region, i % pages);
        if (i % LAP || i < m->budget_pages)
            continue;
        usleep(SETTLE_US);
        uint64_t n = present(pagemap, region, 0, entry, pages), at = i % pages, back = 0, asked = 0;
        while (back < n && entry[(at + pages - back) % pages] >> 63)
            back++;  // what is still here: the last that left is behind it
        for (; back < n && asked < RESCUED; back += 3, asked++) {
            uint64_t page = (at + pages - back) % pages;
            uint64_t now;
            if (present(pagemap, region, page, &now, 1) != 1 || now >> 63)
                continue;  // brought ahead of another
            uint64_t t = clock_ns();
            read_page(region, page);
            uint64_t took = clock_ns() - t;
            if (!asked)
                continue;  // the DM-Handler was asleep
            samples_add(&s, (double)took);
            s.accesses++;
            s.ns += took;
        }
    }
    return print_one(&s);
}

static _Atomic bool busy_end;

static void *busy(void *argument) {
    volatile uint64_t *hot = argument;
    for (uint64_t i = 0; !busy_end; i += 8)
        hot[i % (1u << 17)]++;
    return NULL;
}

// What eviction adds to a new page while another thread of the program computes: new pages in sequence within the
// budget, and then beyond it, where each of them drives one out.
static int evictions(const struct measure *m) {
    void *hot = must(calloc(1u << 17, 8));
    pthread_t id;
    if (pthread_create(&id, NULL, busy, hot))
        die("cannot start a thread");
    uint64_t below = m->budget_pages / 2 / CHUNK * CHUNK;
    uint8_t *region = region_map(m->region_pages, true);
    struct samples within = {0}, beyond = {0};
    visit(&within, region, NULL, m->region_pages, 0, below, true, false);
    visit(NULL, region, NULL, m->region_pages, below, m->budget_pages, true, false);
    visit(&beyond, region, NULL, m->region_pages, below + m->budget_pages, m->region_pages - below - m->budget_pages,
          true, false);
    busy_end = true;
    pthread_join(id, NULL);
    printf("{");
    samples_print("within", &within);
    printf(", ");
    samples_print("ns", &beyond);
    printf("}\n");
    return 0;
}

#ifdef EDM_MEASURE_SORT
int sort_integers(const struct measure *m) {
    uint64_t n = m->region_pages * PAGE / 8, x = 88172645463325252u, sum = 0, after = 0;
    uint64_t *v = (uint64_t *)region_map(m->region_pages, false);
    for (uint64_t i = 0; i < n; i++)
        sum += v[i] = next_random(&x);
    uint64_t t = clock_ns();
    sort_64(v, v + n);
    t = clock_ns() - t;
    for (uint64_t i = 0; i < n; i++) {
        after += v[i];
        if (i && v[i - 1] > v[i])
            die("not sorted at %llu", (unsigned long long)i);
    }
    if (sum != after)
        die("the sorted integers are others than before");
    struct samples s = {.ns = t, .accesses = n};
    samples_add(&s, (double)t);
    return print_one(&s);
}

#else
int sort_integers(const struct measure *m) {
    (void)m;
    die("built without a C++ compiler: there is no std::sort");
}
#endif

static void parse(struct measure *m, int argc, char **argv) {
    for (int i = 2; i < argc; i++) {
        char *value = strchr(argv[i], '=');
        if (!value)
            die("'%s' is not key=value", argv[i]);
        *value++ = 0;
        if (!strcmp(argv[i], "file")) {
            m->file = value;
            continue;
        }
        char *end;
        uint64_t number = strtoull(value, &end, 10);
        if (*end || !number)
            die("%s=%s is not a number above 0", argv[i], value);
        if (!strcmp(argv[i], "region"))
            m->region_pages = number;
        else if (!strcmp(argv[i], "budget"))
            m->budget_pages = number;
        else if (!strcmp(argv[i], "accesses"))
            m->accesses = number;
        else if (!strcmp(argv[i], "threads") && number <= MAX_THREADS)
            m->threads = (uint32_t)number;
        else
            die("%s=%s is not known here", argv[i], value);
    }
}

int main(int argc, char **argv) {
    struct measure m = {argc > 1 ? argv[1] : "", 262144, 65536, 131072, 4, "edm-measure.tmp"};
    parse(&m, argc, argv);
    prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0);
    if (!strcmp(m.mode, "floor-fault") || !strcmp(m.mode, "floor-fault-write"))
        return floor_fault(&m, strlen(m.mode) > strlen("floor-fault"));
    if (!strcmp(m.mode, "floor-pread"))
        return floor_pread(&m);
    if (!strcmp(m.mode, "floor-apart"))
        return floor_apart(&m);
    if (!strcmp(m.mode, "new"))
        return new_pages(&m);
    if (!strcmp(m.mode, "wide"))
        return wide(&m);
    if (!strcmp(m.mode, "read-random") || !strcmp(m.mode, "write-random"))
        return random_misses(&m, *m.mode == 'w');
    if (!strcmp(m.mode, "read-sequential") || !strcmp(m.mode, "write-sequential"))
        return sequential(&m, *m.mode == 'w');
    if (!strcmp(m.mode, "threads"))
        return threads(&m);
    if (!strcmp(m.mode, "rescue"))
        return rescues(&m);
    if (!strcmp(m.mode, "evict"))
        return evictions(&m);
    if (!strcmp(m.mode, "sort"))
        return sort_integers(&m);
    die("unknown mode '%s'", m.mode);
}
