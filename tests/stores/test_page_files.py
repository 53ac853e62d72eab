"""The layout of page files."""

import os

import pytest

from edm._native import ffi, lib
from edm.errors import UsageError
from edm.plugins.store_file.pages import FilePages
from edm.testing.pages import batch_of
from edm.types import PAGE_BYTES


@pytest.mark.parametrize("segment_pages", [64, 1024, 16320, 16384, 65536])
def test_pages_begin_behind_all_checksums_at_a_multiple_of_a_batch(tmp_path, segment_pages):
    files = FilePages(tmp_path, segment_pages=segment_pages)
    first, last = files.offset(0), files.offset(segment_pages - 1)
    assert first % (64 * PAGE_BYTES) == 0
    sums_end = PAGE_BYTES + 4 * segment_pages
    assert sums_end <= first < sums_end + 64 * PAGE_BYTES
    assert last == first + (segment_pages - 1) * PAGE_BYTES
    assert files.offset(segment_pages) == first
    refs, data = batch_of(1, range(64), 1)
    slots = files.put(memoryview(data), refs["checksum"].copy())
    file = files.where(int(slots[5]))
    assert file.stat().st_size == last + PAGE_BYTES
    with file.open("rb") as content:
        found = os.pread(content.fileno(), PAGE_BYTES, files.offset(int(slots[5])))
        assert found == data[5 * PAGE_BYTES : 6 * PAGE_BYTES]
        stored = os.pread(content.fileno(), 4, PAGE_BYTES + 4 * (int(slots[5]) % segment_pages))
    assert int.from_bytes(stored, "little") == lib.edm_crc32c(ffi.from_buffer(found), PAGE_BYTES)
    files.close()


def test_page_files_of_an_older_layout_are_refused_in_one_line(tmp_path):
    FilePages(tmp_path, segment_pages=64).close()
    text = "edm page files 2\nsegment_pages 64\n"
    body = text.encode()
    (tmp_path / "FORMAT").write_text(f"{text}checksum {lib.edm_crc32c(ffi.from_buffer(body), len(body)):08x}\n")
    with pytest.raises(UsageError) as refused:
        FilePages(tmp_path, segment_pages=64)
    assert str(refused.value) == f"{tmp_path} has format 2, this EDM reads and writes format 3"
