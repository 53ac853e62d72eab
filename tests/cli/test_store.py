"""`edm store`: what is in a store's directory."""

import json

import numpy as np
import pytest
from click.testing import CliRunner

from edm.cli.store import command
from edm.dms.server import MemoryServer
from edm.errors import Corrupt, StoreError, StoreLocked, UsageError
from edm.testing.pages import batch_of
from edm.testing.stores import open_store
from edm.types import PAGE_BYTES

REGION = (3 << 32) + 5


@pytest.fixture(params=[("file", "file"), ("lmdb", "lmdb"), ("file", "lmdb"), ("lmdb", "file")], ids="-".join)
def store(request, tmp_path):
    """A store with 30 pages in three gaps, as `edm dms --path` leaves it; its pages by number."""
    spt, pages = request.param
    path = tmp_path / "store"
    path.mkdir()
    server = MemoryServer(open_store("spt_store", spt, path, {}), open_store("page_store", pages, path, {}))
    indices = [*range(100, 110), *range(120, 130), *range(500, 510)]
    refs, data = batch_of(REGION, indices, 1)
    assert server.evict(3, refs, memoryview(data)) == ""
    server.close()
    return tmp_path, {index: bytes(data[i * PAGE_BYTES : (i + 1) * PAGE_BYTES]) for i, index in enumerate(indices)}


def run(*arguments):
    return CliRunner().invoke(command, list(map(str, arguments)), standalone_mode=False, catch_exceptions=False)


def test_list_shows_each_region(store):
    path, _ = store
    (region,) = json.loads(run("list", "--json", path).stdout)
    assert region == {"instance": 3, "region": REGION, "pages": 30, "bytes": 30 * PAGE_BYTES}
    assert hex(REGION) in run("list", path).stdout


def test_stat_counts_pages(store):
    path, _ = store
    figures = json.loads(run("stat", "--json", path).stdout)
    assert [part["pages"] for part in figures.values() if isinstance(part, dict)] == [30, 30]
    assert "page table" in run("stat", path / "store").stdout


def test_verify_of_a_sound_store(store):
    path, _ = store
    result = run("verify", path)
    assert result.return_value == 0
    assert "30 pages, all as they were stored" in result.stdout


def test_export_writes_the_pages_and_what_they_are(store, tmp_path):
    path, pages = store
    output = tmp_path / "out.bin"
    result = run("export", path, hex(REGION), "-o", output)
    assert result.return_value == 0
    assert f"30 pages in {output}" in result.stdout
    about = json.loads((tmp_path / "out.bin.json").read_text())
    assert about["pages"] == [[100, 10], [120, 10], [500, 10]]
    data = output.read_bytes()
    for index, page in pages.items():
        assert data[(index - 100) * PAGE_BYTES : (index - 99) * PAGE_BYTES] == page
    assert len(data) == 410 * PAGE_BYTES


def test_export_leaves_out_a_damaged_page_and_names_it(tmp_path):
    server = MemoryServer(open_store("spt_store", "file", tmp_path, {}), open_store("page_store", "file", tmp_path, {}))
    refs, data = batch_of(REGION, range(5), 1)
    assert server.evict(3, refs, memoryview(data)) == ""
    file, offset = server.pages.where(2), server.pages.offset(2)
    server.close()
    with file.open("r+b") as segment:
        segment.seek(offset)
        segment.write(b"\0" if data[2 * PAGE_BYTES] else b"\1")
    output = tmp_path / "out.bin"
    result = run("export", "--json", tmp_path, hex(REGION), "-o", output)
    assert result.return_value == 1
    figures = json.loads(result.stdout)
    assert (figures["region"], figures["pages"], figures["output"]) == (REGION, 4, str(output))
    assert [(one["page"], one["offset"]) for one in figures["damaged"]] == [(f"{REGION:#x}:0x2", offset)]
    assert output.read_bytes()[2 * PAGE_BYTES : 3 * PAGE_BYTES] == bytes(PAGE_BYTES)
    assert json.loads((tmp_path / "out.bin.json").read_text())["pages"] == [[0, 2], [3, 2]]
    human = run("export", tmp_path, hex(REGION), "-o", output)
    assert human.return_value == 1
    assert f"left out page {REGION:#x}:0x2" in human.stderr


def test_gc_keeps_every_page_and_gives_room_back(tmp_path):
    server = MemoryServer(open_store("spt_store", "file", tmp_path, {}), open_store("page_store", "file", tmp_path, {}))
    refs, data = batch_of(1 << 32, range(512), 1)
    for version in range(1, 5):
        refs["version"] = version
        assert server.evict(1, refs, memoryview(data)) == ""
    server.control(1, {"op": "drop_pages", "ranges": [[1 << 32, 1, 511]], "sequence": 1})
    server.close()
    figures = json.loads(run("gc", "--json", tmp_path).stdout)
    assert figures["before_bytes"] > 4 * 512 * PAGE_BYTES
    assert figures["after_bytes"] < 700_000
    assert run("verify", tmp_path).return_value == 0
    assert np.sum([r["pages"] for r in json.loads(run("list", "--json", tmp_path).stdout)]) == 1


def test_directory_without_a_store_is_one_line(tmp_path):
    with pytest.raises(UsageError, match="holds no store"):
        run("stat", tmp_path)


def test_directory_that_is_not_there_is_one_line(tmp_path):
    with pytest.raises(UsageError, match="x: no such directory"):
        run("verify", tmp_path / "x")


def test_looking_into_an_empty_directory_makes_no_store(tmp_path):
    (tmp_path / "lmdb").mkdir()
    (tmp_path / "spt").mkdir()
    with pytest.raises(UsageError, match="holds no store"):
        run("stat", tmp_path)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


@pytest.mark.parametrize(
    ("name", "gone", "empty"),
    [
        ("file", "spt/*.journal", False),
        ("file", "spt/FORMAT", False),
        ("file", "pages/FORMAT", False),
        ("lmdb", "lmdb/data.mdb", False),
        ("lmdb", "lmdb/data.mdb", True),
        ("lmdb", "lmdb/FORMAT", False),
    ],
)
def test_store_without_one_of_its_files_is_damaged_and_not_empty(tmp_path, name, gone, empty):
    server = MemoryServer(open_store("spt_store", name, tmp_path, {}), open_store("page_store", name, tmp_path, {}))
    refs, data = batch_of(REGION, range(5), 1)
    assert server.evict(3, refs, memoryview(data)) == ""
    server.close()
    (file,) = tmp_path.glob(gone)
    kept = file.read_bytes()
    if empty:
        file.write_bytes(b"")
    else:
        file.unlink()
    for command_name in ("stat", "list", "gc"):
        with pytest.raises(Corrupt, match=rf"{tmp_path}.*see 'edm store verify {tmp_path}'"):
            run(command_name, tmp_path)
    result = run("verify", "--json", tmp_path)
    assert result.return_value == 1
    assert any("missing" in one["reason"] or "empty" in one["reason"] for one in json.loads(result.stdout)["damaged"])
    # Nothing was thrown away meanwhile.
    file.write_bytes(kept)
    assert "5 pages, all as they were stored" in run("verify", tmp_path).stdout


def test_export_that_cannot_be_written_is_one_line(store, tmp_path):
    path, _ = store
    with pytest.raises(StoreError, match="nowhere/x: No such file or directory"):
        run("export", path, hex(REGION), "-o", tmp_path / "nowhere" / "x")
    with pytest.raises(StoreError, match="/dev/full: No space left on device"):
        run("export", path, hex(REGION), "-o", "/dev/full")


def test_unknown_region_is_one_line(store, tmp_path):
    path, _ = store
    with pytest.raises(UsageError, match="has no region 0x7"):
        run("export", path, "7", "-o", tmp_path / "x")


def test_store_in_use_names_directory_and_process(tmp_path):
    open_store("spt_store", "file", tmp_path, {}).close()
    spt = open_store("spt_store", "file", tmp_path, {})
    open_store("page_store", "file", tmp_path, {}).close()
    import os

    with pytest.raises(StoreLocked, match=rf"{tmp_path}/spt is in use by process {os.getpid()}"):
        run("stat", tmp_path)
    spt.close()
