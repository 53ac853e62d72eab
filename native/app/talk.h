// How the program talks to its DM-Handler: over a socket that it connects to each time, with raw system calls.
#pragma once
#include <stdbool.h>
#include <stddef.h>

#include "../sidecar.h"

// Where it listens, from now on; false: the path is too long.
bool talk_to(const char *path);
int connect_handler(void);  // or -1
long send_message(int s, const void *data, size_t n, const int *fds, int nfds);
// One reply, with at most one descriptor; false when the handler hung up.
bool receive_reply(int s, struct edm_reply *r, int *fd);
// Behind the hello; or -1.
int greet_handler(enum edm_hello_kind kind);
// The hello, with what belongs to it (or NULL), and the answer, of which the status is kept. The connection, for what
// more there is to say; -1: there was no answer.
int ask_handler(enum edm_hello_kind kind, const void *more, size_t n, int32_t *status);
void close_fd(int fd);
// High numbers, out of the way of programs that count on the next free descriptor while this is under way.
int high_fd(int fd);
