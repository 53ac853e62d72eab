"""A bare mpi4py round trip, 16 bytes there and a page back: `mpiexec -n 2 python -m edm.bench.pingpong COUNT`.

Rank 0 prints a JSON list of nanoseconds a round trip, one for each 100 of them. Nothing of EDM is in it.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Final

CHUNK: Final = 100


def main() -> None:
    """Measure, as rank 0 or as its partner."""
    from mpi4py import MPI  # noqa: PLC0415 (importing it joins the job)

    world, count = MPI.COMM_WORLD, int(sys.argv[1]) // CHUNK
    if world.size != 2:
        raise SystemExit(f"needs 2 ranks, has {world.size}: this mpiexec is of another MPI than mpi4py")
    request, page = bytearray(16), bytearray(4096)
    samples = []
    for _ in range(count + 1):
        began = time.perf_counter_ns()
        for _ in range(CHUNK):
            if world.rank == 0:
                world.Send(request, 1)
                world.Recv(page, 1)
            else:
                world.Recv(request, 0)
                world.Send(page, 0)
        samples.append((time.perf_counter_ns() - began) / CHUNK)
    if world.rank == 0:
        sys.stdout.write(json.dumps(samples[1:]) + "\n")


if __name__ == "__main__":
    main()
