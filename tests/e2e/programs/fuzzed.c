// Threads that do to their pages what a script says, ROUNDS times over, against a model of what each page must hold. A
// line of the script is "THREAD CALL PAGE COUNT TO"; what makes no sense at that moment is left out. A thread's first
// OWN pages are an area of its own; the others are stripes that lie between those of the other threads, in mappings
// that all of them split, move, join and drop at once. The first thread is the main one: its stack is the one the
// kernel grows. With MIB, so much memory more is looked at all the while, a few pages a line, for a budget in which
// memory that grows may wait (native/growth.c). Prints one line that is the same
// wherever its memory is. Exit 1 on a wrong byte, 2 on a call that failed.
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <unistd.h>

#define PAGE 4096ul
#define PAGES 160
#define OWN 112
#define STRIPE 12
#define DIRECT 8  // pages of one O_DIRECT transfer
#define THREADS 3
#define MOST 4096  // lines a thread
#define BLOCKS 64  // that a thread lets its memory grow by
#define LOOKS 4    // at pages of the further memory, a line
#define IN_CHILD 24  // lines that a child carries out too, as its own

enum access { HOLE, NONE, READ, WRITE };

struct page {
    uint64_t value;    // 0: zeros
    uint32_t mapping;  // pages of one number lie in one mapping of the kernel's
    uint8_t access;
    uint8_t freed;  // MADV_FREE: as it was, or zeros
    uint8_t locked;
};

struct line {
    int thread, page, count, to;
    char call;
};

// One mapping, as it was made, beside what other threads have made.
struct block {
    char *at;
    int pages;
    uint64_t value;  // of its first page
};

struct owner {
    int number, lines, at, pipe[2], file, child;
    char *base;
    uint64_t values, heap_value;
    uint32_t mappings;
    struct page p[PAGES];
    struct block block[BLOCKS];
    int blocks;
    uint64_t chance;
    struct line line[MOST];
};

static struct owner owner[THREADS];
static char *stripes, *more;
static uint64_t more_pages, next = 1ul << 44;  // where nothing else is
static pthread_barrier_t all_there;
static int rounds, without_direct;

static void stop(int status, const char *format, ...) {
    char text[256];
    va_list v;
    va_start(v, format);
    int n = vsnprintf(text, sizeof text, format, v);
    va_end(v);
    if (write(1, text, (size_t)n) < 0)
        status = 3;
    _exit(status);
}

static void need(const struct owner *o, int good) {
    if (!good)
        stop(2, "thread %d, line %d, call %c: errno %d\n", o->number, o->at, o->line[o->at].call, errno);
}

static char *at(const struct owner *o, int page) {
    if (page < OWN)
        return o->base + (uint64_t)page * PAGE;
    int stripe = (page - OWN) / STRIPE * THREADS + o->number;
    return stripes + (uint64_t)(stripe * STRIPE + (page - OWN) % STRIPE) * PAGE;
}

// Of the addresses that `page` lies in, which are all this thread's, the end.
static int end_of(int page) { return page < OWN ? OWN : page + STRIPE - (page - OWN) % STRIPE; }

static uint64_t word(uint64_t value, uint64_t k) {
    uint64_t x = (value << 20 ^ k) * 0x9e3779b97f4a7c15ull;
    return value ? x ^ x >> 29 : 0;
}

static void check(const struct owner *o, const void *bytes, int page, const char *how) {
    const uint64_t *w = bytes, value = o->p[page].value;
    int zeros = o->p[page].freed && w[0] == 0;
    for (uint64_t k = 0; k < PAGE / 8; k += 73)
        if (w[k] != word(zeros ? 0 : value, k))
            stop(1, "thread %d, line %d, call %c: page %d %s, word %d is %#llx, value %llu\n", o->number, o->at,
                 o->lines ? o->line[o->at % o->lines].call : '-', page, how, (int)k, (unsigned long long)w[k],
                 (unsigned long long)value);
}

static void fill(struct owner *o, int page) {
    uint64_t *w = (uint64_t *)at(o, page), value = (++o->values << 4) | ((uint64_t)o->number + 1);
    for (uint64_t k = 0; k < PAGE / 8; k++)
        w[k] = word(value, k);
    o->p[page].value = value;
    o->p[page].freed = 0;
}

static int all(const struct owner *o, int page, int count, enum access least) {
    if (page + count > end_of(page))
        return 0;
    for (int i = page; i < page + count; i++)
        if (o->p[i].access < least)
            return 0;
    return 1;
}

static int one_mapping(const struct owner *o, int page, int count) {
    if (!all(o, page, count, NONE))
        return 0;
    for (int i = page; i < page + count; i++)
        if (o->p[i].mapping != o->p[page].mapping || o->p[i].access != o->p[page].access || o->p[i].locked)
            return 0;
    return 1;
}

static void set(struct owner *o, int page, int count, struct page what) {
    for (int i = page; i < page + count; i++)
        o->p[i] = what;
}

static struct page fresh(struct owner *o) { return (struct page){.mapping = ++o->mappings, .access = WRITE}; }

// What is cut off a mapping is another one from there on.
static void split(struct owner *o, int end) {
    if (end >= PAGES || o->p[end].access == HOLE)
        return;
    uint32_t was = o->p[end].mapping, now = ++o->mappings;
    for (int i = end; i < PAGES && o->p[i].mapping == was; i++)
        o->p[i].mapping = now;
}

static void map_over(struct owner *o, int page, int count) {
    char *to = at(o, page);
    need(o,
         mmap(to, (size_t)count * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) == to);
    split(o, page + count);
    set(o, page, count, fresh(o));
}

static void drop(struct owner *o, int page, int count, int advice) {
    for (int i = page; i < page + count; i++)
        if (o->p[i].locked)
            return;
    need(o, !madvise(at(o, page), (size_t)count * PAGE, advice));
    for (int i = page; i < page + count; i++) {
        if (advice == MADV_DONTNEED)
            o->p[i].value = o->p[i].freed = 0;
        else
            o->p[i].freed = 1;
    }
}

static void protect(struct owner *o, int page, int count, int prot, enum access access) {
    for (int i = page; i < page + count; i++)
        if (o->p[i].locked)
            return;
    need(o, !mprotect(at(o, page), (size_t)count * PAGE, prot));
    for (int i = page; i < page + count; i++)
        o->p[i].access = access;
}

// Moves of one mapping, or a part of it; what is left behind is a hole, or empty with MREMAP_DONTUNMAP.
static void move(struct owner *o, int page, int count, int to, int dontunmap) {
    if (to + count > end_of(to) || (to < page + count && page < to + count) || !one_mapping(o, page, count) ||
        o->p[page].access != WRITE)
        return;
    size_t bytes = (size_t)count * PAGE;
    int flags = MREMAP_MAYMOVE | MREMAP_FIXED | (dontunmap ? MREMAP_DONTUNMAP : 0);
    need(o, mremap(at(o, page), bytes, bytes, flags, at(o, to)) == at(o, to));
    split(o, to + count);
    memcpy(&o->p[to], &o->p[page], (size_t)count * sizeof o->p[0]);
    uint32_t mapping = ++o->mappings;
    for (int i = to; i < to + count; i++)
        o->p[i].mapping = mapping;
    split(o, page + count);
    set(o, page, count, dontunmap ? fresh(o) : (struct page){0});
}

static void resize(struct owner *o, int page, int count, int size) {
    if (!one_mapping(o, page, count) || o->p[page].access != WRITE || page + size > end_of(page) || size < 1)
        return;
    for (int i = page + count; i < page + size; i++)
        if (o->p[i].access != HOLE)
            return;
    if (size > count && page + count < PAGES && o->p[page + count].mapping == o->p[page].mapping)
        return;
    need(o, mremap(at(o, page), (size_t)count * PAGE, (size_t)size * PAGE, 0) == at(o, page));
    struct page more = {.mapping = o->p[page].mapping, .access = WRITE};
    split(o, page + count);
    set(o, page + size < page + count ? page + size : page + count, abs(size - count),
        size > count ? more : (struct page){0});
}

static void unmap(struct owner *o, int page, int count) {
    need(o, !munmap(at(o, page), (size_t)count * PAGE));
    split(o, page + count);
    set(o, page, count, (struct page){0});
}

static void look(const struct owner *o, int page, int count, const char *how) {
    for (int i = page; i < page + count; i++)
        if (o->p[i].access >= READ)
            check(o, at(o, i), i, how);
}

// What was read of a page that had been freed was one of the two it could be; where it went it is known which.
static void copied(struct owner *o, int page, int to) {
    o->p[to].value = o->p[page].freed && !*(uint64_t *)at(o, to) ? 0 : o->p[page].value;
    o->p[to].freed = 0;
}

static void through_a_pipe(struct owner *o, int page, int to) {
    if (!all(o, page, 1, READ) || !all(o, to, 1, WRITE))
        return;
    need(o, write(o->pipe[1], at(o, page), PAGE) == (ssize_t)PAGE);
    need(o, read(o->pipe[0], at(o, to), PAGE) == (ssize_t)PAGE);
    copied(o, page, to);
}

// The device reads and writes the pages themselves, which are pinned meanwhile.
static void through_a_file(struct owner *o, int page, int count, int to) {
    count = count < DIRECT ? count : DIRECT;
    if (!all(o, page, count, READ) || !all(o, to, count, WRITE) || (to < page + count && page < to + count))
        return;
    size_t bytes = (size_t)count * PAGE;
    need(o, pwrite(o->file, at(o, page), bytes, 0) == (ssize_t)bytes);
    need(o, pread(o->file, at(o, to), bytes, 0) == (ssize_t)bytes);
    for (int i = 0; i < count; i++)
        copied(o, page + i, to + i);
}

// MADV_REMOVE is for shared memory: here it must fail, and change nothing.
static void remove_in_vain(const struct owner *o, int page, int count) {
    for (int i = page; i < page + count; i++)
        if (o->p[i].locked)
            return;
    need(o, madvise(at(o, page), (size_t)count * PAGE, MADV_REMOVE) == -1 && errno == EINVAL);
    look(o, page, count, "not removed");
}

// A stack of so many pages more, each looked at on the way back.
static uint64_t deep(const struct owner *o, int levels) {
    volatile uint64_t here[PAGE / 8];
    uint64_t value = o->values * 64 + (uint64_t)levels + 1;
    for (uint64_t k = 0; k < PAGE / 8; k += 73)
        here[k] = word(value, k);
    uint64_t below = levels ? deep(o, levels - 1) : 0;
    for (uint64_t k = 0; k < PAGE / 8; k += 73)
        if (here[k] != word(value, k))
            stop(1, "thread %d, line %d: level %d of the stack, word %d is %#llx\n", o->number, o->at, levels, (int)k,
                 (unsigned long long)here[k]);
    return below + here[0];
}

static void read_by_the_kernel(const struct owner *o, int page, int count) {
    static _Thread_local char bytes[4 * PAGE];
    count = count < 4 ? count : 4;
    struct iovec to = {bytes, (size_t)count * PAGE}, from = {at(o, page), (size_t)count * PAGE};
    need(o, process_vm_readv(getpid(), &to, 1, &from, 1, 0) == (ssize_t)((size_t)count * PAGE));
    for (int i = 0; i < count; i++)
        check(o, bytes + (size_t)i * PAGE, page + i, "by process_vm_readv");
}

static void look_at_block(const struct owner *o, const struct block *b);
static void fill_block(struct owner *o, struct block *b, int from);
static void go_on(struct owner *o, int lines);

static void fork_and_look(struct owner *o) {
    pid_t child = fork();
    if (child == 0) {
        look(o, 0, PAGES, "in the child");
        o->child = 1;
        go_on(o, o->at + 1 + IN_CHILD < o->lines ? o->at + 1 + IN_CHILD : o->lines);
        for (int i = 0; i < o->blocks; i++) {
            look_at_block(o, &o->block[i]);
            fill_block(o, &o->block[i], 0);
        }
        for (int i = 0; i < PAGES; i += 3)
            if (o->p[i].access == WRITE)
                fill(o, i);
        look(o, 0, PAGES, "in the child, which wrote");
        _exit(0);
    }
    need(o, child > 0);
    for (int i = 1; i < PAGES; i += 5)
        if (o->p[i].access == WRITE)
            fill(o, i);
    int status = 0;
    need(o, waitpid(child, &status, 0) == child);
    if (status)
        stop(1, "thread %d, line %d: the child ended with %#x\n", o->number, o->at, status);
}

// The heap is the first thread's, and nobody allocates from it any more.
static void heap(struct owner *o, int count) {
    if (o->number)
        return;
    char *was = sbrk((intptr_t)((size_t)count * PAGE));
    need(o, was != (void *)-1);
    for (size_t i = 0; i < (size_t)count * PAGE; i += PAGE / 2)
        if (was[i])
            stop(1, "line %d: the heap grew by a page that is not zeros\n", o->at);
    memset(was, 0x5a, (size_t)count * PAGE);
    need(o, sbrk(-(intptr_t)((size_t)count * PAGE)) != (void *)-1);
}

static void lock(struct owner *o, int page, int count, int locked) {
    need(o, !(locked ? mlock : munlock)(at(o, page), (size_t)count * PAGE));
    for (int i = page; i < page + count; i++) {
        o->p[i].locked = (uint8_t)locked;
        if (!locked)  // the kernel need not merge what it has split
            o->p[i].mapping = ++o->mappings;
    }
}

static void fill_block(struct owner *o, struct block *b, int from) {
    for (int i = from; i < b->pages; i++)
        for (uint64_t k = 0; k < PAGE / 8; k += 73)
            ((uint64_t *)(b->at + (size_t)i * PAGE))[k] = word(b->value + (uint64_t)i, k);
    o->values += (uint64_t)(b->pages - from);
}

static void look_at_block(const struct owner *o, const struct block *b) {
    for (int i = 0; i < b->pages; i++)
        for (uint64_t k = 0; k < PAGE / 8; k += 73) {
            uint64_t is = ((uint64_t *)(b->at + (size_t)i * PAGE))[k];
            if (is != word(b->value + (uint64_t)i, k))
                stop(1, "thread %d, line %d: page %d of a block of %d, word %d is %#llx\n", o->number, o->at, i,
                     b->pages, (int)k, (unsigned long long)is);
        }
}

// Side by side, downwards, those of all threads in turn.
static char *next_block(const struct owner *o, int pages, int map) {
    size_t bytes = (size_t)pages * PAGE;
    char *to = (char *)__atomic_sub_fetch(&next, bytes, __ATOMIC_RELAXED);
    if (map)
        need(o,
             mmap(to, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0) == to);
    return to;
}

static void grow(struct owner *o, int count) {
    if (o->blocks == BLOCKS)
        return;
    struct block *b = &o->block[o->blocks++];
    *b = (struct block){next_block(o, count, 1), count, (o->values + 1) * 256 + (uint64_t)o->number * 64};
    fill_block(o, b, 0);
}

static void change_block(struct owner *o, struct block *b, int count) {
    size_t was = (size_t)b->pages * PAGE, bytes = (size_t)count * PAGE;
    look_at_block(o, b);
    if (count > b->pages) {
        char *to = next_block(o, count, 0);
        need(o, mremap(b->at, was, bytes, MREMAP_MAYMOVE | MREMAP_FIXED, to) == to);
        b->at = to;
    } else {
        need(o, mremap(b->at, was, bytes, 0) == b->at);
    }
    int from = b->pages;
    b->pages = count;
    if (count > from)
        fill_block(o, b, from);
    look_at_block(o, b);
}

static void give_block_back(struct owner *o, struct block *b) {
    look_at_block(o, b);
    need(o, !munmap(b->at, (size_t)b->pages * PAGE));
    *b = o->block[--o->blocks];
}

static void look_at_more(struct owner *o) {
    for (int i = 0; more_pages && i < LOOKS; i++) {
        o->chance = o->chance * 6364136223846793005ull + 1442695040888963407ull;
        uint64_t page = (o->chance >> 33) % more_pages, is = *(uint64_t *)(more + page * PAGE);
        if (is != word(page + 1, 0))
            stop(1, "thread %d, line %d: page %llu of the further memory is %#llx\n", o->number, o->at,
                 (unsigned long long)page, (unsigned long long)is);
    }
}

static void carry_out(struct owner *o, const struct line *l) {
    int page = l->page, count = page + l->count <= end_of(page) ? l->count : end_of(page) - page;
    int readable = all(o, page, count, READ), writable = all(o, page, count, WRITE);
    if (o->child && strchr("mDe", l->call))  // what a child splits, the kernel need not merge
        count = 1;
    size_t bytes = (size_t)count * PAGE;
    switch (l->call) {
    case 'w':
        for (int i = page; writable && i < page + count; i++)
            fill(o, i);
        break;
    case 'r':
        look(o, page, count, "read");
        break;
    case 'd':
        if (writable)
            drop(o, page, count, MADV_DONTNEED);
        break;
    case 'f':
        if (writable)
            drop(o, page, count, MADV_FREE);
        break;
    case 'p':
        if (writable)
            need(o, !madvise(at(o, page), bytes, MADV_POPULATE_WRITE));
        break;
    case 'q':
        if (readable)
            need(o, !madvise(at(o, page), bytes, MADV_POPULATE_READ));
        break;
    case 'n':
        if (all(o, page, count, NONE))
            protect(o, page, count, PROT_NONE, NONE);
        break;
    case 'o':
        if (all(o, page, count, NONE))
            protect(o, page, count, PROT_READ, READ);
        break;
    case 'a':
        if (all(o, page, count, NONE))
            protect(o, page, count, PROT_READ | PROT_WRITE, WRITE);
        break;
    case 'm':
        move(o, page, count, l->to, 0);
        break;
    case 'D':
        move(o, page, count, l->to, 1);
        break;
    case 'e':
        resize(o, page, count, l->to);
        break;
    case 'u':
        unmap(o, page, count);
        break;
    case 'x':
        map_over(o, page, count);
        break;
    case 'k':
        through_a_pipe(o, page, l->to);
        break;
    case 'O':
        through_a_file(o, page, count, l->to);
        break;
    case 'R':
        if (all(o, page, count, NONE))
            remove_in_vain(o, page, count);
        break;
    case 'S':
        deep(o, 4 * count);
        break;
    case 'v':
        if (readable)
            read_by_the_kernel(o, page, count);
        break;
    case 'l':
        if (writable)
            lock(o, page, count < 16 ? count : 16, 1);
        break;
    case 'L':
        if (writable)
            lock(o, page, count, 0);
        break;
    case 'b':
        heap(o, count);
        break;
    case 'G':
        grow(o, l->count);
        break;
    case 'M':  // every other time the newest
        if (o->blocks)
            change_block(o, &o->block[l->to % 2 ? o->blocks - 1 : l->to % o->blocks], l->count);
        break;
    case 'B':
        if (o->blocks)
            give_block_back(o, &o->block[l->to % o->blocks]);
        break;
    case 'Z':  // long enough, often, for EDM to look at the mappings
        need(o, !usleep((unsigned)l->count * 100));
        break;
    case 'F':
        if (!o->child)
            fork_and_look(o);
        break;
    }
}

static void go_on(struct owner *o, int lines) {
    for (o->at++; o->at < lines; o->at++)
        look_at_more(o), carry_out(o, &o->line[o->at]);
}

static void *area(const struct owner *o, uint64_t pages) {
    void *p = mmap(NULL, pages * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    need(o, p != MAP_FAILED);
    return p;
}

// O_DIRECT where the file system has it; the last line says if it has not.
static int open_file(const struct owner *o, const char *script) {
    char path[4096];
    snprintf(path, sizeof path, "%s.%d", script, o->number);
    int fd = open(path, O_RDWR | O_CREAT | O_TRUNC | O_DIRECT, 0600);
    if (fd < 0 && errno == EINVAL) {
        without_direct = 1;
        fd = open(path, O_RDWR | O_CREAT | O_TRUNC, 0600);
    }
    need(o, fd >= 0 && !unlink(path));
    return fd;
}

static void *work(void *arg) {
    struct owner *o = arg;
    o->base = area(o, OWN);
    for (int page = 0; page < PAGES; page = end_of(page))
        set(o, page, end_of(page) - page, fresh(o));
    pthread_barrier_wait(&all_there);
    for (int r = 0; r < rounds; r++)
        o->at = -1, go_on(o, o->lines);
    look(o, 0, PAGES, "at the end");
    for (int i = 0; i < o->blocks; i++)
        look_at_block(o, &o->block[i]);
    return NULL;
}

int main(int argc, char **argv) {
    FILE *f = argc == 4 ? fopen(argv[1], "r") : NULL;
    if (!f)
        stop(3, "usage: fuzzed SCRIPT ROUNDS MIB\n");
    rounds = atoi(argv[2]);
    struct line l;
    while (fscanf(f, "%d %c %d %d %d", &l.thread, &l.call, &l.page, &l.count, &l.to) == 5) {
        if (l.thread < 0 || l.thread >= THREADS || l.page < 0 || l.page >= PAGES || l.count < 1 || l.to < 0 ||
            l.to >= PAGES || owner[l.thread].lines == MOST)
            stop(3, "a bad line in %s\n", argv[1]);
        owner[l.thread].line[owner[l.thread].lines++] = l;
    }
    fclose(f);
    more_pages = (uint64_t)atoi(argv[3]) << 8;
    if (more_pages)
        more = area(&owner[0], more_pages);
    for (uint64_t i = 0; i < more_pages; i++)
        *(uint64_t *)(more + i * PAGE) = word(i + 1, 0);
    pthread_t t[THREADS];
    pthread_barrier_init(&all_there, NULL, THREADS);
    stripes = area(&owner[0], THREADS * (PAGES - OWN));
    for (int i = 0; i < THREADS; i++) {
        owner[i].number = i;
        owner[i].chance = (uint64_t)i;
        owner[i].file = open_file(&owner[i], argv[1]);
        need(&owner[i], !pipe(owner[i].pipe));
    }
    for (int i = 1; i < THREADS; i++)
        if (pthread_create(&t[i], NULL, work, &owner[i]))
            stop(2, "no thread\n");
    work(&owner[0]);
    unsigned long long values = owner[0].values;
    for (int i = 1; i < THREADS; i++) {
        pthread_join(t[i], NULL);
        values += owner[i].values;
    }
    stop(0, "%d threads, %llu pages written%s\n", THREADS, values, without_direct ? ", no O_DIRECT" : "");
}
