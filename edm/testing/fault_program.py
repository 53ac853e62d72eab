"""A program with more live memory than its budget, which checks all that it reads: `fault_program.py MIB PASSES`.

Run by `FaultSourceContract` as a process of its own; it imports nothing but the standard library. Prints `ok` and a
digest of what its memory held.
"""

from __future__ import annotations

import hashlib
import os
import random
import struct
import sys
import time
from pathlib import Path

PAGE: int = 4096
BLOCK: int = 64


def captured_bytes() -> int:
    """Of this process's memory, what is registered with a userfaultfd. Source: proc_pid_smaps(5), VmFlags um."""
    total = size = 0
    with Path("/proc/self/smaps").open(encoding="utf-8", errors="replace") as file:
        for line in file:
            if line.startswith("Size:"):
                size = int(line.split()[1]) << 10
            elif line.startswith("VmFlags:") and "um" in line.split():
                total += size
    return total


def main(mebibytes: int, passes: int) -> None:
    """Fill the memory, then read and rewrite it at random `passes` times over."""
    blocks = [bytearray(BLOCK * PAGE) for _ in range(mebibytes * (1 << 20) // (BLOCK * PAGE))]
    # What is touched before it is captured is above the budget, and a machine may stand still just then.
    while "libedm_app" in os.environ.get("LD_PRELOAD", "") and captured_bytes() < mebibytes << 20:
        time.sleep(0.001)
    pages = len(blocks) * BLOCK
    written = [0] * pages
    numbers = random.Random(1)  # noqa: S311
    for step in range(pages * (passes + 1)):
        page = step if step < pages else numbers.randrange(pages)
        block, offset = blocks[page // BLOCK], page % BLOCK * PAGE
        found = struct.unpack_from("<QQ", block, offset + step % 255 * 16)
        if (written[page] and struct.unpack_from("<Q", block, offset + 8)[0] != written[page]) or found[0] != 0:
            sys.exit(f"page {page} holds {block[offset : offset + 16].hex()}, not {written[page]:#x}")
        if step < pages or step % 3 == 0:
            struct.pack_into("<Q", block, offset + 8, step + 1)
            written[page] = step + 1
    digest = hashlib.sha256()
    for block in blocks:
        digest.update(block)
    print("ok", digest.hexdigest())


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
