"""What a program tells the kernel of its memory with madvise(2) is followed, and changes nothing of what it reads."""

import json

import pytest

pytestmark = [pytest.mark.uffd, pytest.mark.timeout(150)]

PAGES = 8192
EIGHTH = PAGES // 8
MS = "100"
"""Between advice and reading, where the program cannot see whether it is followed: a sweep looks every few ms."""


@pytest.fixture
def advised(edm, program, tmp_path):
    """Run the program with that advice; the engine's counters."""

    def run(advice, local_memory, *more):
        report = tmp_path / f"{advice}.json"
        ran = edm.run(
            *("--transport", "inproc", "--store", "memory", "--local-memory", local_memory, "--report", report, *more),
            *("--", program("advised"), advice, "32", MS),
        )
        read = PAGES - EIGHTH if advice in ("cold", "warm") else PAGES
        assert (ran.status, ran.out.decode(), ran.err) == (0, f"{read} pages, 0 wrong\n", "")
        counters = json.loads(report.read_text())["counters"]
        assert counters["internal_errors"] == counters["lost"] == 0
        return counters

    return run


def test_pageout_evicts_where_nothing_else_would(advised):
    assert advised("none", "none")["evictions"] == 0
    counters = advised("pageout", "none")
    assert counters["hints"] == 1
    assert counters["evictions"] >= 0.9 * PAGES
    assert counters["fetches"] + counters["rescues"] >= 0.9 * PAGES


@pytest.mark.parametrize("sweep_ms", ["5", "50"], ids=["swept before the advice", "swept after it"])
def test_cold_pages_leave_before_older_ones(advised, sweep_ms):
    warm, cold = (advised(advice, "36M", "--sweep-ms", sweep_ms) for advice in ("warm", "cold"))
    assert warm["fetches"] + warm["rescues"] > EIGHTH / 2, "nothing had to leave"
    assert cold["evictions"] >= EIGHTH / 4, "nothing had to leave"
    assert cold["fetches"] + cold["rescues"] < (warm["fetches"] + warm["rescues"]) / 4


@pytest.mark.parametrize("advice", ["willneed", "posix"])
def test_what_will_be_needed_is_brought(advised, advice):
    counters = advised(advice, "8M")
    assert counters["hints"] == 1
    assert EIGHTH / 2 < counters["hinted"] <= EIGHTH


def test_nothing_is_brought_ahead_of_random_reads(advised):
    strided, random = advised("strided", "8M"), advised("random", "8M")
    assert strided["faults"] < PAGES / 2, "the stride was not seen"
    assert random["faults"] > 0.9 * PAGES


def test_sequential_reads_are_served_in_full_windows_at_once(advised):
    chunks, sequential = advised("chunks", "8M"), advised("sequential", "8M")
    assert sequential["faults"] < 0.6 * chunks["faults"]


def test_advice_outlives_a_fork_and_is_each_ones_own(advised):
    counters = advised("fork", "8M")
    assert counters["hints"] == 2
    assert counters["faults"] > 1.8 * PAGES, "what is random was brought ahead"


def test_advice_the_kernel_refuses_is_refused(advised):
    assert advised("wrong", "8M")["hints"] == 0


def test_prefetch_off_is_off_for_sequential_reads_too(advised):
    assert advised("sequential", "8M", "--prefetch", "0")["ahead"] == 0
