import os
from pathlib import Path

import pytest

from edm.config.machine import MemoryLimit, cpu_quota, memory_limit

MACHINE = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
V2 = "30 23 0:26 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate"
V1 = "35 31 0:32 / /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory"
V1_CPU = "32 31 0:29 / /sys/fs/cgroup/cpu rw,relatime - cgroup cgroup rw,cpu"


@pytest.fixture
def limit(tmp_path):
    """The limit under a made-up / with these groups, mounts, and limits by their files' paths."""

    def read(groups, mounts, **files):
        texts = {"proc/self/cgroup": f"{groups}\n", "proc/self/mountinfo": "\n".join(mounts) + "\n", **files}
        for path, text in texts.items():
            file = tmp_path / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(str(text))
        return memory_limit(tmp_path)

    return read


def test_without_cgroups_it_is_the_machines_memory(tmp_path):
    assert memory_limit(tmp_path) == MemoryLimit(MACHINE, None)


def test_smallest_limit_on_the_way_up_counts(limit):
    files = {"sys/fs/cgroup/a/memory.max": f"{64 << 20}\n", "sys/fs/cgroup/a/b/memory.max": "max\n"}
    assert limit("0::/a/b", [V2], **files) == MemoryLimit(64 << 20, Path("/sys/fs/cgroup/a/memory.max"))


def test_throttling_counts_as_a_limit(limit):
    files = {"sys/fs/cgroup/a/memory.max": 64 << 20, "sys/fs/cgroup/a/memory.high": 48 << 20}
    assert limit("0::/a", [V2], **files) == MemoryLimit(48 << 20, Path("/sys/fs/cgroup/a/memory.high"))


def test_a_neighbour_has_no_say(limit):
    files = {"sys/fs/cgroup/a/memory.max": 64 << 20, "sys/fs/cgroup/ab/memory.max": 32 << 20}
    assert limit("0::/a", [V2], **files).bytes == 64 << 20


@pytest.mark.parametrize("group", ["/docker/0123", "/../../docker/0123"])
def test_limit_of_a_container_whose_path_is_the_hosts_counts(limit, group):
    assert limit(f"0::{group}", [V2], **{"sys/fs/cgroup/memory.max": f"{32 << 20}\n"}).bytes == 32 << 20


def test_a_part_of_the_hierarchy_may_be_mounted(limit):
    mount = V2.replace(" / /sys", " /docker/0123 /sys")
    files = {"sys/fs/cgroup/memory.max": 128 << 20, "sys/fs/cgroup/job/memory.max": 64 << 20}
    assert limit("0::/docker/0123/job", [mount], **files).bytes == 64 << 20
    assert limit("0::/docker/0123", [mount], **files).bytes == 128 << 20


def test_second_version_counts_wherever_it_is_mounted(limit):
    unified = V2.replace("/sys/fs/cgroup", "/sys/fs/cgroup/unified")
    spaced = V2.replace("/sys/fs/cgroup", "/mnt/my\\040groups")
    files = {"sys/fs/cgroup/unified/a/memory.max": 64 << 20, "mnt/my groups/a/memory.max": 32 << 20}
    assert limit("0::/a", [unified], **files).bytes == 64 << 20
    assert limit("0::/a", [unified, spaced], **files) == MemoryLimit(32 << 20, Path("/mnt/my groups/a/memory.max"))


def test_first_version_counts_too_and_its_other_controllers_do_not(limit):
    files = {
        "sys/fs/cgroup/memory/x/memory.limit_in_bytes": 16 << 20,
        "sys/fs/cgroup/cpu/y/memory.limit_in_bytes": 8 << 20,
    }
    assert limit("4:cpu:/y\n3:memory:/x\n0::/z", [V1_CPU, V1, V2], **files).bytes == 16 << 20


def test_limit_larger_than_the_machine_is_no_limit(limit):
    files = {"sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n"}
    assert limit("3:memory:/", [V1], **files) == MemoryLimit(MACHINE, None)


def test_this_machine_has_memory():
    assert 0 < memory_limit().bytes <= MACHINE


def test_the_default_budget_leaves_room_for_what_stays_and_for_edm():
    assert MemoryLimit(10 << 30).budget() == 8 << 30
    assert MemoryLimit(512 << 20).budget() == 256 << 20
    assert MemoryLimit(100 << 20).budget() == 50 << 20


@pytest.mark.parametrize(
    ("groups", "mount", "file", "text", "limited"),
    [
        ("0::/a/b", V2, "sys/fs/cgroup/a/cpu.max", "50000 100000", True),
        ("0::/a/b", V2, "sys/fs/cgroup/a/cpu.max", "max 100000", False),
        ("0::/a", V2, "sys/fs/cgroup/ab/cpu.max", "50000 100000", False),
        ("4:cpu,cpuacct:/a", V1_CPU, "sys/fs/cgroup/cpu/a/cpu.cfs_quota_us", "50000", True),
        ("4:cpu,cpuacct:/a", V1_CPU, "sys/fs/cgroup/cpu/a/cpu.cfs_quota_us", "-1", False),
        ("4:memory:/a", V1, "sys/fs/cgroup/memory/a/cpu.cfs_quota_us", "50000", False),
    ],
)
def test_quota_of_cpu_time_is_found_on_the_way_up(tmp_path, limit, groups, mount, file, text, limited):
    limit(groups, [mount], **{file: text})
    assert cpu_quota(tmp_path) == (Path("/", file) if limited else None)
