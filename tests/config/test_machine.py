import os

import pytest

from edm.config.machine import memory_bytes

MACHINE = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


@pytest.fixture
def root(tmp_path):
    """A made-up / with the given files."""

    def write(**files):
        for path, text in files.items():
            file = tmp_path / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)
        return tmp_path

    return write


def test_without_cgroups_it_is_the_machines_memory(tmp_path):
    assert memory_bytes(tmp_path) == MACHINE


def test_smallest_limit_on_the_way_up_counts(root):
    files = {
        "proc/self/cgroup": "0::/a/b\n",
        "sys/fs/cgroup/a/memory.max": f"{64 << 20}\n",
        "sys/fs/cgroup/a/b/memory.max": "max\n",
    }
    assert memory_bytes(root(**files)) == 64 << 20


def test_limit_of_a_container_whose_path_is_the_hosts_counts(root):
    files = {"proc/self/cgroup": "0::/docker/0123\n", "sys/fs/cgroup/memory.max": f"{32 << 20}\n"}
    assert memory_bytes(root(**files)) == 32 << 20


def test_first_version_of_cgroups_is_read_too(root):
    files = {
        "proc/self/cgroup": "4:cpu:/x\n3:memory:/x\n",
        "sys/fs/cgroup/memory/x/memory.limit_in_bytes": f"{16 << 20}\n",
    }
    assert memory_bytes(root(**files)) == 16 << 20


def test_limit_larger_than_the_machine_is_no_limit(root):
    files = {"proc/self/cgroup": "3:memory:/\n", "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n"}
    assert memory_bytes(root(**files)) == MACHINE


def test_this_machine_has_memory():
    assert 0 < memory_bytes() <= MACHINE
