"""Memory written, then given back in the ways there are: a step for each line read, each answered. Argument: MIB."""

import mmap
import os
import sys

size = int(sys.argv[1]) << 20
PRIVATE = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
memory = {}


def fill(name):
    memory[name] = mmap.mmap(-1, size, PRIVATE)
    block = os.urandom(4096)
    for at in range(0, size, 4096):
        memory[name][at : at + 4096] = block
        memory[name][at : at + 8] = at.to_bytes(8, "little")


def check(name):
    for at in range(0, size, 4096):
        assert memory[name][at : at + 8] == at.to_bytes(8, "little"), at


STEPS = {
    "fill": fill,
    "check": check,
    "munmap": lambda name: memory.pop(name).close(),
    "dontneed": lambda name: memory[name].madvise(mmap.MADV_DONTNEED),
    "mremap": lambda name: memory[name].resize(mmap.PAGESIZE),
}
for line in sys.stdin:
    step, name = line.split()
    STEPS[step](name)
    print(step, name, flush=True)
