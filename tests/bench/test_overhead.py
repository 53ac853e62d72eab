"""The benchmark of captured programs that are never evicted runs; and malloc does not map and unmap each block."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "overhead" / "bench_overhead.py"

pytestmark = [pytest.mark.uffd, pytest.mark.timeout(60)]


def bench(*arguments):
    return subprocess.run([sys.executable, BENCHMARK, *arguments], capture_output=True, text=True, timeout=50)


def test_blocks_taken_and_given_back_are_no_events(tmp_path):
    ran = bench("--rounds", "1", "--json", tmp_path / "r.json", "C blocks")
    assert ran.returncode == 0, ran.stderr
    row = json.loads((tmp_path / "r.json").read_text())["results"]["C blocks"]
    ratio, low, high = row["ratio"]
    assert 0 < low <= ratio <= high
    assert {way: len(runs) for way, runs in row["runs_ns"].items()} == {"plain": 1, "captured": 1, "again": 1}
    assert row["events"] < 20, "each block is mapped and unmapped"
    assert row["steps"] > 40


def test_unknown_program_is_a_mistake():
    ran = bench("no such program")
    assert ran.returncode == 1
    assert "no program no such program: there are C loop" in ran.stderr
