"""Resource limits: the program's are what it would have without EDM, and it gets as much memory under them."""

import json
import resource
import subprocess
import sys

import pytest

pytestmark = [pytest.mark.uffd, pytest.mark.timeout(120)]

MEBI = 1 << 20
OURS_MIB = 6
"""What EDM has in a program: its library, the control page, the staging area."""
LIMIT_MIB = 96
KINDS = {"as": (resource.RLIMIT_AS, "v"), "data": (resource.RLIMIT_DATA, "d")}
CAP_SYS_RESOURCE, PR_CAPBSET_DROP = 24, 24


def limiting(kind, soft, hard=None):
    """A command that runs the one behind it under a limit, and without the capability to lift a hard one."""
    code = (
        f"import ctypes, os, resource, sys; ctypes.CDLL(None).prctl({PR_CAPBSET_DROP}, {CAP_SYS_RESOURCE}, 0, 0, 0); "
        f"resource.setrlimit({int(kind)}, ({soft}, {hard} or resource.getrlimit({int(kind)})[1])); "
        "os.execv(sys.argv[1], sys.argv[1:])"
    )
    return sys.executable, "-c", code


def has_as_much(ran, plain, report):
    assert (ran.status, ran.err) == (0, "")
    assert int(plain) - OURS_MIB <= int(ran.out) <= int(plain)
    counters = json.loads(report.read_text())["counters"]
    assert counters["evictions"] > 1000
    assert counters["internal_errors"] == counters["lost"] == counters["sidecars_lost"] == 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", ["malloc", *(pytest.param(way, marks=pytest.mark.soak) for way in ("brk", "mmap"))])
def test_under_a_limit_that_it_sets_itself_a_program_gets_as_much(edm, program, tmp_path, way, kind):
    command = (program("limited"), way, kind, str(LIMIT_MIB))
    plain = subprocess.run(command, capture_output=True, check=True, timeout=60).stdout
    report = tmp_path / "r.json"
    ran = edm.run("--transport", "inproc", "--local-memory", "8M", "--report", report, "--", *command)
    has_as_much(ran, plain, report)


@pytest.mark.parametrize("kind", ["as", pytest.param("data", marks=pytest.mark.soak)])
def test_under_a_limit_that_a_shell_sets_a_program_gets_as_much(edm, program, tmp_path, kind):
    command = ("sh", "-c", f"ulimit -{KINDS[kind][1]} {LIMIT_MIB * 1024}; exec {program('limited')} malloc")
    plain = subprocess.run(command, capture_output=True, check=True, timeout=60).stdout
    report = tmp_path / "r.json"
    ran = edm.run("--transport", "inproc", "--local-memory", "8M", "--report", report, "--", *command)
    has_as_much(ran, plain, report)


def test_under_a_limit_that_edm_was_started_with_a_program_gets_as_much(edm, program, tmp_path):
    by = limiting(resource.RLIMIT_AS, LIMIT_MIB * MEBI)
    command = (program("limited"), "malloc")
    plain = subprocess.run([*by, *command], capture_output=True, check=True, timeout=60).stdout
    report = tmp_path / "r.json"
    options = ("--transport", "zmq", "--local-memory", "8M", "--report", report)
    has_as_much(edm.run(*options, "--", *command, wrapper=by), plain, report)


def test_the_programs_limits_are_those_that_edm_was_started_with(edm):
    asks = "ulimit -S -a; ulimit -H -a"
    set_ = "ulimit -S -v 500000; ulimit -S -d 400000; ulimit -S -f 16; ulimit -S -n 20; ulimit -S -s 600"
    plain = subprocess.run(["sh", "-c", f"{set_}; {asks}"], capture_output=True, check=True, timeout=60).stdout
    ran = edm.run("--transport", "inproc", "--", "sh", "-c", asks, wrapper=("sh", "-c", f'{set_}; exec "$@"', "sh"))
    assert (ran.status, ran.out, ran.err) == (0, plain, "")


@pytest.mark.parametrize(
    ("kind", "most", "letter"), [(resource.RLIMIT_AS, 500 * MEBI, "v"), (resource.RLIMIT_FSIZE, 16384, "f")]
)
def test_a_limit_that_edm_cannot_live_with_is_said(edm, kind, most, letter):
    ran = edm.run("--transport", "inproc", "--", "true", wrapper=limiting(kind, most, most))
    assert ran.status == 2
    assert ran.err.count("\n") == 1
    assert f"edm run -- sh -c 'ulimit -{letter} {most // 1024} && exec PROGRAM'" in ran.err


def test_a_script_is_told_how_it_was_called(edm, tmp_path):
    script = tmp_path / "script"
    script.write_text('#!/bin/sh\necho "$0"\n')
    script.chmod(0o755)
    ran = edm.run("--transport", "inproc", "--", "./script", cwd=tmp_path)
    assert (ran.status, ran.out, ran.err) == (0, b"./script\n", "")
