// Programs in the hands of a tool that looks at all they do: sanitizers, valgrind.
#include "tools.h"

// The address sanitizer as a library (gcc's) ends a program in which it is not the first one, since what comes before
// it might take its place. libedm_app.so replaces nothing that it does. Source: sanitizer flags,
// verify_asan_link_order.
__attribute__((visibility("default"))) const char *__asan_default_options(void);
const char *__asan_default_options(void) { return "verify_asan_link_order=0"; }

#define RUNNING_ON_VALGRIND 0x1001

// Instructions that do nothing on a processor, and that valgrind takes for a question. Source: valgrind.h.
bool emulated(void) {
    volatile unsigned long question[6] = {RUNNING_ON_VALGRIND};
    unsigned long answer = 0;
#if defined(__x86_64__)
    __asm__ volatile("rolq $3, %%rdi; rolq $13, %%rdi; rolq $61, %%rdi; rolq $51, %%rdi; xchgq %%rbx, %%rbx"
                     : "+d"(answer)
                     : "a"(question)
                     : "cc", "memory");
#elif defined(__aarch64__)
    register unsigned long x3 __asm__("x3") = answer;
    register volatile unsigned long *x4 __asm__("x4") = question;
    __asm__ volatile("ror x12, x12, #3; ror x12, x12, #13; ror x12, x12, #51; ror x12, x12, #61; orr x10, x10, x10"
                     : "+r"(x3)
                     : "r"(x4)
                     : "cc", "memory");
    answer = x3;
#endif
    return answer != 0;
}
