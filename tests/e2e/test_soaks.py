"""For half an hour each: random deaths with a budget a few pages above the smallest, and churn with one of two pages.

`make soak` goes round for EDM_SOAK_S seconds (1800), over the transports and stores in turn, from a way on that
EDM_SOAK_SEED chooses: seeds that follow each other are the pieces of a longer soak. The quick form of the churn is one
round. The program stamps each page with its writer, its number and its version, and looks at every page
before it writes there: a wrong or lost one ends it.
"""

import itertools
import json
import os
import random
import signal
import subprocess
import time
from collections import Counter

import pytest

from edm.launch.checks import MIN_LOCAL_PAGES

pytestmark = [pytest.mark.uffd, pytest.mark.timeout(120)]

SOAK_S = float(os.environ.get("EDM_SOAK_S", "1800"))
SEED = int(os.environ.get("EDM_SOAK_SEED", time.time_ns() % 1_000_000))
FEW_MORE = ("--local-memory", f"{4 * (MIN_LOCAL_PAGES + 3)}K", "--write-back", "64K")
TWO_PAGES = ("--local-memory", f"{4 * MIN_LOCAL_PAGES}K", "--high", "2p", "--low", "1p", "--write-back", "8K")
"""The smallest budget, and all but a page or two of it is emptied whenever it is touched."""
WAYS = [("inproc", "file"), ("zmq", "lmdb"), ("mpi", "file"), ("zmq", "file"), ("inproc", "lmdb"), ("mpi", "lmdb")]
VICTIMS = {"edm: dm-handler": 6, "edm: dms": 6, "edm: sidecar": 3, "edm: holder": 1}
"""How often each is chosen."""
APART_S = 1.5
"""A DM-Handler looks for its holder several times a second; both dead at once are the program's end, as they must."""
MOST_RESTARTS = 1000
OPS, FEW_OPS = 10_000, 500
HANG_S = 600
"""What a run of a soak may take on a machine that does much else."""


@pytest.fixture(scope="module")
def plain(program):
    """What the stamped program prints without EDM, by its number of operations."""
    outputs = {}

    def run(ops):
        if ops not in outputs:
            command = [program("stamped"), str(ops)]
            outputs[ops] = subprocess.run(command, capture_output=True, check=True, timeout=60).stdout
        return outputs[ops]

    return run


class Killer:
    """Kills processes of a run at random moments, and counts them by title."""

    def __init__(self, seed):
        self._chance = random.Random(seed)
        self.killed = Counter()

    def at_work(self, process, edm, seconds):
        """Once the program is captured, until the run has ended; one that has lasted so long goes on undisturbed."""
        while process.poll() is None and not edm.pids(("edm: sidecar",)):
            time.sleep(0.01)
        end = time.monotonic() + seconds
        while process.poll() is None and time.monotonic() < end:
            time.sleep(self._chance.uniform(0.02, 0.8))
            (victim,) = self._chance.choices(list(VICTIMS), VICTIMS.values())
            if victim == "edm: holder" and not all_at_rest(process, edm, end):
                continue
            self._kill(edm.pids((victim,)), victim)
            if victim == "edm: holder":
                time.sleep(APART_S)

    def _kill(self, pids, title):
        if not pids:
            return
        try:
            os.kill(self._chance.choice(pids), signal.SIGKILL)
        except ProcessLookupError:
            return
        self.killed[title] += 1


def all_at_rest(process, edm, until):
    """Wait until the same DM-Handler and memory server have been there for a while: they have another holder soon."""
    titles, since, last = ("edm: dm-handler", "edm: dms"), time.monotonic(), None
    while process.poll() is None and time.monotonic() < until:
        pids = edm.pids(titles[:1]) and edm.pids(titles)
        if pids != last or not pids:
            last, since = pids, time.monotonic()
        if time.monotonic() - since > APART_S:
            return True
        time.sleep(0.05)
    return False


def one_run(edm, program, ops, way, options, killer=None):
    """Run the stamped program; its status, output, error output and the counters of its last DM-Handler."""
    report = edm.directory / "report.json"
    (transport, store) = way
    arguments = ("--transport", transport, "--store", store, "--restarts", MOST_RESTARTS, "--report", report, *options)
    process = edm.start("run", *arguments, "--", program("stamped"), ops)
    if killer is not None:
        killer.at_work(process, edm, 60)
    out, err = process.communicate(timeout=HANG_S if ops > FEW_OPS else 100)
    counters = json.loads(report.read_text())["counters"] if report.exists() else {}
    return process.returncode, out, err.decode(errors="replace"), counters


def rounds(make_edm, tmp_path_factory, seconds):
    """A fresh runner and a way for each round, until the time is over: one at least."""
    end, first = time.monotonic() + seconds, SEED % len(WAYS) if seconds else 0
    for number, way in enumerate(itertools.cycle(WAYS[first:] + WAYS[:first])):
        edm = make_edm(tmp_path_factory.mktemp("round"))
        try:
            yield edm, number, way
            assert edm.left_behind() == ({}, [])
        finally:
            edm.close()
        if time.monotonic() > end:
            return


@pytest.mark.soak
@pytest.mark.timeout(SOAK_S + HANG_S)
def test_random_deaths_with_a_few_pages_above_the_least_budget(tmp_path_factory, make_edm, program, plain):
    print(f"EDM_SOAK_SEED={SEED}", flush=True)
    killer, total = Killer(SEED), Counter()
    for edm, number, way in rounds(make_edm, tmp_path_factory, SOAK_S):
        options = (*FEW_MORE, "--fault-threads", 1 + number % 2)
        status, out, err, counters = one_run(edm, program, OPS, way, options, killer)
        assert (status, out) == (0, plain(OPS)), (way, err)
        assert counters["lost"] == counters["internal_errors"] == 0, (way, err)
        total.update({name: counters[name] for name in ("faults", "fetches", "evictions", "writes")})
        print(f"{number + 1} runs; killed: {dict(killer.killed)}; after the last deaths: {dict(total)}", flush=True)
    assert killer.killed["edm: dm-handler"]


@pytest.mark.parametrize(
    ("seconds", "ops"),
    [(0.0, FEW_OPS), pytest.param(SOAK_S, OPS, marks=[pytest.mark.soak, pytest.mark.timeout(SOAK_S + HANG_S)])],
)
def test_churn_with_a_budget_of_two_pages(tmp_path_factory, make_edm, program, plain, seconds, ops):
    total = Counter()
    for edm, number, way in rounds(make_edm, tmp_path_factory, seconds):
        status, out, err, counters = one_run(edm, program, ops, way, (*TWO_PAGES, "--fault-threads", 1 + number % 3))
        assert (status, out, err) == (0, plain(ops), ""), way
        assert counters["lost"] == counters["internal_errors"] == counters["write_failures"] == 0
        assert counters["evictions"] > ops
        total.update({name: counters[name] for name in ("faults", "fetches", "evictions", "writes")})
        print(f"{number + 1} runs: {dict(total)}", flush=True)
