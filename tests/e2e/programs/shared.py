"""Shared memory of three kinds, MIB of each, written and then added up. Argument: MIB."""

import ctypes
import mmap
import os
import sys
import time

size = int(sys.argv[1]) << 20
libc = ctypes.CDLL(None)
libc.shmat.restype = ctypes.c_void_p
libc.shmat.argtypes = (ctypes.c_int, ctypes.c_void_p, ctypes.c_int)
segment = libc.shmget(0, ctypes.c_size_t(size), 0o600)
place = libc.shmat(segment, None, 0)
libc.shmctl(segment, 0, None)  # IPC_RMID: gone with the last who has it
file = os.memfd_create("test")
os.ftruncate(file, size)
memories = [mmap.mmap(-1, size), mmap.mmap(file, size), (ctypes.c_char * size).from_address(place)]
for memory in memories:
    for at in range(0, size, 4096):
        memory[at] = 1 if isinstance(memory, mmap.mmap) else b"\1"
time.sleep(0.7)
print(sum(bytes(memory[:]).count(1) for memory in memories))
