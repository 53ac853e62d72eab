"""`edm run --trace` and `edm trace`: recorded faults, unprivileged and of a real program."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from edm._native import lib
from edm.bench.running import PROGRAM
from edm.plugins.source_replay.trace import OPERATION, WRITE
from edm.trace import MAGIC, RECORD, as_operations, read, summary

STEPS = ("asked_ns", "answered_ns", "done_ns", "listed_ns")
REPLAY = ("--fault-source", "replay", "--transport", "inproc", "--store", "memory", "--local-memory", "256K")


def edm(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "edm", *map(str, arguments)], capture_output=True, text=True, timeout=100, check=False
    )


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """A replayed program's faults: 3000 touches of 512 pages, 64 of them local at a time."""
    file = tmp_path_factory.mktemp("trace") / "faults"
    options = [f"fault_source.replay.{option}" for option in ("touches=3000", "pages=512", "writes=30")]
    given = [part for option in options for part in ("-o", option)]
    report = file.with_suffix(".json")
    ran = edm("run", *REPLAY, *given, "--trace", file, "--report", report, "--", "true")
    assert ran.returncode == 0, ran.stderr
    return file, json.loads(report.read_text())["counters"]


def test_every_fault_is_recorded_with_its_outcome(recorded):
    file, counters = recorded
    trace = read(file)
    outcomes = {row["outcome"]: row["faults"] for row in summary(trace.records)}
    assert trace.unrecorded == 0
    assert counters["faults"] >= len(trace.records) > 1000
    assert 0 < outcomes["fetched"] <= counters["fetches"]
    assert 0 < outcomes["new page"] <= counters["zero_fills"]


def test_the_steps_of_a_fetched_page_follow_each_other(recorded):
    records = read(recorded[0]).records
    fetched = records[records["outcome"] == lib.EDM_TRACE_FETCHED]
    times = np.stack([fetched[step] for step in STEPS])
    assert (times[0] > 0).all()
    assert (np.diff(times.astype(np.int64), axis=0) >= 0).all()


def test_a_new_page_asks_nobody(recorded):
    records = read(recorded[0]).records
    new = records[records["outcome"] == lib.EDM_TRACE_ZERO]
    assert not new["asked_ns"].any()
    assert new["done_ns"].all()


def test_recorded_faults_are_played_and_simulated(recorded, tmp_path):
    target = tmp_path / "touches.npy"
    assert edm("trace", "touches", recorded[0], target).returncode == 0
    operations = np.load(target)
    assert operations.dtype == OPERATION
    assert len(operations) == len(read(recorded[0]).records)
    assert edm("run", *REPLAY, "-o", f"fault_source.replay.trace={target}", "--", "true").returncode == 0
    ratios = [json.loads(edm("simulate", trace, "--json").stdout) for trace in (target, recorded[0])]
    assert ratios[0] == ratios[1]


def test_pages_are_numbered_anew_without_gaps_by_region():
    records = np.zeros(4, RECORD)
    records["region"], records["page"] = [2, 1, 2, 1], [7, 900, 7, 4]
    records["kind"] = [lib.EDM_TRACE_READ, lib.EDM_TRACE_WRITE, lib.EDM_TRACE_PROTECTED, lib.EDM_TRACE_READ]
    operations = as_operations(records)
    assert operations["page"].tolist() == [2, 1, 2, 0]
    assert (operations["kind"] == WRITE).tolist() == [False, True, True, False]
    assert operations["value"].tolist() == [0, 2, 3, 0]


def test_show_prints_the_steps_and_json_every_fault(recorded):
    shown = edm("trace", "show", "--faults", 3, recorded[0]).stdout
    assert all(word in shown for word in ("RequestGetPage", "12/13 D", "new page", "fetched"))
    document = json.loads(edm("trace", "show", "--json", recorded[0]).stdout)
    assert len(document["faults"]) == len(read(recorded[0]).records)


def test_a_trace_that_was_cut_off_says_so(recorded, tmp_path):
    cut = tmp_path / "cut"
    cut.write_bytes(recorded[0].read_bytes()[: len(MAGIC) + 10 * RECORD.itemsize + 5])
    assert len(read(cut).records) == 10
    ran = edm("trace", "show", cut)
    assert "the run was cut off" in ran.stderr


def test_another_file_is_refused(tmp_path):
    (tmp_path / "x").write_text("r 1\n")
    ran = edm("trace", "show", tmp_path / "x")
    assert (ran.returncode, ran.stderr) == (2, f"edm: {tmp_path}/x: not recorded by edm run --trace\n")


@pytest.mark.uffd
@pytest.mark.skipif(
    lib.edm_uffd_check() != 0, reason=f"userfaultfd is not permitted: {os.strerror(-lib.edm_uffd_check())}"
)
def test_a_real_programs_faults_are_recorded(tmp_path):
    file = tmp_path / "faults"
    program = (PROGRAM, "read-random", "region=8192", "budget=4096", "accesses=4096")
    placed = ("--transport", "inproc", "--store", "memory", "--local-memory", "16M")
    ran = edm("run", *placed, "--trace", file, "--", *program)
    assert ran.returncode == 0, ran.stderr
    records = read(file).records
    fetched = records[records["outcome"] == lib.EDM_TRACE_FETCHED]
    assert len(fetched) > 2000
    assert len(np.unique(fetched["thread"])) == 1
    assert (fetched["asked_ns"] <= fetched["done_ns"]).all()
