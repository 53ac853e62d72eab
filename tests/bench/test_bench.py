"""`edm bench`: a real small run, and what becomes of its figures."""

import json
import os
import subprocess
import sys

import attrs
import pytest

from edm._native import lib
from edm.bench.cases import CASES
from edm.bench.report import print_table, ratio, row, verdicts, write_plot
from edm.bench.running import PROGRAM, MeasureFailed, Result, Sizes, Spread, call, figure

NAMED = {case.name: case for case in CASES}
FLOORS = {
    name: Spread(median=ns, low=ns, high=ns)
    for name, ns in (("fault", 4000), ("write", 5000), ("mpi", 3000), ("pread", 1000))
}


def result(mean):
    return Result(spread=Spread(median=mean, low=mean, high=mean), mean=mean, counters={})


def run(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "edm", "bench", *arguments], capture_output=True, text=True, timeout=100, check=False
    )


def test_a_ratio_at_its_target_is_met_and_one_above_is_missed():
    case = NAMED["new"]
    assert row(case, {"one": result(6500)}, FLOORS)["met"] is True
    assert row(case, {"one": result(6501)}, FLOORS)["met"] is False


def test_reads_and_writes_are_each_held_against_a_bare_fault_of_their_kind():
    assert row(NAMED["read-random"], {"one": result(8000)}, FLOORS)["ratio"] == pytest.approx(2.0)
    assert row(NAMED["write-random"], {"one": result(8000)}, FLOORS)["ratio"] == pytest.approx(1.6)


def test_a_speed_up_is_to_be_at_least_its_target():
    assert row(NAMED["threads"], {"all": result(1.5)}, FLOORS)["met"] is True
    assert row(NAMED["threads"], {"all": result(1.4)}, FLOORS)["met"] is False


def test_all_cpus_are_held_against_one():
    document = row(NAMED["new"], {"one": result(4000), "all": result(5600)}, FLOORS)
    assert document["met"] is True
    assert document["spread"] == pytest.approx(1.4)
    assert list(verdicts(document)) == [True, False]


def test_a_row_over_mpi_is_also_held_against_the_sum_of_the_floors():
    document = row(NAMED["read-random-mpi"], {"all": result(13_000)}, FLOORS)
    assert document["met"] is True
    assert document["over_sum"] == pytest.approx(13 / 8)
    assert document["over_sum_met"] is False


def test_a_run_that_failed_meets_nothing_and_says_why():
    document = row(NAMED["new"], {"one": "exit status 70"}, FLOORS)
    assert document["problems"] == {"one": "exit status 70"}
    assert not all(verdicts(document))


def test_the_mean_counts_and_not_the_median():
    uneven = Result(spread=Spread(median=4000, low=4000, high=4000), mean=8000.0, counters={})
    assert ratio(NAMED["read-random"], uneven, FLOORS) == 2.0


def test_rescues_that_were_fetches_are_no_figure():
    document = {"ns": [1.0], "ns_accesses": 100, "ns_total": 100, "ns_faults": 0}
    sizes = Sizes(region_pages=8192, budget_pages=4096, accesses=4096)
    with pytest.raises(MeasureFailed, match="only 10% of the measured faults were rescues"):
        figure(NAMED["rescue"], sizes, "all", document, {"rescues": 10})


def test_a_wide_address_space_is_held_against_a_narrow_one():
    document = {"ns": [3.0], "ns_total": 300, "ns_faults": 100, "narrow_total": 500, "narrow_faults": 200}
    result = figure(NAMED["wide"], Sizes(region_pages=8192, budget_pages=4096, accesses=4096), "one", document, {})
    assert ratio(NAMED["wide"], result, FLOORS) == pytest.approx(1.2)


def test_the_measuring_program_refuses_what_it_does_not_know():
    with pytest.raises(MeasureFailed, match="unknown mode 'nonsense'"):
        call([str(PROGRAM), "nonsense"], "all")


def test_a_program_that_does_not_end_is_ended():
    with pytest.raises(MeasureFailed, match=r"not done after 0\.2 s"):
        call(["sleep", "30"], "one", timeout_s=0.2)


def test_an_unknown_case_is_refused_in_one_line():
    ran = run("--case", "nonsense")
    assert ran.returncode == 2
    assert ran.stderr.startswith("edm: unknown case 'nonsense'")


def test_a_row_says_how_far_the_cpus_were_apart_before_and_after(capsys):
    rows = [row(NAMED["new"], {"all": attrs.evolve(result(6500), apart=(321.4, 48.2))}, FLOORS)]
    rows.append(row(NAMED["evict"], {"all": attrs.evolve(result(2000), apart=(48.1, 48.4))}, FLOORS))
    rows.append(row(NAMED["rescue"], {"one": result(6500)}, FLOORS))
    print_table({"rows": rows, "floors": {"fault": {"median": 4000}}})
    table = capsys.readouterr().out
    assert "48–321 ns" in table
    assert table.count(" ns ") == 2  # one figure where both are the same, none on one CPU


def test_the_plot_is_a_picture(tmp_path):
    pytest.importorskip("matplotlib")
    write_plot({"rows": [row(NAMED["new"], {"one": result(6500)}, FLOORS)]}, tmp_path / "bench.png")
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.uffd
@pytest.mark.skipif(
    lib.edm_uffd_check() != 0, reason=f"userfaultfd is not permitted: {os.strerror(-lib.edm_uffd_check())}"
)
def test_misses_of_a_real_program_are_measured():
    ran = run("--case", "read-random", "--size", "64M", "--cpus", "all", "--json")
    assert ran.returncode == 0, ran.stderr + ran.stdout
    document = json.loads(ran.stdout)
    (measured,) = document["rows"]
    figures = measured["placements"]["all"]
    assert document["floors"]["fault"]["median"] > 0
    assert document["floors"]["write"]["median"] > 0
    assert figures["counters"]["fetches"] > 4096
    assert figures["mean"] > 0
    # A cache line takes some time between any two CPUs, and less than a system call in a good moment does.
    assert len(figures["apart"]) == (2 if len(os.sched_getaffinity(0)) > 1 else 0)
    assert all(5 < ns < 100_000 for ns in figures["apart"])
    assert measured["ratio"] == pytest.approx(figures["mean"] / document["floors"]["fault"]["median"])
