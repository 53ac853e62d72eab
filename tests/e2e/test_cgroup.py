"""A cgroup with a limit: the budget follows it, the run says so, and the kernel does not end the program."""

import json
import os
import sys
from pathlib import Path

import pytest
import test_deaths
from watching import wait_for
from working import CAPTURED

from edm.config.machine import MemoryLimit

pytestmark = [pytest.mark.uffd, pytest.mark.timeout(120)]

LIMIT = 384 << 20
PLACES = (("/sys/fs/cgroup/memory", "memory.limit_in_bytes"), ("/sys/fs/cgroup", "memory.max"))
TOUCH = (
    CAPTURED
    + """
import mmap, sys
count, size = int(sys.argv[1]), 1 << 20
data = mmap.mmap(-1, count * size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
wait_until_captured(len(data))  # what is touched before is above the budget
for n in range(count):
    data[n * size : (n + 1) * size] = bytes([n % 251]) * size
assert all(data[n * size : (n + 1) * size].count(n % 251) == size for n in range(count))
print(count)
"""
)


@pytest.fixture
def cgroup():
    """A group of LIMIT bytes, by the file that limits it; or the test is skipped."""
    for top, name in PLACES:
        group = Path(top, f"edm-test-{os.getpid()}")
        try:
            group.mkdir()
        except OSError as error:
            why = f"no cgroup can be made here: {error.strerror}: {group}"
            continue
        try:
            (group / name).write_text(str(LIMIT))
            break
        except OSError as error:
            why = f"no memory controller for a cgroup here: {error.strerror}: {group / name}"
            group.rmdir()
    else:
        pytest.skip(why)
    yield group / name
    wait_for(lambda: removed(group))


def removed(group):
    try:
        group.rmdir()
    except OSError:  # the last process in it is still going
        return False
    return True


@pytest.fixture
def inside(edm, cgroup):
    """`edm run ARGUMENTS` by a shell that is in the group."""

    def run(*arguments):
        report = edm.directory / "report.json"
        edm.environment["GROUP"] = str(cgroup.parent / "cgroup.procs")
        done = edm.run("--report", report, *arguments, wrapper=("sh", "-c", 'echo $$ > "$GROUP"; exec "$@"', "sh"))
        return done, json.loads(report.read_text())

    return run


def test_the_budget_is_what_the_cgroup_leaves_and_is_said(inside, cgroup):
    done, report = inside("--", sys.executable, "-c", TOUCH, "440")
    limit = MemoryLimit(LIMIT, cgroup)
    assert (done.status, done.out) == (0, b"440\n"), done.err
    assert report["local_memory_bytes"] == limit.budget()
    assert report["memory_limit"] == {"bytes": LIMIT, "cgroup_file": str(cgroup), "decided": True}
    assert report["counters"]["evictions"] > 0
    assert report["counters"]["peak_resident"] * 4096 <= 1.1 * limit.budget()
    assert done.err == f"edm: local memory: 192M of the 384M that this cgroup allows ({cgroup})\n"


def test_a_budget_above_the_cgroups_limit_is_warned_of_in_one_line(inside, cgroup):
    done, report = inside("--local-memory", "1G", "--transport", "inproc", "--", sys.executable, "-c", TOUCH, "1")
    assert (done.status, done.out, report["local_memory_bytes"]) == (0, b"1\n", 1 << 30)
    assert done.err == (
        f"edm: warning: local memory of 1G is more than the 384M that this cgroup allows ({cgroup}): "
        "the kernel may end the program; '--local-memory auto' takes 192M\n"
    )


@pytest.mark.soak
@pytest.mark.parametrize("transport", ["inproc", "zmq"])
def test_a_dm_handler_that_the_kernel_ends_for_want_of_memory_is_replaced(edm, cgroup, working, transport):
    run = working("--transport", transport, "--local-memory", "8M", megabytes=64)
    (handler, _) = test_deaths.wait_for(run.process.pid, "edm: dm-handler", "edm: sidecar")
    cgroup.write_text(str(256 << 10))
    (cgroup.parent / "cgroup.procs").write_text(str(handler))
    out, err = run.finish()
    assert (run.process.returncode, out) == (0, run.alone()), err
    assert b"the DM-Handler has died; starting another" in err
    assert killed_for_memory(cgroup.parent) == 1
    assert edm.left_behind() == ({}, [])


def killed_for_memory(group):
    """How many processes of a group the kernel has killed. Source: cgroup-v2.rst, memory.events; v1's oom_control."""
    for name in ("memory.events", "memory.oom_control"):
        if (group / name).exists():
            return int(dict(line.split() for line in (group / name).read_text().splitlines())["oom_kill"])
    return 0
