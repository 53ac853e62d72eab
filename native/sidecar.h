// What libedm_app.so and the engine share: the control page, and the words of the hand-over.
//
// The control area is a memfd mapped into the app (for the sidecar) and into the DM-Handler. The app could scribble on
// it, so the engine takes nothing from it on trust: which pages moved is read from the kernel's pagemap.
#pragma once
#include <stdint.h>

#define EDM_CTL_MAGIC 0x314c5443u /* CTL1 */
#define EDM_CTL_BYTES (128 * 1024)
#define EDM_WINDOWS 16                       /* of 64 pages each */
#define EDM_STAGING_PAGES (EDM_WINDOWS * 64) /* addresses, most of them empty; they count against an RLIMIT_AS */
#define EDM_BATCH_PAGES 256                  /* at most so many pages move in one batch */
#define EDM_HINTS 64                         /* of madvise, not yet looked at */
#define EDM_SOCK_ENV "EDM_INTERNAL_SOCK"
#define EDM_SOCK_BYTES 108
#define EDM_KEEP 32
#define EDM_STACKS 256 /* of threads made lately */
#define EDM_GIVEN 256  /* buffers given to pipes last */

#define EDM_STACK_NOTE(page, number) ((page) | (((number) / EDM_STACKS + 1) & 0xfff))

enum edm_op { EDM_OP_NONE = 0, EDM_OP_MOVE = 1, EDM_OP_EXIT = 2 };
enum edm_lock { EDM_UNLOCKED = 0, EDM_LOCK_SIDECAR = 1, EDM_LOCK_ENGINE = 2 };

#define SIDECAR_NAME "edm: sidecar"

struct edm_ctl {
    uint32_t magic, size;
    uint32_t req, done;  // futex words: the engine counts req up, the sidecar answers with done = req
    uint32_t op, n;
    // Held by the sidecar for one UFFDIO_MOVE, by the engine while it reads the uffd. An address-space event is
    // therefore never read, nor its system call let go, between the check of `generation` and the move.
    uint32_t lock;
    uint32_t generation;        // counts address-space events read
    uint32_t batch_generation;  // `generation` when the batch was chosen
    uint32_t drop;              // how many staging windows to empty first
    int32_t app_pid, sidecar_pid, uffd;
    int32_t handler_pid, holder_pid;    // with both gone nobody will serve a fault again: the sidecar ends the program
    int32_t seen_handler, seen_holder;  // … if the sidecar has seen them alive: it is the only one to write these
    uint32_t forking;                   // the program's threads that need all its pages here: nothing moves meanwhile
    uint32_t hint_next;                 // notes of the program so far; the next goes to hint[hint_next % EDM_HINTS]
    uint32_t merges;                    // KSM may merge pages of the program: see space_merges
    uint32_t own_uffd;                  // the program has opened a userfaultfd: see space_own_uffd
    uint32_t whole_asked, whole_done;   // by a program that may not come and ask: see whole.c
    uint32_t executable;                // the program has, or had, memory that may be written to and executed
    uint32_t staging_executable;        // so is staging at this moment; the sidecar writes it
    uint64_t staging, anchor, self;
    uint64_t tie;  // where the uffd's tie to the address space is mapped; 0: none, or not yet
    struct {
        uint64_t src;   // address of the window's first page
        uint64_t mask;  // pages asked for
        uint64_t pass;  // pages that are not there: one move may reach across them
        uint64_t keep;  // of those: must not be written to (write-protected)
        uint64_t busy;  // out: refused with EBUSY or EINVAL
        int64_t error;  // out: 0, or the errno that ended the window early
    } window[EDM_WINDOWS];
    struct edm_hint {
        uint64_t address, bytes;
        int32_t advice;
        uint32_t number;  // of the note, from 1 on; 0 while it is written
    } hint[EDM_HINTS];
    char sock[EDM_SOCK_BYTES];  // where its DM-Handler listens
    // Addresses in pages that stay: where debuggers look first, who cannot wait for a page. 0: none.
    uint64_t keep[EDM_KEEP];
    // Pages at the top of stacks, told by the program; the next goes to stack[stack_next % EDM_STACKS], with its round
    // in the bits that a page's address leaves: of one that is being written it is the round before.
    uint32_t stack_next;
    uint32_t stacks_told;        // counts those that had to be told before their thread was made
    uint32_t batch_stacks_told;  // … before the batch was chosen
    uint64_t stack[EDM_STACKS];
    // Buffers that the program has given to pipes (vmsplice); the next goes to given[given_next % EDM_GIVEN].
    uint32_t given_next;
    uint32_t given_kept;  // so many of the last of them stay, when the engine looked last
    struct edm_hint given[EDM_GIVEN];
};

enum edm_hello_kind {
    EDM_HELLO_NEW = 1,
    EDM_HELLO_FORK = 2,
    EDM_HELLO_ASK = 3,
    EDM_HELLO_BEFORE_FORK = 4,
    EDM_HELLO_ROOM = 5,
    EDM_HELLO_WANTED = 6
};

// App → DM-Handler, with the control memfd (and, if NEW, the uffd) attached. Before that, a program that may not make
// files so large (RLIMIT_FSIZE) asks for the memfd: ROOM, answered with it.
struct edm_hello {
    uint32_t magic, kind;
};
// Behind a hello of kind WANTED: memory for a userfaultfd of the program's own. From the answer until another message,
// or the end of the connection, EDM leaves it alone: see foreign.c.
struct edm_wanted {
    uint64_t at, bytes;
    uint64_t missing;  // it is to have faults of missing pages
};
// DM-Handler → app. First greeting: /dev/userfaultfd attached where the handler could open it, status edm_greeting.
struct edm_reply {
    uint32_t magic;
    int32_t status;  // 0, or a negative errno; EDM_AGAIN_AS_NEW: this child must come as a new process
};
#define EDM_AGAIN_AS_NEW 1
// USER_MODE: a uffd without the kernel's own faults will do. NO_FORKS: the DM-Handler hears of no fork, so a child's
// pages must all be in the parent before it.
enum edm_greeting { EDM_GREET_USER_MODE = 1, EDM_GREET_NO_FORKS = 2 };

// Of somebody who reads the memory of `pid` from outside (asking.c): its number for who asks; 0: of who asks; the
// negative of its number here. After a hello of kind ASK, any number of these, each with its answer.
#define EDM_ASK_PAGES 4096u
enum edm_ask_op {
    EDM_ASK_HELD = 1,            // which pages hold anything, here or at the memory server
    EDM_ASK_BRING = 2,           // which of them are not in the program; they are brought there, as after a fault
    EDM_ASK_BRING_WRITABLE = 3,  // … or are there and write-protected: as after a write
};
struct edm_ask {
    uint32_t magic, op;
    int32_t pid;
    uint32_t count;  // pages from `first` on, EDM_ASK_PAGES at most
    uint64_t first;
};
struct edm_answer {
    uint32_t magic;
    int32_t status;                      // 0; -ESRCH: no captured process has that pid; -EINVAL
    uint64_t next;                       // no page of [first + count, next) holds anything
    uint64_t pages[EDM_ASK_PAGES / 64];  // bit n: page first + n
};
