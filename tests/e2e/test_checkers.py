"""Programs built with sanitizers, and under valgrind: what is wrong with them is found as without EDM."""

import json
import re
import shutil
import subprocess

import pytest
from conftest import PROGRAMS

pytestmark = [pytest.mark.uffd, pytest.mark.timeout(120)]

COMPILERS = ("gcc", pytest.param("clang", marks=pytest.mark.soak))
RUN = ("--transport", "inproc", "--store", "memory")
MISTAKES = {"address": ("freed", "heap-use-after-free"), "thread": ("raced", "data race")}


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory):
    """programs/checked.c built by a compiler with a sanitizer: `sanitized("gcc", "address")`."""
    directory = tmp_path_factory.mktemp("sanitized")

    def build(compiler, sanitizer):
        target = directory / f"{compiler}-{sanitizer}"
        if not shutil.which(compiler):
            pytest.skip(f"{compiler} is not installed")
        command = (compiler, "-O1", "-g", "-pthread", f"-fsanitize={sanitizer}", PROGRAMS / "checked.c", "-o", target)
        built = subprocess.run(command, capture_output=True, text=True, timeout=60)
        if built.returncode:
            pytest.skip(f"{compiler} has no {sanitizer} sanitizer here: {built.stderr[-200:]}")
        return target

    return build


def found(err):
    """What a sanitizer says is wrong, and where, without what is another at each run."""
    return sorted(re.findall(r"SUMMARY: .*", err))


@pytest.mark.parametrize("compiler", COMPILERS)
@pytest.mark.parametrize("sanitizer", MISTAKES)
def test_a_sanitizer_finds_what_it_finds_without_edm(edm, sanitized, tmp_path, compiler, sanitizer):
    program, report = sanitized(compiler, sanitizer), tmp_path / "r.json"
    mistake, name = MISTAKES[sanitizer]
    plain = subprocess.run([program, mistake], capture_output=True, text=True, timeout=60)
    assert name in "".join(found(plain.stderr))
    ran = edm.run(*RUN, "--local-memory", "6M", "--report", report, "--", program, mistake)
    assert (ran.status, ran.out.decode(), found(ran.err)) == (plain.returncode, plain.stdout, found(plain.stderr))
    assert "edm:" not in ran.err
    counters = json.loads(report.read_text())["counters"]
    assert counters["evictions"] > 500
    assert counters["internal_errors"] == counters["lost"] == counters["sidecars_lost"] == 0


def test_a_program_with_a_clone_of_its_own_is_captured_all_the_same(edm, program, tmp_path):
    report = tmp_path / "r.json"
    ran = edm.run(*RUN, "--local-memory", "1M", "--report", report, "--", program("replaced"))
    assert (ran.status, ran.out, ran.err) == (0, b"as it should be\n", "")
    assert json.loads(report.read_text())["counters"]["processes"] == 1


def test_a_program_under_valgrind_is_left_alone(edm, program):
    if not shutil.which("valgrind"):
        pytest.skip("valgrind is not installed: make programs")
    command = ("valgrind", "--error-exitcode=3", program("checked"), "freed")
    plain = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert (plain.returncode, "Invalid read" in plain.stderr) == (3, True)
    ran = edm.run(*RUN, "--local-memory", "16M", "--", *command, timeout=110)
    said = re.sub(r"edm: warning: process .*\n", "", ran.err)  # where it is there for 4 s
    said, expected = (re.sub(r"==\d+==|0x[0-9a-fA-F]+", "", err) for err in (said, plain.stderr))
    assert (ran.status, ran.out.decode(), said) == (3, plain.stdout, expected)
