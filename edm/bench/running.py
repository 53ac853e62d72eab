"""Runs the measuring program, plainly and under `edm run`, on one CPU and on all, and reads its figures."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

import attrs
import numpy as np

import edm
from edm.errors import EdmError, UsageError
from edm.plugins.transport_mpi.launch import find_mpiexec, strip_mpi_environment
from edm.types import PAGE_BYTES

if TYPE_CHECKING:
    from collections.abc import Sequence

    from edm.bench.cases import Case

PROGRAM: Final = Path(edm.__file__).parent / "edm-measure"
TIMEOUT_S: Final = 240.0
PINGPONGS: Final = 20_000
FLOOR_FAULTS: Final = 131_072
HAND_OVERS: Final = 65_536
Placement = Literal["one", "all"]


class MeasureFailed(EdmError):
    """A measured program did not come to its end."""


@attrs.frozen(kw_only=True)
class Sizes:
    """What the measured program works on, in pages. extra: further arguments for `edm run`."""

    region_pages: int
    budget_pages: int
    accesses: int
    threads: int = 4
    extra: tuple[str, ...] = ()

    def arguments(self) -> list[str]:
        """For edm-measure."""
        return [
            f"region={self.region_pages}",
            f"budget={self.budget_pages}",
            f"accesses={self.accesses}",
            f"threads={self.threads}",
        ]


@attrs.frozen(kw_only=True)
class Spread:
    """Nanoseconds: the median of a run's chunks, and the quartiles around it."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, samples: Sequence[float]) -> Spread:
        """Of at least one sample."""
        low, median, high = np.percentile(np.asarray(samples, float), (25, 50, 75))
        return cls(median=float(median), low=float(low), high=float(high))


@attrs.frozen(kw_only=True)
class Result:
    """One run of a case: its figure (ns; a factor for threads), and what EDM counted meanwhile.

    apart: how far the CPUs were from each other just before and just after, in ns; empty where one only was used.
    """

    spread: Spread
    mean: float
    counters: dict[str, int]
    apart: tuple[float, ...] = ()


def call(command: Sequence[str], placement: Placement, timeout_s: float = TIMEOUT_S) -> str:
    """Run a command on the first CPU we may use, or on all; returns its standard output, raises `MeasureFailed`."""
    cpus = sorted(os.sched_getaffinity(0))
    allowed = cpus[:1] if placement == "one" else cpus
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=strip_mpi_environment(dict(os.environ)),
        start_new_session=True,
        preexec_fn=lambda: os.sched_setaffinity(0, allowed),  # noqa: PLW1509 (one system call)
    )
    try:
        out, err = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        raise MeasureFailed(f"{Path(command[0]).name}: not done after {timeout_s:g} s") from None
    except BaseException:
        os.killpg(process.pid, signal.SIGTERM)
        raise
    if process.returncode:
        last = err.strip().splitlines()[-1:] or ["no reason given"]
        raise MeasureFailed(f"exit status {process.returncode}: {last[0]}")
    return out


def measure_floors(sizes: Sizes, *, mpi: bool, directory: Path) -> dict[str, Spread]:
    """Bare faults of a read and a write, a page of a cached file, a bare round trip (`mpi`); each in its best place."""
    if not PROGRAM.exists():
        raise UsageError(f"{PROGRAM} is missing: install EDM again, with a C compiler at hand")
    file = directory / "floor"
    pages = (f"region={sizes.budget_pages}", f"accesses={max(FLOOR_FAULTS, sizes.budget_pages)}")
    floors = {
        "fault": json.loads(call([str(PROGRAM), "floor-fault", *pages], "all"))["ns"],
        "write": json.loads(call([str(PROGRAM), "floor-fault-write", *pages], "all"))["ns"],
        "pread": json.loads(
            call([str(PROGRAM), "floor-pread", f"region={sizes.budget_pages}", "accesses=65536", f"file={file}"], "all")
        )["ns"],
    }
    if mpi:
        command = [find_mpiexec(), "-n", "2", sys.executable, "-m", "edm.bench.pingpong", str(PINGPONGS)]
        floors["mpi"] = json.loads(call(command, "all"))
    return {name: Spread.of(samples) for name, samples in floors.items()}


def measure_apart(placement: Placement) -> tuple[float, ...]:
    """Nanoseconds for a cache line from the first CPU to the second and back; nothing where one only is used.

    What is handed between CPUs takes longer the farther they are apart, and a hypervisor moves them while we measure.
    """
    if placement == "one" or len(os.sched_getaffinity(0)) < 2:
        return ()
    samples = json.loads(call([str(PROGRAM), "floor-apart", f"accesses={HAND_OVERS}"], placement))["ns"]
    return (Spread.of(samples).median,)


def measure(case: Case, sizes: Sizes, placement: Placement) -> Result:
    """Run one case; raises `MeasureFailed`."""
    before = measure_apart(placement)
    result = _measure(case, sizes, placement)
    return attrs.evolve(result, apart=before + measure_apart(placement))


def _measure(case: Case, sizes: Sizes, placement: Placement) -> Result:
    with tempfile.TemporaryDirectory(prefix="edm-bench-") as directory:
        report = Path(directory) / "report.json"
        memory = str(sizes.budget_pages * PAGE_BYTES)
        command = [
            *(sys.executable, "-m", "edm", "run", "--local-memory", memory, "--no-summary", "--report", str(report)),
            *(*case.arguments, *sizes.extra, "--", str(PROGRAM), case.mode, *sizes.arguments()),
        ]
        document: dict[str, Any] = json.loads(call(command, placement))
        counters: dict[str, int] = json.loads(report.read_text())["counters"]
    if not counters.get("processes"):
        raise MeasureFailed("the program was not captured")
    return figure(case, sizes, placement, document, counters)


def figure(
    case: Case, sizes: Sizes, placement: Placement, document: dict[str, Any], counters: dict[str, int]
) -> Result:
    """What a row is about, from what the program printed."""
    samples: list[float] = document["ns"]
    if not samples:
        raise MeasureFailed("nothing was measured: no access had to wait")
    if case.figure == "whole":
        plain = json.loads(call([str(PROGRAM), case.mode, *sizes.arguments()], placement))["ns"]
        factor = samples[0] / plain[0]
        return Result(spread=Spread(median=factor, low=factor, high=factor), mean=factor, counters=counters)
    if case.figure == "speedup":
        rate = (document["one_total"] / document["one_faults"]) / samples[0]
        return Result(spread=Spread(median=rate, low=rate, high=rate), mean=rate, counters=counters)
    if case.figure == "against":
        times = [document[f"{name}_total"] / document[f"{name}_faults"] for name in ("narrow", "ns")]
        factor = times[1] / times[0]
        return Result(spread=Spread(median=factor, low=factor, high=factor), mean=factor, counters=counters)
    if case.rescues and 2 * counters["rescues"] < document["ns_accesses"]:
        share = counters["rescues"] / document["ns_accesses"]
        raise MeasureFailed(f"only {share:.0%} of the measured faults were rescues: the store was faster")
    spread = Spread.of(samples)
    if case.figure == "added":
        before = Spread.of(document["within"]).median
        mean = document["ns_total"] / document["ns_accesses"] - document["within_total"] / document["within_accesses"]
        if mean <= 0:
            raise MeasureFailed("a new page beyond the budget took no longer than one within it: too noisy here")
        spread = Spread(median=spread.median - before, low=spread.low - before, high=spread.high - before)
        return Result(spread=spread, mean=mean, counters=counters)
    per_fault = case.mode in {"new", "read-random", "write-random"}
    mean = document["ns_total"] / (document["ns_faults"] if per_fault else document["ns_accesses"])
    return Result(spread=spread, mean=mean, counters=counters)
