"""What a program does with its memory turns out as it does without EDM: self-verifying programs, a step for each thing
that can be done, while what they do not touch is evicted. programs/steps.h says how they are made.

`make soak` goes round for EDM_SOAK_S seconds (600), at other budgets and over other transports and stores.
"""

import itertools
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = [pytest.mark.uffd, pytest.mark.timeout(120)]

SOAK_S = float(os.environ.get("EDM_SOAK_S", "600"))
WAYS = [("inproc", "memory"), ("zmq", "file"), ("mpi", "file"), ("zmq", "lmdb")]
SUITES = {
    **dict.fromkeys(("tree", "spaces", "kernel", "signals", "placed", "newer", "rare", "remaps", "unusual"), "1M"),
    **dict.fromkeys(("own_uffd", "executable", "reached"), "1M"),
    "uring": "2M",
}
"""Program → its local memory: a quarter of what it needs, or less; what uring registers must fit into it."""
SUITE_NAMES = [pytest.param(name, marks=pytest.mark.soak) if name == "unusual" else name for name in SUITES]
NO_URING = 77
RUNS = 4
"""At most, until it was evicted all the while: some take 35 ms, and a machine may stand still for as long."""


def plain(program, name, *steps, **environment):
    """The program without EDM; its standard output, with the exit status."""
    environment = {**os.environ, **environment}
    ran = subprocess.run([program(name), *steps], capture_output=True, text=True, timeout=60, env=environment)
    if ran.returncode == NO_URING:
        pytest.skip("this kernel offers no io_uring here")
    return ran


def steps_of(out):
    return [line.split(":")[0] for line in out.splitlines() if line.endswith(": as it should be")]


def check(edm, program, name, report, *, budget, transport="inproc", store="memory"):
    expected = plain(program, name)
    assert expected.returncode == 0, expected.stdout
    arguments = ("--transport", transport, "--store", store, "--local-memory", budget, "--report", report)
    for _ in range(RUNS):
        ran = edm.run(*arguments, "--", program(name))
        assert (ran.status, ran.out.decode(), ran.err) == (0, expected.stdout, "")
        counters = json.loads(report.read_text())["counters"]
        assert counters["internal_errors"] == counters["lost"] == counters["write_failures"] == 0
        assert counters["sidecars_lost"] == 0
        if counters["fetches"] + counters["rescues"] > 1000:
            break
    else:
        pytest.fail("it was not evicted all the while")
    return counters


@pytest.mark.parametrize("name", SUITE_NAMES)
def test_every_step_is_as_without_edm(edm, program, tmp_path, name):
    counters = check(edm, program, name, tmp_path / "r.json", budget=SUITES[name])
    assert (counters["given"] > 0) == (name == "own_uffd")
    assert edm.left_behind() == ({}, [])


@pytest.mark.parametrize("name", SUITE_NAMES)
def test_every_step_fails_on_a_wrong_byte(program, name):
    steps = steps_of(plain(program, name).stdout)
    assert steps
    for step in steps:
        ran = plain(program, name, step, SPOIL=step)
        assert ran.returncode == 1, f"{step} did not see it"
        assert f"{step}: " in ran.stdout


@pytest.mark.parametrize(
    "name",
    ["signals", *(pytest.param(one, marks=pytest.mark.soak) for one in ("placed", "newer", "remaps", "executable"))],
)
def test_every_step_is_as_without_edm_in_a_program_that_has_musl(edm, program, tmp_path, name):
    if not shutil.which("musl-gcc"):
        pytest.skip("musl-gcc is not installed: make programs")
    path, report = program(name, "musl-gcc"), tmp_path / "r.json"
    expected = subprocess.run([path], capture_output=True, check=True, timeout=60).stdout
    # Of a shell that has glibc it inherits what glibc's dynamic linker is to load.
    arguments = ("--transport", "inproc", "--local-memory", "1M", "--report", report, "--")
    ran = edm.run(*arguments, "sh", "-c", '"$0"; exit $?', path)
    assert (ran.status, ran.out, ran.err) == (0, expected, "")
    counters = json.loads(report.read_text())["counters"]
    assert counters["evictions"] > 1000
    assert counters["internal_errors"] == counters["lost"] == counters["sidecars_lost"] == 0


def test_memory_that_may_be_executed_keeps_to_the_budget(edm, program, tmp_path):
    report = tmp_path / "r.json"
    arguments = ("--transport", "inproc", "--local-memory", "1M", "--report", report)
    ran = edm.run(*arguments, "--", program("executable"), "heap")
    assert (ran.status, ran.out, ran.err) == (0, b"heap: as it should be\n", "")
    counters = json.loads(report.read_text())["counters"]
    assert counters["evictions"] > 2000
    assert (counters["over_limit"], counters["internal_errors"], counters["lost"]) == (0, 0, 0)


def test_what_is_wiped_on_fork_is_zeros_where_nothing_had_left_before(edm, program, tmp_path):
    report = tmp_path / "r.json"
    expected = plain(program, "tree", "madvised_fork")
    ran = edm.run(
        *("--transport", "inproc", "--local-memory", "6M", "--report", report, "--", program("tree"), "madvised_fork")
    )
    assert (ran.status, ran.out.decode(), ran.err) == (0, expected.stdout, "")
    counters = json.loads(report.read_text())["counters"]
    assert counters["evictions"] > 100
    assert counters["internal_errors"] == counters["lost"] == counters["sidecars_lost"] == 0


KSM = Path("/sys/kernel/mm/ksm")


@pytest.fixture
def merging():
    """KSM at work on whoever allows it, without rest; afterwards as it was."""
    eager = {"pages_to_scan": "1000", "sleep_millisecs": "2", "smart_scan": "0"}
    try:
        before = {name: (KSM / name).read_text() for name in ("run", *eager) if (KSM / name).exists()}
        for name in before:
            (KSM / name).write_text(eager.get(name, "1"))
    except OSError as error:
        pytest.skip(f"KSM cannot be turned on here: {error}")
    if not before:
        pytest.skip("this kernel has no KSM")
    yield
    for name, value in [("run", "2"), *before.items()]:  # 2: undo what was merged
        (KSM / name).write_text(value)


@pytest.mark.usefixtures("merging")
@pytest.mark.parametrize("step", ["merged_pages", pytest.param("merged_past_libc", marks=pytest.mark.soak)])
def test_what_is_written_after_the_kernel_merged_it_is_not_lost(edm, program, tmp_path, step):
    report = tmp_path / "r.json"
    edm.environment["ROUNDS"] = "10"
    arguments = ("--transport", "inproc", "--local-memory", "1M", "--report", report)
    ran = edm.run(*arguments, "--", program("newer"), step)
    assert (ran.status, ran.out.decode(), ran.err) == (0, f"{step}: as it should be\n", "")
    assert json.loads(report.read_text())["counters"]["evictions"] > 1000


POOL = """
import hashlib, multiprocessing, sys
data = bytearray(6 << 20)
for i in range(0, len(data), 512):
    data[i] = i // 512 % 251
def work(k):
    mine = bytearray(data[k << 18 : (k + 1) << 18]) * 4
    mine[k] ^= 1
    data[k << 18] ^= 0xFF
    return hashlib.md5(mine).hexdigest()
if __name__ == "__main__":
    for kind in ("fork", "spawn"):
        with multiprocessing.get_context(kind).Pool(2) as pool:
            print(kind, hashlib.md5("".join(pool.map(work, range(8))).encode()).hexdigest())
    print(hashlib.md5(data).hexdigest())
"""


def test_multiprocessing_of_python_is_the_same(edm, tmp_path):
    script = tmp_path / "pool.py"
    script.write_text(POOL)
    command = (shutil.which("python3", path="/usr/bin:/usr/local/bin") or sys.executable, str(script))
    expected = subprocess.run(command, capture_output=True, check=True, timeout=60).stdout
    report = tmp_path / "r.json"
    ran = edm.run("--transport", "inproc", "--local-memory", "4M", "--report", report, "--", *command)
    assert (ran.status, ran.out, ran.err) == (0, expected, "")
    counters = json.loads(report.read_text())["counters"]
    assert counters["processes"] >= 5  # itself, two workers each way
    # All under one budget, but for what was let in above it since too much is shared since forks.
    assert (counters["peak_resident"] - counters["over_limit"]) * 4096 <= 8 << 20
    assert edm.left_behind() == ({}, [])


@pytest.mark.soak
@pytest.mark.timeout(SOAK_S + 300)
def test_every_step_for_as_long_as_one_likes(edm, program, tmp_path):
    end, rounds = time.monotonic() + SOAK_S, 0
    budgets = itertools.cycle(["1M", "512K", "2M", "4M", "768K"])
    for (transport, store), budget in zip(itertools.cycle(WAYS), budgets):
        for name in SUITES:
            if time.monotonic() > end:
                print(f"{rounds} runs")
                assert rounds
                return
            least = "2M" if name == "uring" else budget
            check(edm, program, name, tmp_path / "r.json", budget=least, transport=transport, store=store)
            rounds += 1


@pytest.fixture
def always_huge():
    """Transparent huge pages for everybody; afterwards as it was."""
    switch = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    try:
        before = switch.read_text().split("[")[1].split("]")[0]
        switch.write_text("always")
    except OSError as error:
        pytest.skip(f"huge pages cannot be turned on here: {error}")
    yield
    switch.write_text(before)


@pytest.mark.soak
@pytest.mark.usefixtures("always_huge")
@pytest.mark.parametrize("name", SUITE_NAMES)
def test_every_step_is_as_without_edm_where_all_memory_may_be_huge(edm, program, tmp_path, name):
    check(edm, program, name, tmp_path / "r.json", budget=SUITES[name])
