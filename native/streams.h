// Streams of faults: what to bring ahead of them. Pure bookkeeping, no engine, no kernel.
#pragma once
#include <stdbool.h>
#include <stdint.h>

#define STREAMS 16
#define STREAM_MOST 63  // pages ahead of one fault: with it they fill a worker's batch

struct stream {
    uint32_t thread;
    uint32_t window;       // pages to bring ahead at the next fault that is as expected
    uint32_t ahead;        // pages brought ahead at the last one
    int64_t stride, step;  // pages from one fault to the next: as trusted (0: not), and as last seen
    uint64_t last, next;   // page touched or brought last; where the next fault should be
    uint64_t used;
};

struct streams {
    struct stream stream[STREAMS];
    uint64_t clock;
    uint32_t most;             // window that all streams of this space keep to
    uint32_t brought, useful;  // since the last judgement
    uint64_t total_brought, total_useful;
};

// A thread has faulted: its stream, whose `stride` and `window` say what to bring ahead (stride 0: nothing).
struct stream *stream_fault(struct streams *t, uint32_t thread, uint64_t page);
// `pages` pages were brought ahead, the last of them (or of what was there already) being `last`.
void stream_brought(struct stream *s, uint32_t pages, uint64_t last);
