"""The rows of `edm bench`: what is run, what its figure is divided by, and what is aimed at."""

from __future__ import annotations

from typing import Final, Literal

import attrs

Figure = Literal["per_page", "added", "against", "speedup", "whole"]
FACTORS: Final = {"against", "speedup", "whole"}
"""Figures that are factors themselves, whatever the bare fault takes."""
INPROC_MEMORY: Final = ("--transport", "inproc", "--store", "memory")
INPROC_FILE: Final = ("--transport", "inproc", "--store", "file")
MPI_FILE: Final = ("--transport", "mpi", "--store", "file")
MPI_TARGET: Final = 1.5
"""The second aim of a row over MPI: so many times the sum of the bare fault, a bare round trip and a bare pread."""
SPREAD_TARGET: Final = 1.3
"""The aim of every row: all CPUs without pinning, against one CPU."""


@attrs.frozen(kw_only=True)
class Case:
    """One row.

    mode: what edm-measure is told. arguments: for `edm run`. target: the most its ratio may be (speedup: the least).
    figure: what is compared: nanoseconds a page or fault; what `ns` has more than `within`; `ns` over `narrow`; the
    threads' speed-up; or the whole time against a plain run. sums: also held against the sum of the floors. rescues:
    the figure stands only if most measured faults were rescues. floor: whether the faults that are timed are those of
    reads or of writes.
    """

    name: str
    title: str
    mode: str
    arguments: tuple[str, ...]
    target: float
    figure: Figure = "per_page"
    sums: bool = False
    rescues: bool = False
    floor: Literal["fault", "write"] = "fault"


CASES: Final = (
    Case(
        name="new", title="new page, budget not reached", mode="new", arguments=INPROC_MEMORY, target=1.3, floor="write"
    ),
    Case(
        name="wide",
        title="new page in 1 TiB of address space, against in 1 GiB",
        mode="wide",
        arguments=INPROC_MEMORY,
        target=1.2,
        figure="against",
    ),
    Case(
        name="read-random",
        title="random read miss, inproc + memory",
        mode="read-random",
        arguments=INPROC_MEMORY,
        target=1.8,
    ),
    Case(
        name="write-random",
        title="random write miss, inproc + memory",
        mode="write-random",
        arguments=INPROC_MEMORY,
        target=2.5,
        floor="write",
    ),
    Case(
        name="read-random-file",
        title="random read miss, inproc + page files",
        mode="read-random",
        arguments=INPROC_FILE,
        target=2.2,
    ),
    Case(
        name="read-random-mpi",
        title="random read miss, MPI + page files",
        mode="read-random",
        arguments=MPI_FILE,
        target=4.0,
        sums=True,
    ),
    Case(
        name="read-sequential",
        title="sequential read, inproc + memory, per page",
        mode="read-sequential",
        arguments=INPROC_MEMORY,
        target=0.5,
    ),
    Case(
        name="read-sequential-mpi",
        title="sequential read, MPI + page files, per page",
        mode="read-sequential",
        arguments=MPI_FILE,
        target=1.0,
    ),
    Case(
        name="write-sequential",
        title="sequential write, inproc + memory, per page",
        mode="write-sequential",
        arguments=INPROC_MEMORY,
        target=1.0,
        floor="write",
    ),
    Case(
        name="threads",
        title="4 threads, random misses: throughput against one",
        mode="threads",
        arguments=INPROC_MEMORY,
        target=1.5,
        figure="speedup",
    ),
    Case(
        name="rescue",
        title="rescue from staging",
        mode="rescue",
        arguments=INPROC_MEMORY,
        target=1.5,
        rescues=True,
    ),
    Case(
        name="evict",
        title="evicted page, runs of 64, busy app",
        mode="evict",
        arguments=INPROC_MEMORY,
        target=0.6,
        figure="added",
    ),
    Case(
        name="sort",
        title="std::sort, against the same all in RAM",
        mode="sort",
        arguments=INPROC_MEMORY,
        target=3.5,
        figure="whole",
    ),
)
