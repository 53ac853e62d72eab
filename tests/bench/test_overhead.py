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
    file = tmp_path / "r.json"
    for more in ([], ["--more"]):
        ran = bench("--groups", "1", *more, "--json", file, "C blocks")
        assert ran.returncode == 0, ran.stderr
    row = json.loads(file.read_text())["results"]["C blocks"]
    assert [{way: len(runs) for way, runs in group.items()} for group in row["groups"]] == [
        {"plain": 2, "captured": 2, "small pages": 0}
    ] * 2
    for what in ("time", "cpu", "whole", "control"):
        ratio, low, high = row[what]
        assert 0 < low <= ratio <= high
    for run in row["groups"][0]["captured"]:
        assert 0 < run["time"] < run["whole"]
        assert run["cpu"] > 0
    assert row["events"] < 20, "each block is mapped and unmapped"


def test_unknown_program_is_a_mistake():
    ran = bench("no such program")
    assert ran.returncode == 1
    assert "no program no such program: there are C loop" in ran.stderr
