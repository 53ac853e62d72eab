"""What idle_cpus = auto comes to on machines of other kinds."""

import pytest

from edm.errors import UsageError
from edm.idle_cpus import DEVICE, IdleCpus, IdleWay, idle_cpus

SLEEP, OCCUPY, POLL, SHALLOW = (
    IdleCpus(IdleWay.SLEEP),
    IdleCpus(IdleWay.OCCUPY),
    IdleCpus(IdleWay.AWAKE, 0),
    IdleCpus(IdleWay.AWAKE, 2),
)


@pytest.fixture
def machine(tmp_path):
    def make(driver, *, device=True, quota=False):
        (tmp_path / "proc/self").mkdir(parents=True)
        (tmp_path / "proc/self/mountinfo").write_text(
            "26 1 0:23 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw\n"
        )
        (tmp_path / "proc/self/cgroup").write_text("0::/one\n")
        (tmp_path / "sys/fs/cgroup/one").mkdir(parents=True)
        (tmp_path / "sys/fs/cgroup/one/cpu.max").write_text("150000 100000\n" if quota else "max 100000\n")
        if driver:
            (tmp_path / "sys/devices/system/cpu/cpuidle").mkdir(parents=True)
            (tmp_path / "sys/devices/system/cpu/cpuidle/current_driver").write_text(driver + "\n")
        if device:
            (tmp_path / DEVICE).parent.mkdir()
            (tmp_path / DEVICE).touch()
        return tmp_path

    return make


@pytest.mark.parametrize(
    ("driver", "cpus", "what", "expected"),
    [
        ("haltpoll", 2, {}, POLL),
        ("haltpoll", 2, {"quota": True}, POLL),  # polling is the kernel's time
        ("haltpoll", 2, {"device": False}, OCCUPY),
        ("haltpoll", 17, {}, SLEEP),
        ("haltpoll", 1, {}, SLEEP),
        ("intel_idle", 128, {}, SHALLOW),
        ("intel_idle", 128, {"device": False}, SLEEP),
        ("none", 4, {}, OCCUPY),
        ("", 4, {}, OCCUPY),
        ("", 4, {"quota": True}, SLEEP),
        ("", 5, {}, SLEEP),
    ],
)
def test_auto_is_the_first_way_that_fits_the_machine(machine, driver, cpus, what, expected):
    assert idle_cpus("auto", cpus=cpus, root=machine(driver, **what)) == expected


def test_nothing_is_occupied_for_fault_threads_that_somebody_placed(machine):
    root = machine("haltpoll", device=False)
    assert idle_cpus("auto", cpus=2, root=root, placed=True) == SLEEP


def test_what_is_asked_for_is_done_whatever_the_machine(machine):
    root = machine("haltpoll", quota=True)
    assert idle_cpus("occupy", cpus=64, root=root) == OCCUPY
    assert idle_cpus("awake", cpus=64, root=root) == POLL
    assert idle_cpus("sleep", cpus=2, root=root) == SLEEP


def test_to_keep_cpus_awake_without_the_right_to_it_is_an_error(machine):
    with pytest.raises(UsageError, match="idle_cpus = awake: this process may not write to /dev/cpu_dma_latency"):
        idle_cpus("awake", cpus=2, root=machine("haltpoll", device=False))
