// How programs come to be captured: libedm_app.so connects here before main (and after a fork), hands over its uffd and
// control page, and starts its sidecar. The capture thread accepts, watches for exits, and sweeps (sweep.c).
#include "engine.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <unistd.h>

#define ALONE_US 20000      // between two looks while there is no program: at the end of a run it is waited for
#define HANDSHAKE_MS 10000  // a program that says nothing this long while handing over is let go uncaptured

static bool send_reply(int s, int32_t status, int fd) {
    struct edm_reply r = {EDM_CTL_MAGIC, status};
    union {
        struct cmsghdr align;
        char room[CMSG_SPACE(sizeof(int))];
    } u;
    memset(&u, 0, sizeof u);
    struct iovec v = {&r, sizeof r};
    struct msghdr m = {.msg_iov = &v, .msg_iovlen = 1};
    if (fd >= 0) {
        m.msg_control = u.room;
        m.msg_controllen = sizeof u.room;
        struct cmsghdr *h = CMSG_FIRSTHDR(&m);
        h->cmsg_level = SOL_SOCKET;
        h->cmsg_type = SCM_RIGHTS;
        h->cmsg_len = CMSG_LEN(sizeof(int));
        memcpy(CMSG_DATA(h), &fd, sizeof fd);
    }
    return sendmsg(s, &m, MSG_NOSIGNAL) == (ssize_t)sizeof r;
}

// One hello; fds that did not come are -1. False when the program hung up or sent something else.
static bool receive_hello(int s, struct edm_hello *hello, int fds[2]) {
    union {
        struct cmsghdr align;
        char room[CMSG_SPACE(2 * sizeof(int))];
    } u;
    fds[0] = fds[1] = -1;
    struct pollfd p = {s, POLLIN, 0};
    if (poll(&p, 1, HANDSHAKE_MS) != 1)
        return false;
    struct iovec v = {hello, sizeof *hello};
    struct msghdr m = {.msg_iov = &v, .msg_iovlen = 1, .msg_control = u.room, .msg_controllen = sizeof u.room};
    ssize_t n = recvmsg(s, &m, MSG_CMSG_CLOEXEC);
    struct cmsghdr *h = n > 0 ? CMSG_FIRSTHDR(&m) : NULL;
    if (h && h->cmsg_level == SOL_SOCKET && h->cmsg_type == SCM_RIGHTS) {
        size_t bytes = h->cmsg_len - CMSG_LEN(0);
        memcpy(fds, CMSG_DATA(h), bytes < 2 * sizeof(int) ? bytes : 2 * sizeof(int));
    }
    return n == (ssize_t)sizeof *hello && hello->magic == EDM_CTL_MAGIC;
}

struct edm_ctl *ctl_map(int fd) {
    struct stat st;
    if (fd < 0 || fstat(fd, &st) || st.st_size < EDM_CTL_BYTES)
        return NULL;
    struct edm_ctl *c = mmap(NULL, EDM_CTL_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (c == MAP_FAILED)
        return NULL;
    if (c->magic != EDM_CTL_MAGIC || c->size != EDM_CTL_BYTES || c->staging % PAGE_SIZE_ || c->anchor % PAGE_SIZE_) {
        munmap(c, EDM_CTL_BYTES);
        return NULL;
    }
    return c;
}

static int open_proc(int pid, const char *name) {
    char path[48];
    snprintf(path, sizeof path, "/proc/%d/%s", pid, name);
    return open(path, O_RDONLY | O_CLOEXEC);
}

static struct space *space_of_pid(struct edm_engine *g, int pid) {
    for (uint32_t i = 0; i < g->nspaces; i++)
        if (!g->space[i]->dead && g->space[i]->pid == pid && g->space[i]->uffd >= 0)
            return g->space[i];
    return NULL;
}

// What the engine needs of a process, whichever way its uffd came. Takes the control page and its descriptor over.
int space_attach(struct space *s, struct edm_ctl *c, int ctl_fd, int pid) {
    s->ctl = c;
    s->hints_seen = __atomic_load_n(&c->hint_next, __ATOMIC_ACQUIRE);  // what another DM-Handler has followed is past
    s->ctl_fd = ctl_fd;
    s->state->ctl[s->engine->turn] = ctl_fd;
    s->pid = s->state->pid = pid;
    s->apart = s->state->apart = c->app_pid != pid ? process_apart(pid) : 0;
    s->staging = c->staging;
    memcpy(c->sock, s->engine->sock, sizeof c->sock);
    c->handler_pid = getpid();
    c->holder_pid = s->engine->state->holder[s->engine->turn];
    if (s->pidfd < 0)
        s->pidfd = (int)syscall(SYS_pidfd_open, pid, 0);
    s->pagemap_fd = open_proc(pid, "pagemap");
    s->statm_fd = open_proc(pid, "statm");
    s->ksm_fd = open_proc(pid, "ksm_stat");  // not there without KSM
    s->mem_fd = open_proc(pid, "mem");
    if (s->pidfd < 0 || s->pagemap_fd < 0 || s->statm_fd < 0)
        return errno ? -errno : -ESRCH;
    return uffd_register(s, c->staging >> PAGE_SHIFT, (c->staging >> PAGE_SHIFT) + EDM_STAGING_PAGES);
}

static struct space *admit_new(struct edm_engine *g, int pid, struct edm_ctl *c, const int fds[2], int *error) {
    *error = uffd_open_api(g, fds[1]);
    if (*error)
        return NULL;
    struct space *old = space_of_pid(g, pid);
    if (old)  // exec: the process has another address space now
        space_retire(old);
    struct space *s = space_new(g, &uffd_ops);
    s->uffd = s->state->uffd[g->turn] = fds[1];
    *error = space_attach(s, c, fds[0], pid);
    s->anchor = s->state->anchor = c->anchor;
    if (!*error)
        *error = uffd_register(s, c->anchor >> PAGE_SHIFT, (c->anchor >> PAGE_SHIFT) + 1);
    if (!*error)
        *error = uffd_watch(s);
    if (*error) {
        space_retire(s);  // closes both descriptors and unmaps the control page
        return NULL;
    }
    return s;
}

static int parent_of(int pid) {
    char text[512];
    int fd = open_proc(pid, "stat");
    ssize_t n = fd >= 0 ? read(fd, text, sizeof text - 1) : -1;
    if (fd >= 0)
        close(fd);
    if (n <= 0)
        return 0;
    text[n] = 0;
    char *p = strrchr(text, ')');
    int parent = 0;
    return p && sscanf(p + 1, " %*c %d", &parent) == 1 ? parent : 0;
}

// The child that says that it is `pid` here and `own` for itself. Where it was not found here when it faulted first,
// the number that came with that is the one of its own PID namespace; others may have the same in theirs.
static struct space *child_of(struct edm_engine *g, int pid, int own, int parent) {
    struct space *s = space_of_pid(g, pid), *orphan = NULL;
    if (own == pid || s)
        return s;
    for (uint32_t i = 0; i < g->nspaces; i++) {
        s = g->space[i];
        if (s->dead || !s->apart || s->own != own || s->uffd < 0 || !s->forked || s->ready || s->ctl || !s->parent)
            continue;
        if (s->parent->pid == parent)
            return s;
        if (s->parent->dead || pidfd_dead(s->parent->pidfd))
            orphan = s;
    }
    return orphan;
}

// The child's uffd came with the parent's FORK event; its first touch of the anchor said whose it is.
static struct space *admit_forked(struct edm_engine *g, int pid, struct edm_ctl *c, int ctl_fd, int *error) {
    struct space *s = NULL;
    int parent = parent_of(pid);
    for (int ms = 0; ms < HANDSHAKE_MS && !s && !atomic_load(&g->stop); ms++) {
        s = child_of(g, pid, c->app_pid, parent);
        if (s && s->forked && !s->ready)
            break;
        s = NULL;
        pthread_mutex_unlock(&g->mu);
        usleep(1000);
        pthread_mutex_lock(&g->mu);
    }
    if (!s) {
        *error = EDM_AGAIN_AS_NEW;
        return NULL;
    }
    if (s->ctl) {  // the DM-Handler died while it came before
        munmap(s->ctl, EDM_CTL_BYTES);
        close(s->ctl_fd);
        close(s->pagemap_fd);
        close(s->statm_fd);
        int more[] = {s->ksm_fd, s->mem_fd};
        for (int i = 0; i < 2; i++)
            if (more[i] >= 0)
                close(more[i]);
    }
    *error = space_attach(s, c, ctl_fd, pid);
    if (!*error)
        space_prune_unmapped(s);
    return s;
}

#define MOST_HANDSHAKES 256  // at once, each with a thread of its own

struct handshake {
    struct edm_engine *engine;
    int s;
};

// Of another user only what the run has started: whoever comes in is given a uffd. The launcher is the subreaper of all
// that it started, so that the way up leads to it.
static bool may_come(const struct edm_engine *g, const struct ucred *peer) {
    if (!peer->uid || peer->uid == geteuid())
        return true;
    int pid = g->admit_below ? peer->pid : 0;
    while (pid > 1 && pid != g->admit_below)
        pid = parent_of(pid);
    return pid > 1;
}

static bool send_room(int sock) {
    int fd = memfd_create("edm-ctl", MFD_CLOEXEC);
    bool sent = fd >= 0 && !ftruncate(fd, EDM_CTL_BYTES) && send_reply(sock, 0, fd);
    if (fd >= 0)
        close(fd);
    return sent;
}

static int32_t greeting(const struct edm_engine *g) {
    return (g->cfg.user_mode ? EDM_GREET_USER_MODE : 0) | (g->no_forks ? EDM_GREET_NO_FORKS : 0);
}

void edm_engine_admit_below(struct edm_engine *g, int32_t pid) { g->admit_below = pid; }

static void hand_over(struct edm_engine *g, int sock) {
    struct ucred cred;
    socklen_t length = sizeof cred;
    struct edm_hello hello;
    int fds[2] = {-1, -1}, none[2], error = 0;
    if (getsockopt(sock, SOL_SOCKET, SO_PEERCRED, &cred, &length) || !may_come(g, &cred) ||
        !send_reply(sock, greeting(g), g->dev_fd) || !receive_hello(sock, &hello, fds))
        goto out;
    if (hello.kind == EDM_HELLO_ROOM && (!send_room(sock) || !receive_hello(sock, &hello, fds)))
        goto out;
    if (hello.kind == EDM_HELLO_ASK) {
        asking_serve(g, sock, cred.pid, cred.uid);
        goto out;
    }
    if (hello.kind == EDM_HELLO_BEFORE_FORK) {
        if (space_make_whole(g, cred.pid) == 0)
            send_reply(sock, 0, -1);
        goto out;
    }
    if (hello.kind == EDM_HELLO_WANTED) {
        foreign_serve(g, sock, cred.pid);
        goto out;
    }
    struct edm_ctl *c = ctl_map(fds[0]);
    if (!c || (hello.kind == EDM_HELLO_NEW && fds[1] < 0))
        goto out;
    pthread_mutex_lock(&g->mu);
    if (point_fails(POINT_hello, NULL)) {
        pthread_mutex_unlock(&g->mu);
        munmap(c, EDM_CTL_BYTES);
        goto out;
    }
    struct space *s;
    if (hello.kind == EDM_HELLO_NEW) {
        s = admit_new(g, cred.pid, c, fds, &error);
    } else {
        s = admit_forked(g, cred.pid, c, fds[0], &error);
    }
    if (s || error != EDM_AGAIN_AS_NEW)
        fds[0] = -1;
    if (s && hello.kind == EDM_HELLO_NEW)
        fds[1] = -1;
    if (!s && error != EDM_AGAIN_AS_NEW)
        engine_error(g, "process %d cannot be captured: errno %d", cred.pid, -error);
    point(POINT_admitted);
    if (s && !error)
        space_sweep(s);
    if (s)
        s->refs++;
    if (!s && error == EDM_AGAIN_AS_NEW)
        munmap(c, EDM_CTL_BYTES);
    int uffd = s ? s->uffd : -1;
    pthread_mutex_unlock(&g->mu);
    bool alive = send_reply(sock, error, hello.kind == EDM_HELLO_FORK ? uffd : -1) && !error &&
                 receive_hello(sock, &hello, none);
    point(POINT_answered_hello);
    pthread_mutex_lock(&g->mu);
    // Without a control page it has been killed meanwhile, and who shares its memory goes on.
    int sidecar = s && alive && s->ctl ? __atomic_load_n(&s->ctl->sidecar_pid, __ATOMIC_ACQUIRE) : 0;
    pthread_mutex_unlock(&g->mu);
    sidecar = sidecar > 0 ? number_here(cred.pid, sidecar) : 0;
    pthread_mutex_lock(&g->mu);
    if (s && sidecar > 0 && !s->dead && s->ctl) {
        s->sidecar_pid = sidecar;
        __atomic_store_n(&s->ctl->sidecar_pid, sidecar, __ATOMIC_RELEASE);  // for one who takes over
        s->sidecar_fd = (int)syscall(SYS_pidfd_open, s->sidecar_pid, 0);
        s->ready = s->sidecar_fd >= 0;
        holder_note(g);
    }
    if (s)
        space_unref(s);
    pthread_mutex_unlock(&g->mu);
    point(POINT_captured);
    if (alive)
        send_reply(sock, 0, -1);
out:
    for (int i = 0; i < 2; i++)
        if (fds[i] >= 0)
            close(fds[i]);
}

static void *handshake_thread(void *arg) {
    struct handshake h = *(struct handshake *)arg;
    free(arg);
    hand_over(h.engine, h.s);
    close(h.s);
    pthread_mutex_lock(&h.engine->mu);
    h.engine->handshakes--;
    pthread_cond_signal(&h.engine->handshake_done);
    pthread_mutex_unlock(&h.engine->mu);
    return NULL;
}

// Where to listen: whoever comes beyond so many waits in the socket's queue, and costs nothing.
static int door(struct edm_engine *g) {
    pthread_mutex_lock(&g->mu);
    int fd = g->handshakes < MOST_HANDSHAKES ? g->listen_fd : -1;
    pthread_mutex_unlock(&g->mu);
    return fd;
}

static void accept_one(struct edm_engine *g) {
    int s = accept4(g->listen_fd, NULL, NULL, SOCK_CLOEXEC);
    if (s < 0)
        return;  // it hung up already, or we are out of descriptors: the program then runs uncaptured
    struct handshake *h = xcalloc(1, sizeof *h);
    *h = (struct handshake){g, s};
    pthread_t t;
    pthread_mutex_lock(&g->mu);
    g->handshakes++;
    pthread_mutex_unlock(&g->mu);
    if (pthread_create(&t, NULL, handshake_thread, h)) {
        handshake_thread(h);
        return;
    }
    pthread_detach(t);
}

// Whether anybody may still touch the space's memory. The process that came with it may have ended, and one that shares
// the memory goes on: made by clone(2) with CLONE_VM, or by vfork(2) until it has called exec. It is served as one that
// never came: nothing of it is evicted. Our own sidecar is such a process too, and goes first.
static bool used_on(struct space *s) {
    if (!pidfd_dead(s->pidfd))
        return s->ready || !s->ops->gone(s);
    s->ready = false;
    if (s->batch_busy || s->draining || s->applying)
        return true;
    if (s->sidecar_fd >= 0 && !pidfd_dead(s->sidecar_fd)) {
        sidecar_kill(s);
        return true;
    }
    if (s->ops->gone(s))
        return false;
    space_detach(s);
    s->state->forked = 0;
    s->forked = false;           // not any more one that may come
    s->pid = s->state->pid = 0;  // of whoever faults next
    return true;
}

// Sweep every space that is due; retire those whose process has gone. Returns whether any mapping is new.
static bool look_at_spaces(struct edm_engine *g) {
    bool changed = false;
    pthread_mutex_lock(&g->mu);
    for (uint32_t i = 0; i < g->nspaces; i++) {
        struct space *s = g->space[i];
        if (s->dead || s->ops != &uffd_ops)
            continue;
        if (s->pidfd < 0 && s->pid > 0)
            s->pidfd = (int)syscall(SYS_pidfd_open, s->pid, 0);
        if (!used_on(s)) {
            space_retire(s);
            i = (uint32_t)-1;  // the table has changed
            continue;
        }
        if (!s->ready && s->sidecar_fd >= 0 && !s->bare_ns && !pidfd_dead(s->pidfd)) {
            s->bare_ns = now_ns();
            g->count.sidecars_lost++;
        }
        whole_look(g, s);
        s->unwatched = s->unwatched && uffd_watch(s);
        order_settle(g, s);
        uint32_t given = hints_given(s);
        hints_look(g, s, given, false);
        s->refs++;  // a sweep may find it gone
        changed |= s->ready && space_sweep(s);
        hints_look(g, s, given, s->ready);
        space_unref(s);
    }
    pthread_mutex_unlock(&g->mu);
    return changed;
}

// Mappings change in bursts: look more often while they do.
static uint64_t look_again_us(struct edm_engine *g, bool busy) {
    pthread_mutex_lock(&g->mu);
    bool alone = !g->nspaces && !g->handshakes;
    pthread_mutex_unlock(&g->mu);
    if (alone)
        return ALONE_US;
    return busy && g->cfg.sweep_us > 1000 ? 1000 : g->cfg.sweep_us;
}

void *capture_thread(void *engine) {
    struct edm_engine *g = engine;
    prctl(PR_SET_NAME, "edm-capture", 0, 0, 0);
    // What a program touches before it is looked at is above the budget: be there in time, where that is allowed.
    setpriority(PRIO_PROCESS, 0, -10);
    uint64_t busy_until = 0;
    while (!atomic_load(&g->stop)) {
        uint64_t us = look_again_us(g, now_ns() < busy_until);
        struct timespec t = {.tv_sec = (time_t)(us / 1000000), .tv_nsec = (long)(us % 1000000) * 1000};
        struct pollfd p = {door(g), POLLIN, 0};
        if (ppoll(&p, 1, &t, NULL) == 1)
            accept_one(g);
        if (look_at_spaces(g))
            busy_until = now_ns() + 100000000u;
    }
    return NULL;
}

static int capture_start(struct edm_engine *g) {
    if (pthread_create(&g->capture, NULL, capture_thread, g))
        return -EAGAIN;
    g->capture_running = true;
    idle_start(g);
    return 0;
}

int edm_engine_listen(struct edm_engine *g, const char *path, uint32_t instance) {
    struct sockaddr_un a = {.sun_family = AF_UNIX};
    if (strlen(path) >= sizeof a.sun_path)
        return -ENAMETOOLONG;
    strcpy(a.sun_path, path);
    memcpy(g->sock, a.sun_path, sizeof g->sock);
    g->instance = g->state->instance = instance;
    g->user_mode = uffd_access(&g->no_forks) == EDM_ACCESS_USER_MODE;
    if (g->adopted) {
        pthread_mutex_lock(&g->mu);
        adopt_spaces(g);
        pthread_mutex_unlock(&g->mu);
        int r = lpet_start(g);
        return r ? r : capture_start(g);
    }
    g->dev_fd = open("/dev/userfaultfd", O_RDWR | O_CLOEXEC);
    g->listen_fd = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (g->listen_fd < 0 || bind(g->listen_fd, (struct sockaddr *)&a, sizeof a) || listen(g->listen_fd, 512))
        return -errno;
    // Programs of ours may become others; may_come looks at who comes.
    if (!geteuid() && g->admit_below && chmod(path, 0666))
        return -errno;
    g->state->dev[g->turn] = g->dev_fd;
    g->state->listen[g->turn] = g->listen_fd;
    return capture_start(g);
}
