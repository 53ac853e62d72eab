import pytest

from edm.handler.uncaptured import Uncaptured

SMAPS = """\
7f0000000000-7f0004000000 rw-s 00000000 00:01 1025                       /dev/zero (deleted)
Size:              65536 kB
Rss:               {shared} kB
VmFlags: rd wr sh mr mw me ms sd
7f0010000000-7f0010020000 rw-s 00000000 00:01 2052                       /memfd:edm-ctl (deleted)
Rss:                 128 kB
7f0020000000-7f0021000000 rw-s 00000000 00:01 3                          /SYSV00000000 (deleted)
Rss:               16384 kB
7f0030000000-7f0031000000 rw-s 00000000 00:16 4                          /dev/shm/some name
Rss:                1024 kB
7f0040000000-7f0041000000 rw-s 00000000 00:0f 5                          /anon_hugepage (deleted)
Rss:                   0 kB
Shared_Hugetlb:        0 kB
Private_Hugetlb:    2048 kB
7f0050000000-7f0051000000 rw-s 00000000 fe:01 6                          /var/lib/a.db
Rss:               16384 kB
7f0060000000-7f0061000000 rw-p 00000000 00:00 0
Rss:               16384 kB
"""


@pytest.fixture
def process(tmp_path):
    """A made-up process 7 with so many KiB of shared anonymous memory, and others of other kinds."""

    def have(shared_kib):
        (tmp_path / "7").mkdir(exist_ok=True)
        total = shared_kib + 128 + 16384 + 1024
        (tmp_path / "7/status").write_text(f"Name:\tx\nRssShmem:\t{total} kB\nHugetlbPages:\t2048 kB\n")
        (tmp_path / "7/smaps").write_text(SMAPS.format(shared=shared_kib))

    return have


def test_shared_memory_is_told_by_kind_and_files_on_disk_and_our_own_are_not(tmp_path, process):
    process(65536)
    uncaptured = Uncaptured(None, tmp_path)
    assert uncaptured.look([7, 8]) == (
        "a process has 83M of shared memory (MAP_SHARED|MAP_ANONYMOUS 64M, System V 16M, huge pages 2M, tmpfs 1M), "
        "which is not captured: it stays here, above the budget"
    )
    assert uncaptured.peak == {
        "MAP_SHARED|MAP_ANONYMOUS": 64 << 20,
        "System V": 16 << 20,
        "tmpfs": 1 << 20,
        "huge pages": 2 << 20,
    }


def test_it_is_warned_of_once(tmp_path, process):
    process(65536)
    uncaptured = Uncaptured(None, tmp_path)
    assert uncaptured.look([7])
    process(262144)
    assert not uncaptured.look([7])
    assert uncaptured.peak["MAP_SHARED|MAP_ANONYMOUS"] == 256 << 20
    process(1024)
    assert not uncaptured.look([7])
    assert uncaptured.peak["MAP_SHARED|MAP_ANONYMOUS"] == 256 << 20


def test_a_small_part_of_the_budget_is_told_and_not_warned_of(tmp_path, process):
    process(16384)
    uncaptured = Uncaptured(1 << 30, tmp_path)
    assert not uncaptured.look([7])
    assert uncaptured.peak["System V"] == 16 << 20


def test_little_is_not_looked_at(tmp_path):
    (tmp_path / "7").mkdir()
    (tmp_path / "7/status").write_text("RssShmem:\t9000 kB\n")
    uncaptured = Uncaptured(None, tmp_path)
    assert not uncaptured.look([7])
    assert not uncaptured.peak
