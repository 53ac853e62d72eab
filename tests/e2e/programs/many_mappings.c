// Memory that grows in small steps: many small mappings side by side, each touched at once. Plain, the kernel merges them
// into few. Prints how many mappings the process has then. Argument: how many to make.
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

int main(int argc, char **argv) {
    int n = argc > 1 ? atoi(argv[1]) : 20000;
    for (int i = 0; i < n; i++) {
        char *p = mmap(0, 8192, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (p == MAP_FAILED)
            return 1;
        p[0] = 1;
        if (i % 50 == 0)
            usleep(1000);
    }
    FILE *f = fopen("/proc/self/maps", "r");
    int lines = 0, c;
    if (!f)
        return 1;
    while ((c = getc(f)) != EOF)
        lines += c == '\n';
    printf("%d\n", lines);
    return 0;
}
