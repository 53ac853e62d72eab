"""Address-space calls of several threads, in any order, while pages are evicted: each byte is what it must be.

hypothesis makes the scripts, and shortens one that fails. `make soak` goes on for EDM_SOAK_S seconds (600),
from the script that EDM_SOAK_FROM (1000) names.
"""

import json
import os
import random
import subprocess
import time

import pytest
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

pytestmark = [pytest.mark.uffd, pytest.mark.timeout(200)]

PAGES, THREADS = 160, 3  # as in programs/fuzzed.c
CALLS = "wwwwwwwrrrrrddffpqnoaaammmDDeeuuxxkkvvlLbOORSSGM"
GROWTH = "GGGGMMBrZZ"
SMALL, LARGE = ("1M", 0), ("16M", 24)
"""Local memory, and MiB more that are looked at: in the second, memory that grows may wait (native/growth.c)."""
SOAK_S = float(os.environ.get("EDM_SOAK_S", "600"))
SOAK_FROM = int(os.environ.get("EDM_SOAK_FROM", "1000"))

page = st.integers(0, PAGES - 1)
count = st.one_of(st.integers(1, 4), st.integers(1, 48))


def script(calls):
    letters = st.one_of(*[st.sampled_from(each) for each in (calls, calls, calls, calls + "F")])
    line = st.tuples(st.integers(0, THREADS - 1), letters, page, count, page)
    # of any length alike: lists of themselves are short
    return st.integers(1, 400).flatmap(lambda n: st.lists(line, min_size=n, max_size=n))


SCRIPTS = {SMALL: script(CALLS), LARGE: script(CALLS + 7 * GROWTH)}


@pytest.fixture(scope="module")
def fuzzed(program):
    return program("fuzzed")


def budget(local_memory):
    return ("--transport", "inproc", "--local-memory", local_memory, "--write-back", "256K")


def compare(edm, fuzzed, size, lines, rounds=3):
    """The counters of the run under EDM."""
    local_memory, more = size
    path, report = edm.directory / "script", edm.directory / "report.json"
    path.write_text("".join("{} {} {} {} {}\n".format(*each) for each in lines))
    command = (fuzzed, path, str(rounds), str(more))
    plain = subprocess.run(command, capture_output=True, timeout=60, check=False)
    assert plain.returncode == 0, plain.stdout
    ran = edm.run(*budget(local_memory), "--report", report, "--", *command, timeout=120)
    assert (ran.status, ran.out, ran.err) == (0, plain.stdout, "")
    counters = json.loads(report.read_text())["counters"]
    assert counters["sidecars_lost"] == counters["lost"] == counters["internal_errors"] == 0
    return counters


def check(edm, fuzzed, size, number, examples):
    """One run of hypothesis, the same for each number; returns how often a mapping that grew was captured in part."""
    cuts = []

    @seed(number)
    @settings(max_examples=examples, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(SCRIPTS[size])
    def every_byte_is_as_it_must_be(lines):
        cuts.append(compare(edm, fuzzed, size, lines)["growth_cuts"])

    every_byte_is_as_it_must_be()
    return sum(cuts)


def test_threads_that_remap_what_others_have_left(edm, program, tmp_path):
    command, report = (program("stamped"), "6000"), tmp_path / "report.json"
    plain = subprocess.run(command, capture_output=True, timeout=60, check=True)
    ran = edm.run(*budget("1M"), "--report", report, "--", *command)
    assert (ran.status, ran.out, ran.err) == (0, plain.stdout, "")
    counters = json.loads(report.read_text())["counters"]
    assert counters["evictions"] > 1000
    assert counters["events_remap"] > 10
    assert counters["internal_errors"] == counters["lost"] == 0


@pytest.mark.parametrize(("size", "examples"), [(SMALL, 6), (LARGE, 2)], ids=["small", "large"])
def test_every_byte_is_as_it_must_be(edm, fuzzed, size, examples):
    check(edm, fuzzed, size, 1, examples)


def test_mappings_that_grow_are_captured_in_part(edm, fuzzed):
    chance = random.Random(1)
    calls, pages = CALLS + 7 * GROWTH, range(PAGES)
    counts = [*range(1, 5)] * 12 + [*range(1, 49)]
    for _ in range(5):  # how much grows between two looks is up to the machine
        lines = [
            (chance.randrange(THREADS), *(chance.choice(each) for each in (calls, pages, counts, pages)))
            for _ in range(400)
        ]
        if compare(edm, fuzzed, LARGE, lines)["growth_cuts"]:
            return
    pytest.fail("in none of 5 runs")


@pytest.mark.soak
@pytest.mark.timeout(SOAK_S + 600)
@pytest.mark.parametrize("size", [SMALL, LARGE], ids=["small", "large"])
def test_every_byte_is_as_it_must_be_for_long(edm, fuzzed, size):
    end, number, cuts = time.monotonic() + SOAK_S, SOAK_FROM, 0
    while time.monotonic() < end:
        number += 1
        cuts += check(edm, fuzzed, size, number, 20)
        print(f"{(number - SOAK_FROM) * 20} scripts, {cuts} mappings captured in part", flush=True)
    assert cuts or size is SMALL
