"""Real programs in a quarter of the memory they need, evicted all the while: what they compute is the same.

The quick form is one run each. `make soak` runs them for EDM_SOAK_S seconds (600) in all, each run at another budget
and with another transport and store: 20 runs of a program are all pairs of these.
"""

import itertools
import json
import os
import shutil
import subprocess
import time

import pytest
from watching import Watch
from workloads import WORKLOADS

pytestmark = [pytest.mark.uffd, pytest.mark.timeout(150)]

LEAST_BYTES = 256 << 10
RUNS = 4
"""At most, until it was evicted as it should be: some take 50 ms, and a machine may stand still for as long."""
SOAK_S = float(os.environ.get("EDM_SOAK_S", "600"))
WAYS = [("inproc", "memory"), ("mpi", "file"), ("zmq", "lmdb"), ("inproc", "file"), ("zmq", "memory")]


@pytest.fixture(scope="module")
def ready(program, tmp_path_factory):
    """A workload made ready, its plain run done: (built, its output and results, the memory it needs in bytes)."""
    directory, done = tmp_path_factory.mktemp("workloads"), {}

    def make(workload, size):
        if (workload.name, size) not in done:
            built = workload.build(directory, program, size)
            process = subprocess.Popen(built.command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
            with Watch(process.pid) as watch:
                out, err = process.communicate(timeout=120)
            assert process.returncode == 0, err
            done[workload.name, size] = built, out, results_of(built), watch.peak_bytes
        return done[workload.name, size]

    return make


def results_of(built):
    return [path.read_bytes() for path in built.results]


def run_evicted(edm, ready, report, workload, share, way):
    """Run a workload in `share` of its need and compare; returns the report. way: transport and store."""
    if workload.missing:
        pytest.skip(workload.missing)
    transport, store = way
    built, out, results, need = ready(workload, workload.sizes[0])
    budget = max(LEAST_BYTES, int(need * share))
    arguments = ("--transport", transport, "--store", store, "--local-memory", budget, "--report", report)
    above = max(0, need - workload.beside_bytes - budget)
    for _ in range(RUNS):
        for path in built.results:
            path.unlink()
        ran = edm.run(*arguments, "--", *built.command, timeout=140)
        assert ran.status == 0, ran.err
        assert "edm:" not in ran.err
        if workload.same_output:
            assert ran.out == out
        assert results_of(built) == results
        document = json.loads(report.read_text())
        counters = document["counters"]
        assert counters["internal_errors"] == counters["lost"] == counters["write_failures"] == 0
        if counters["evictions"] * 4096 >= (above if workload.same_need else above / 4):
            return document
    pytest.fail("it was not evicted as it should be")


@pytest.mark.parametrize("workload", WORKLOADS, ids=lambda w: w.name)
def test_program_in_a_quarter_of_its_need(edm, ready, tmp_path, workload):
    run_evicted(edm, ready, tmp_path / "r.json", workload, 0.25, (workload.transport, workload.store))
    assert edm.left_behind() == ({}, [])


def vm_methods():
    """Those of the stress-ng that is here, without `all`, which takes turns and does not get round in a short run."""
    if shutil.which("stress-ng") is None:
        return [pytest.param("", marks=pytest.mark.skip(reason="no stress-ng here (make programs)"))]
    said = subprocess.run(["stress-ng", "--vm-method", "?"], capture_output=True, text=True, check=False).stderr
    methods = said.partition(" all ")[2].split()
    assert len(methods) > 30, said
    return methods


@pytest.mark.soak
@pytest.mark.timeout(2000)
@pytest.mark.parametrize("method", vm_methods())
def test_every_vm_method_of_stress_ng_verifies(edm, tmp_path, method):
    """A pass ends with an munmap, of which there is an event.

    The longest, prime-0, touches 2 million bytes, each in another page than the last.
    """
    for seconds in (4, 16, 64, 256, 1024):
        command = ("stress-ng", "--vm", 1, "--vm-bytes", "256K", "--vm-method", method, "--verify")
        run = ("--transport", "inproc", "--local-memory", "272K", "--report", tmp_path / "r.json")
        ran = edm.run(*run, "--", *command, "--temp-path", tmp_path, "--timeout", seconds, timeout=seconds + 90)
        assert (ran.status, "fail" in ran.err) == (0, False), ran.err
        counters = json.loads((tmp_path / "r.json").read_text())["counters"]
        assert counters["internal_errors"] == counters["lost"] == 0
        assert counters["evictions"] > 200
        if counters["events_unmap"] >= 3:
            return
    pytest.fail(f"not one pass in {seconds} s")


@pytest.mark.soak
@pytest.mark.timeout(SOAK_S + 600)
@pytest.mark.parametrize("workload", WORKLOADS, ids=lambda w: w.name)
def test_program_for_as_long_as_one_likes(edm, ready, tmp_path, workload):
    """Each program has its part of the time, so that one that fails keeps no other from its turn."""
    end = time.monotonic() + SOAK_S / len(WORKLOADS)
    ways = zip(itertools.cycle(WAYS), itertools.cycle([0.25, 0.5, 0.12, 0.8]))
    for number, (way, share) in enumerate(ways, 1):
        run_evicted(edm, ready, tmp_path / "r.json", workload, share, way)
        print(f"{number} runs, the last in {share} of its need by {' and '.join(way)}", flush=True)
        if time.monotonic() > end:
            return
