// libedm_debugger.so: what `edm debug` puts into a debugger (LD_PRELOAD). The kernel answers a debugger's access to an
// evicted page with EIO and raises no fault for it, so a failed access to a captured program's memory is made again
// (app/reach.c) after its DM-Handler has brought the pages (native/asking.c). Nothing else is changed.
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include "../app/reach.h"
#include "../edm_abi.h"
#include "../sidecar.h"

static pthread_mutex_t mu = PTHREAD_MUTEX_INITIALIZER;
static int32_t asked_pid;  // whose DM-Handler `line` leads to
static int line = -1;

static void hang_up(void) {
    if (line >= 0)
        close(line);
    line = -1;
    asked_pid = 0;
}

static bool connected(int32_t pid) {
    if (line >= 0 && asked_pid == pid)
        return true;
    hang_up();
    struct edm_capture c;
    if (edm_capture_of(pid, &c))
        return false;
    struct sockaddr_un a = {.sun_family = AF_UNIX};
    memcpy(a.sun_path, c.sock, sizeof a.sun_path);
    struct edm_reply greeting;
    struct edm_hello hello = {.magic = EDM_CTL_MAGIC, .kind = EDM_HELLO_ASK};
    struct timeval patience = {1, 0};
    line = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
    if (line < 0 || setsockopt(line, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof patience) ||
        connect(line, (struct sockaddr *)&a, sizeof a) ||
        recv(line, &greeting, sizeof greeting, 0) != (ssize_t)sizeof greeting ||
        send(line, &hello, sizeof hello, MSG_NOSIGNAL) != (ssize_t)sizeof hello) {
        hang_up();
        return false;
    }
    asked_pid = pid;
    return true;
}

// A DM-Handler that does not answer is asked anew the next time.
static bool bring(int32_t pid, uint64_t first, uint32_t count, bool write) {
    struct edm_ask ask = {EDM_CTL_MAGIC, write ? EDM_ASK_BRING_WRITABLE : EDM_ASK_BRING, pid, count, first};
    struct edm_answer answer;
    if (!connected(pid))
        return false;
    if (send(line, &ask, sizeof ask, MSG_NOSIGNAL) != (ssize_t)sizeof ask ||
        recv(line, &answer, sizeof answer, 0) != (ssize_t)sizeof answer) {
        hang_up();
        return true;
    }
    for (uint32_t i = 0; i < EDM_ASK_PAGES / 64 && !answer.status; i++)
        if (answer.pages[i])
            return true;
    return false;
}

// To find out whom to ask, the program's memory is read (native/outside.c).
bool reach_bring(int32_t pid, uint64_t first, uint32_t count, bool write) {
    static _Thread_local bool asking;
    if (asking)
        return false;
    pthread_mutex_lock(&mu);
    asking = true;
    bool coming = bring(pid == REACH_SELF ? getpid() : abs(pid), first, count, write);
    asking = false;
    pthread_mutex_unlock(&mu);
    return coming;
}

// What a debugger writes to itself is none of this library's business.
void reach_hold(void) {}
void reach_let_go(void) {}

__attribute__((constructor)) static void debugger_start(void) { reach_begin(); }
