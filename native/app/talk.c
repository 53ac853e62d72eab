#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include "talk.h"

#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/un.h>

#include "calls.h"

static char sock_path[sizeof(((struct sockaddr_un *)0)->sun_path)];

bool talk_to(const char *path) {
    if (strlen(path) >= sizeof sock_path)
        return false;
    strcpy(sock_path, path);
    return true;
}

long send_message(int s, const void *data, size_t n, const int *fds, int nfds) {
    union {
        struct cmsghdr align;
        char room[CMSG_SPACE(2 * sizeof(int))];
    } u;
    memset(&u, 0, sizeof u);
    struct iovec v = {(void *)(uintptr_t)data, n};
    struct msghdr m = {.msg_iov = &v, .msg_iovlen = 1};
    if (nfds) {
        m.msg_control = u.room;
        m.msg_controllen = CMSG_SPACE((size_t)nfds * sizeof(int));
        struct cmsghdr *h = CMSG_FIRSTHDR(&m);
        h->cmsg_level = SOL_SOCKET;
        h->cmsg_type = SCM_RIGHTS;
        h->cmsg_len = CMSG_LEN((size_t)nfds * sizeof(int));
        memcpy(CMSG_DATA(h), fds, (size_t)nfds * sizeof(int));
    }
    return CALL(SYS_sendmsg, s, &m, MSG_NOSIGNAL);
}

bool receive_reply(int s, struct edm_reply *r, int *fd) {
    union {
        struct cmsghdr align;
        char room[CMSG_SPACE(sizeof(int))];
    } u;
    struct iovec v = {r, sizeof *r};
    struct msghdr m = {.msg_iov = &v, .msg_iovlen = 1, .msg_control = u.room, .msg_controllen = sizeof u.room};
    long n;
    do
        n = CALL(SYS_recvmsg, s, &m, MSG_CMSG_CLOEXEC);
    while (n == -EINTR);
    *fd = -1;
    if (n != sizeof *r || r->magic != EDM_CTL_MAGIC)
        return false;
    struct cmsghdr *h = CMSG_FIRSTHDR(&m);
    if (h && h->cmsg_type == SCM_RIGHTS)
        memcpy(fd, CMSG_DATA(h), sizeof *fd);
    return true;
}

void close_fd(int fd) {
    if (fd >= 0)
        CALL(SYS_close, fd, 0, 0);
}

int high_fd(int fd) {
    long high = fd >= 0 ? CALL(SYS_fcntl, fd, F_DUPFD_CLOEXEC, 700) : -1;
    if (high < 0)
        return fd;
    close_fd(fd);
    return (int)high;
}

int connect_handler(void) {
    int s = high_fd((int)CALL(SYS_socket, AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0));
    struct sockaddr_un a = {.sun_family = AF_UNIX};
    memcpy(a.sun_path, sock_path, sizeof sock_path);
    if (s >= 0 && CALL(SYS_connect, s, &a, sizeof a) < 0) {
        close_fd(s);
        s = -1;
    }
    return s;
}

int greet_handler(enum edm_hello_kind kind) {
    int s = connect_handler(), fd = -1;
    struct edm_hello hello = {.magic = EDM_CTL_MAGIC, .kind = kind};
    struct edm_reply r;
    bool done = s >= 0 && receive_reply(s, &r, &fd) && send_message(s, &hello, sizeof hello, NULL, 0) > 0;
    close_fd(fd);
    if (done)
        return s;
    close_fd(s);
    return -1;
}

int ask_handler(enum edm_hello_kind kind, const void *more, size_t n, int32_t *status) {
    int s = greet_handler(kind), fd = -1;
    struct edm_reply r = {0, 0};
    bool done = s >= 0 && (!n || send_message(s, more, n, NULL, 0) > 0) && receive_reply(s, &r, &fd);
    close_fd(fd);
    *status = r.status;
    if (done)
        return s;
    close_fd(s);
    return -1;
}
