// What the files of the measuring program share. It is an ordinary program: `edm bench` runs it under `edm run`, where
// it is captured as any other, and plainly for the floor. Its result is one JSON object on standard output.
#pragma once
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define PAGE 4096ul

struct measure {
    const char *mode;
    uint64_t region_pages, budget_pages, accesses;
    uint32_t threads;
    const char *file;
};

// Nanoseconds per page or per fault, one figure for each chunk of accesses: what a median can be taken of.
struct samples {
    double *v;
    uint32_t n, cap;
    uint64_t faults, accesses, ns;
};

uint64_t clock_ns(void);
void die(const char *format, ...) __attribute__((noreturn, format(printf, 1, 2)));
void samples_add(struct samples *s, double ns);
void samples_print(const char *name, struct samples *s);

// A private anonymous region without huge pages; with `captured`, not before EDM has it.
uint8_t *region_map(uint64_t pages, bool captured);
// The 8 bytes page i must begin with.
uint64_t page_mark(uint64_t i);
// Order in which 0 … n-1 are visited, each once.
uint32_t *permutation(uint64_t n, uint64_t seed);

int floor_fault(const struct measure *m, bool write);
int floor_pread(const struct measure *m);
int floor_apart(const struct measure *m);
int sort_integers(const struct measure *m);
void sort_64(uint64_t *first, uint64_t *last);

#ifdef __cplusplus
}
#endif
