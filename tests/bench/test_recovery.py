"""The benchmarks of recovery and of two trees run, and know their cases."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"

pytestmark = [pytest.mark.uffd, pytest.mark.timeout(120)]


def bench(name, *arguments):
    command = [sys.executable, BENCHMARKS / name / f"bench_{name}.py", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=100)


@pytest.mark.soak
def test_a_death_and_the_wait_for_another(tmp_path):
    ran = bench("recovery", "--deaths", "1", "--json", tmp_path / "r.json", "memory server, zmq")
    assert ran.returncode == 0, ran.stderr
    row = json.loads((tmp_path / "r.json").read_text())["results"]["memory server, zmq"]
    assert len(row["waits_s"]) == 1
    assert row["median_s"] > 0.05, "no new process starts so fast"


@pytest.mark.soak
def test_a_tree_against_itself(tmp_path):
    ran = bench("versus", "--rounds", "2", "--json", tmp_path / "r.json")
    assert ran.returncode == 0, ran.stderr
    results = json.loads((tmp_path / "r.json").read_text())["results"]
    assert set(results) == {"new pages", "reads", "writes"}
    assert all(len(row["this_ns"]) == len(row["other_ns"]) == 2 for row in results.values())


def test_unknown_case_is_a_mistake():
    ran = bench("recovery", "no such case")
    assert ran.returncode == 1
    assert "no case no such case: there are DM-Handler, inproc" in ran.stderr
