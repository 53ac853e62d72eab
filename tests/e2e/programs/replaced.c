// A program that has a clone(2) of its own, as the thread sanitizer gives it one: not what EDM may call.
#include <stdio.h>
#include <stdlib.h>

int clone(int (*run)(void *), void *stack, int flags, void *argument, ...) {
    (void)run, (void)stack, (void)flags, (void)argument;
    puts("somebody called clone");
    exit(1);
}

int main(void) {
    puts("as it should be");
    return 0;
}
