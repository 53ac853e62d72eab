// What a program will touch next, from what it touched: each thread's faults are told apart into streams that go up,
// down or in strides. A stream that goes on as expected is given twice as much ahead; what is wrong often is given
// less.
//
// Pages that are brought ahead raise no fault, so the next fault of a stream that was right is the page behind them:
// that is how accuracy is measured, without any help of the kernel.
#include "streams.h"

#include <stdlib.h>

#define SLACK 16  // pages that may have been there already, and were passed without a fault
#define LONGEST_STRIDE 4096
#define JUDGED_AFTER 256  // pages brought ahead, between two looks at how many were of use

static bool goes_on(const struct stream *s, uint64_t page) {
    if (!s->stride)
        return false;
    int64_t off = (int64_t)(page - s->next);
    if (s->stride == 1)
        return off >= 0 && off <= SLACK;
    if (s->stride == -1)
        return off <= 0 && off >= -SLACK;
    return off == 0;
}

static void judge(struct streams *t) {
    if (t->brought < JUDGED_AFTER)
        return;
    if (t->useful * 2 < t->brought)
        t->most = (t->most + 1) / 2;
    else if (t->useful * 8 > t->brought * 5)
        t->most = t->most * 2 < STREAM_MOST ? t->most * 2 : STREAM_MOST;
    t->brought = t->useful = 0;
}

// What was brought ahead of a stream that stopped there was brought for nothing, as far as anyone can tell.
static void gone_wrong(struct streams *t, struct stream *s) {
    t->brought += s->ahead;
    t->total_brought += s->ahead;
    s->ahead = 0;
    judge(t);
}

static struct stream *find(struct streams *t, uint32_t thread, uint64_t page, bool *on) {
    struct stream *near = NULL, *oldest = &t->stream[0];
    *on = true;
    for (int i = 0; i < STREAMS; i++) {
        struct stream *s = &t->stream[i];
        if (s->used < oldest->used)
            oldest = s;
        if (!s->used || s->thread != thread)
            continue;
        if (goes_on(s, page))
            return s;
        int64_t step = (int64_t)(page - s->last);
        if (step && llabs(step) <= LONGEST_STRIDE && (!near || llabs(step) < llabs((int64_t)(page - near->last))))
            near = s;
    }
    *on = false;
    // A neighbour that leads nowhere yet may be where a stream begins; one that goes its way is left alone, until
    // others have taken its place.
    if (near && !near->ahead)
        return near;
    gone_wrong(t, oldest);
    *oldest = (struct stream){.thread = thread};
    return oldest;
}

struct stream *stream_fault(struct streams *t, uint32_t thread, uint64_t page) {
    bool on;
    if (!t->most)
        t->most = STREAM_MOST;
    struct stream *s = find(t, thread, page, &on);
    int64_t step = (int64_t)(page - s->last);
    if (on) {
        t->brought += s->ahead;
        t->useful += s->ahead;
        t->total_brought += s->ahead;
        t->total_useful += s->ahead;
        judge(t);
        s->window = s->window ? s->window * 2 : 2;
    } else if (s->used) {
        bool again = step == s->step;
        s->stride = llabs(step) == 1 || again ? step : 0;
        s->window = s->stride ? 2 : 0;
    }
    if (s->window > t->most)
        s->window = t->most;
    s->step = s->used ? step : 0;
    s->last = page;
    s->ahead = 0;
    s->used = ++t->clock;
    s->next = page + (uint64_t)s->stride;
    return s;
}

void stream_brought(struct stream *s, uint32_t pages, uint64_t last) {
    s->ahead = pages;
    s->last = last;
    s->next = last + (uint64_t)s->stride;
}
