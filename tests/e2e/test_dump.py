"""`edm dump`: every page of a running program, wherever it is, in a file that gdb opens; and the program goes on."""

import json
import os
import resource
import shutil
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest
from patterned import MAGIC, MIB, Core, Raw, check_contents, pattern, start, start_captured, states
from watching import wait_for
from working import WAIT_S

from edm._native import lib
from edm.dump import dump as write_dump
from edm.errors import UsageError

pytestmark = [pytest.mark.uffd, pytest.mark.timeout(120)]


@pytest.fixture(scope="module")
def runner(make_edm, tmp_path_factory):
    runner = make_edm(tmp_path_factory.mktemp("edm"))
    yield runner
    runner.close()


@pytest.fixture(scope="module")
def running(runner, program):
    """One program for all tests that are to leave it as it was."""
    running = start_captured(runner, program, "--transport", "inproc", "--store", "memory")
    yield running
    assert running.end() == (b"as it was written\n", b"")
    assert running.edm.returncode == 0
    assert runner.left_behind() == ({}, [])


@pytest.fixture
def where(tmp_path):
    """An empty directory."""
    (tmp_path / "where").mkdir()
    return tmp_path / "where"


@pytest.fixture
def plain(program):
    """The program without EDM."""
    process = start(
        [program("patterned"), str(MIB)],
        lambda words: subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE),
    )
    yield process
    process.edm.kill()
    process.edm.communicate()


def dump(edm, pid, path, *options, **keywords):
    ran = edm("dump", pid, "-o", path, "--json", *options, **keywords)
    assert ran.status == 0, ran.err
    return json.loads(ran.out), ran.err


def test_dump_holds_every_page_also_those_that_are_away(runner, running, where):
    done, err = dump(runner, running.pid, where / "core")
    assert err == ""
    assert (done["pid"], done["captured"], done["threads"], done["unreadable"]) == (running.pid, True, 3, [])
    assert done["brought_pages"] > (MIB << 8) / 2
    check_contents(Core(where / "core"), running.place)
    assert os.stat(where / "core").st_blocks * 512 < 3 * MIB << 20, "what nobody has touched takes room"
    assert os.listdir(where) == ["core"]


def test_notes_tell_of_every_thread_and_file(runner, running, program, where):
    dump(runner, running.pid, where / "core")
    notes = Core(where / "core").notes
    tids = [struct.unpack_from("i", note["n_desc"], 32)[0] for note in notes if note["n_type"] == "NT_PRSTATUS"]
    assert set(tids) == set(map(int, os.listdir(f"/proc/{running.pid}/task")))
    assert tids[0] == running.pid
    (info,) = (note["n_desc"] for note in notes if note["n_type"] == "NT_PRPSINFO")
    assert info["pr_fname"].startswith(b"patterned")
    assert info["pr_psargs"].startswith(f"{program('patterned')} {MIB}".encode()[:70])
    (files,) = (note["n_desc"] for note in notes if note["n_type"] == "NT_FILE")
    assert str(program("patterned")).encode() in files["filename"]


def test_gdb_opens_the_core(runner, running, program, where):
    if not shutil.which("gdb"):
        pytest.skip("gdb is not installed: make programs")
    dump(runner, running.pid, where / "core")
    wanted = [f"x/gx place.start + {page} * 512" for page in range(0, MIB << 8, 256)]
    commands = ["bt", "p place.magic", "x/gx place.closed", "info threads", *wanted]
    told = subprocess.run(
        ["gdb", "-batch", "-nx", *(w for c in commands for w in ("-ex", c)), program("patterned"), where / "core"],
        capture_output=True, text=True, timeout=WAIT_S, env={**os.environ, "DEBUGINFOD_URLS": ""},
    )  # fmt: skip
    assert "wait_for_the_end" in told.stdout
    assert str(MAGIC) in told.stdout
    words = pattern(MIB << 8)[:: 512 * 256].tolist()
    for word in words:
        assert f"{word:#018x}" in told.stdout
    assert told.stdout.count("LWP") >= 3
    assert "annot access" not in told.stdout + told.stderr


def test_raw_image_and_its_index(runner, running, where):
    done, _ = dump(runner, running.pid, where / "image", "--format", "raw", "--no-files")
    assert done["format"] == "raw"
    check_contents(Raw(where / "image"), running.place)
    index = json.loads((where / "image.json").read_text())
    assert sum(entry["bytes"] for entry in index) == done["memory_bytes"] == os.stat(where / "image").st_size
    assert not [entry for entry in index if entry["name"].endswith(".so.6") and "x" in entry["protection"]]


@pytest.mark.soak
def test_dump_waits_for_the_next_dm_handler(edm, program, where):
    running = start_captured(edm, program, "--transport", "zmq", "--store", "memory")
    (handler,) = edm.pids(["edm: dm-handler"])
    os.kill(handler, signal.SIGSTOP)
    dumping = edm.start("dump", running.pid, "-o", where / "core", "--json")
    wait_for(lambda: os.listdir(where))
    os.kill(handler, signal.SIGKILL)
    out, err = dumping.communicate(timeout=WAIT_S)
    assert (dumping.returncode, err) == (0, b""), out
    check_contents(Core(where / "core"), running.place)
    assert running.end()[0] == b"as it was written\n"


def test_interrupt_leaves_the_program_running_and_no_file(runner, running, where):
    (handler,) = runner.pids(["edm: dm-handler"])
    os.kill(handler, signal.SIGSTOP)  # so that it takes as long as we like
    try:
        dumping = runner.start("dump", running.pid, "-o", where / "core")
        wait_for(lambda: states(running.pid) == {"t"})
        dumping.send_signal(signal.SIGINT)
        assert dumping.wait(WAIT_S) == 130
    finally:
        os.kill(handler, signal.SIGCONT)
    assert os.listdir(where) == []
    assert states(running.pid) <= {"S", "R", "D"}


def test_full_disk_leaves_no_file_and_the_program_running(runner, running, where):
    limited = ("sh", "-c", 'ulimit -f 2048; exec "$@"', "sh")  # blocks of 512 bytes
    dumping = runner.start("dump", running.pid, "-o", where / "core", "--no-files", wrapper=limited)
    _, err = dumping.communicate(timeout=WAIT_S)
    assert dumping.returncode == 1
    assert b"File too large; nothing is kept of it" in err
    assert os.listdir(where) == []
    assert states(running.pid) <= {"S", "R", "D"}


@pytest.mark.soak
def test_kernel_core_has_zeros_where_pages_were_away(edm, program, where):
    pattern_of_names = Path("/proc/sys/kernel/core_pattern").read_text().strip()
    if pattern_of_names.startswith(("|", "/", "@")):
        pytest.skip(f"the kernel writes cores elsewhere: {pattern_of_names}")
    running = start_captured(edm, program, "--transport", "inproc", "--store", "memory", cwd=where)
    resource.prlimit(running.pid, resource.RLIMIT_CORE, (1 << 30, 1 << 30))
    os.kill(running.pid, signal.SIGABRT)
    running.edm.communicate(timeout=WAIT_S)
    assert running.edm.returncode == 128 + signal.SIGABRT  # as the shell says it
    (name,) = os.listdir(where)
    core = Core(where / name)
    _, pages, first, _, _ = core.words(running.place, 5).tolist()
    found = core.words(first, pages * 512).reshape(pages, 512)
    expected = pattern(pages).reshape(pages, 512)
    right, zeros = (found == expected).all(axis=1), (found == 0).all(axis=1)
    assert (right | zeros).all()
    assert right.any()
    assert zeros.sum() > pages / 2
    assert edm.left_behind() == ({}, [])


def test_program_that_is_not_captured_is_dumped_all_the_same(edm, plain, where):
    done, err = dump(edm, plain.pid, where / "core")
    assert "is not captured" in err
    assert (done["captured"], done["brought_pages"]) == (False, 0)
    check_contents(Core(where / "core"), plain.place)
    assert plain.end() == (b"as it was written\n", b"")


RESERVES = """
import mmap, sys
kept = mmap.mmap(-1, 1 << 45, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000, prot=0)
print("ready", flush=True)
sys.stdin.read()
"""


def test_addresses_that_are_only_reserved_take_no_part_of_the_file(where):
    with subprocess.Popen([sys.executable, "-c", RESERVES], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"ready\n"
        done = write_dump(process.pid, where / "core")
        process.communicate()
    assert done.left_out_bytes >= 1 << 45
    assert done.unreadable == []
    assert os.stat(where / "core").st_size < 1 << 36


def test_lost_pages_are_counted_and_given_back_ones_are_not(edm, program, where):
    with subprocess.Popen([program("poisoned")], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        line = process.stdout.readline().split()
        if line[0] != b"ready":
            pytest.skip("the kernel has no UFFDIO_POISON")
        ran = edm("dump", process.pid, "-o", where / "core", "--json")
        process.communicate()
    assert ran.status == 1
    assert "1 page(s) are lost and zeros in the file" in ran.err
    assert json.loads(ran.out)["unreadable"] == [int(line[1], 16)]


def test_mistakes_are_one_line(edm, plain, where):
    (where / "there").write_text("kept")
    ran = edm("dump", plain.pid, "-o", where / "there")
    assert (ran.status, ran.err) == (2, f"edm: {where}/there exists: give another -o FILE, or --force\n")
    thread = max(map(int, os.listdir(f"/proc/{plain.pid}/task")))
    for pid, path, expected in [
        (plain.pid, where / "no" / "such", "No such file or directory"),
        (4_194_303, where / "core", "there is no process 4194303"),
        (thread, where / "core", f"{thread} is a thread of process {plain.pid}"),
    ]:
        with pytest.raises(UsageError, match=expected):
            write_dump(pid, path)
    assert os.listdir(where) == ["there"]
    assert (where / "there").read_text() == "kept"


def test_program_that_is_traced_already_is_refused(edm, plain, where):
    assert lib.edm_thread_stop(plain.pid, 1000) >= 0
    try:
        ran = edm("dump", plain.pid, "-o", where / "core")
    finally:
        lib.edm_thread_let_go(plain.pid, 0)
    assert ran.status == 2
    assert f"is traced by {Path('/proc/self/comm').read_text().strip()} (process {os.getpid()})" in ran.err
    assert os.listdir(where) == []


def test_program_that_was_stopped_stays_stopped(edm, plain, where):
    os.kill(plain.pid, signal.SIGSTOP)
    wait_for(lambda: states(plain.pid) == {"T"})
    dump(edm, plain.pid, where / "core")
    time.sleep(0.05)
    assert states(plain.pid) == {"T"}
    os.kill(plain.pid, signal.SIGCONT)
    assert plain.end() == (b"as it was written\n", b"")
