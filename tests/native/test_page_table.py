"""The LSPT of a real process, looked at from outside."""

import os
import struct
import subprocess
import sys
import threading
import time

import pytest

from edm._native import lib
from edm.config.settings import HandlerSettings
from edm.errors import NativeError
from edm.plugins.source_uffd import UffdOptions
from edm.plugins.source_uffd.source import UffdSource
from edm.types import RunContext

pytestmark = [
    pytest.mark.uffd,
    pytest.mark.skipif(lib.edm_uffd_check() != 0, reason=f"userfaultfd: {os.strerror(-lib.edm_uffd_check())}"),
]

PROGRAM = """
import ctypes, mmap, sys
block = mmap.mmap(-1, 8 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
for at in range(0, 4 << 20, 4096):
    block[at] = 1
print(ctypes.addressof(ctypes.c_char.from_buffer(block)), flush=True)
sys.stdin.read()
"""


def frame_number(pid, page):
    with open(f"/proc/{pid}/pagemap", "rb") as file:
        file.seek(page * 8)
        entry = struct.unpack("<Q", file.read(8))[0]
    return entry & ((1 << 55) - 1) if entry >> 63 else 0


@pytest.fixture
def captured(tmp_path):
    """Yield (source, pid, page): a source without a budget, and a program with touched memory from `page` on."""
    source = UffdSource(UffdOptions(), HandlerSettings(sweep_ms=1.0), RunContext(tmp_path, tmp_path, "dm-handler"))
    source.start(1)
    worker = threading.Thread(target=lambda: [None for _ in iter(lambda: source.poll_faults(0, 50_000), -1)])
    worker.start()
    program = subprocess.Popen(
        [sys.executable, "-c", PROGRAM],
        env=source.prepare(dict(os.environ)),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    try:
        yield source, program.pid, int(program.stdout.readline()) // 4096 + 16
    finally:
        program.communicate(timeout=60)
        source.stop()
        worker.join(60)
        source.close()


def test_touched_page_is_resident_with_the_frame_number_the_kernel_has(captured):
    source, pid, page = captured
    end = time.monotonic() + 60  # a page touched before its mapping was seen joins at the next sweep
    while (state := source.page_state(pid, page))["state"] != lib.EDM_PAGE_RESIDENT and time.monotonic() < end:
        time.sleep(0.01)
    assert state == {"state": lib.EDM_PAGE_RESIDENT, "clean": 0, "version": 0, "pfn": frame_number(pid, page)}
    if os.geteuid() == 0:
        assert state["pfn"] > 0


def test_untouched_page_is_new(captured):
    source, pid, page = captured
    assert source.page_state(pid, page + (6 << 20) // 4096)["state"] == lib.EDM_PAGE_NEW


def test_unknown_process_is_an_error(captured):
    source, _, page = captured
    with pytest.raises(NativeError, match="No such process"):
        source.page_state(1, page)
