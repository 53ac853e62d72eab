"""A program with more live memory than its budget, which checks all that it reads: `fault_program.py MIB PASSES`.

Run by `FaultSourceContract` as a process of its own; it imports nothing but the standard library. Prints `ok` and a
digest of what its memory held.
"""

from __future__ import annotations

import hashlib
import random
import struct
import sys

PAGE: int = 4096
BLOCK: int = 64


def main(mebibytes: int, passes: int) -> None:
    """Fill the memory, then read and rewrite it at random `passes` times over."""
    blocks = [bytearray(BLOCK * PAGE) for _ in range(mebibytes * (1 << 20) // (BLOCK * PAGE))]
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
