"""LOCK, FORMAT and the journal: damage is told apart from a death and from a loss of power, and is listed."""

import json
import shutil

import pytest
from click.testing import CliRunner

from edm.cli.store import command
from edm.dms.server import MemoryServer
from edm.errors import Corrupt, UsageError
from edm.plugins.store_file.spt import FileSpt
from edm.stores.directory import StoreDirectory, lock_record
from edm.testing.pages import batch_of
from edm.testing.stores import open_store
from edm.types import PAGE_BYTES, GetStatus

REGION = 1 << 32
BATCHES, EACH = 6, 5
FIRST = 64 * PAGE_BYTES
"""Where the pages of a small page file begin."""


def make(path, *, sync="batch", copy=None):
    """Six evictions of five pages; copy: what a server leaves that dies right after the last, made there."""
    options = {"sync": sync}
    server = MemoryServer(
        open_store("spt_store", "file", path, options), open_store("page_store", "file", path, {"segment": "256K"})
    )
    for number in range(BATCHES):
        refs, pages = batch_of(REGION, range(number * EACH, (number + 1) * EACH), 1)
        assert server.evict(1, refs, memoryview(pages)) == ""
    if copy:
        shutil.copytree(path, copy)
    server.close()


def found(path):
    server = MemoryServer(
        open_store("spt_store", "file", path, {}), open_store("page_store", "file", path, {"segment": "256K"})
    )
    refs, _ = batch_of(REGION, range(BATCHES * EACH), 0)
    server.get(1, refs, memoryview(bytearray(len(refs) * PAGE_BYTES)))
    server.close()
    return int((refs["status"] == GetStatus.EXISTING_PAGE).sum())


def flip(path, byte, bit=0):
    data = bytearray(path.read_bytes())
    data[byte] ^= 1 << bit
    path.write_bytes(data)


def verify(path):
    result = CliRunner().invoke(command, ["verify", "--json", str(path)], standalone_mode=False, catch_exceptions=False)
    return result.return_value, json.loads(result.stdout)


def journal_of(path):
    (journal,) = (path / "spt").glob("*.journal")
    return journal


def frames_of(journal):
    """Where each frame begins."""
    data, at, starts = journal.read_bytes(), 0, []
    while at < len(data):
        starts.append(at)
        at += 32 + int.from_bytes(data[at + 16 : at + 24], "little")
    return starts


@pytest.mark.parametrize("byte", [100, 110, 120, 126, 127])
def test_flip_in_lock_of_a_server_that_died_loses_nothing_and_is_told(tmp_path, caplog, byte):
    make(tmp_path / "live", copy=tmp_path / "dead")
    lock = tmp_path / "dead" / "spt" / "LOCK"
    flip(lock, byte)
    with caplog.at_level("WARNING", "edm"):
        assert found(tmp_path / "dead") == BATCHES * EACH
    assert f"{lock}: its checksum does not match" in caplog.text


def test_verify_lists_a_flip_in_lock(tmp_path):
    make(tmp_path)
    lock = tmp_path / "pages" / "LOCK"
    flip(lock, 50)
    status, figures = verify(tmp_path)
    assert status == 1
    (damage,) = figures["damaged"]
    assert damage["file"] == str(lock)
    assert "checksum" in damage["reason"]
    assert verify(tmp_path) == (0, {"pages": BATCHES * EACH, "damaged": []})


def test_opening_that_fails_after_a_loss_of_power_has_not_forgotten_it(tmp_path):
    make(tmp_path / "live", copy=tmp_path / "dead")
    path = tmp_path / "dead" / "spt"
    (path / "LOCK").write_bytes(lock_record("another-boot"))
    directory = StoreDirectory(path, "edm SPT journal", 2)
    assert directory.lost_power
    directory.close(clean=False)
    directory = StoreDirectory(path, "edm SPT journal", 2)
    assert directory.lost_power
    directory.begin()
    directory.close(clean=True)
    directory = StoreDirectory(path, "edm SPT journal", 2)
    assert not directory.lost_power
    assert directory.was_clean
    directory.close(clean=False)


@pytest.mark.parametrize("half", ["spt", "pages"])
def test_no_flip_in_format_opens_the_store(tmp_path, half):
    make(tmp_path)
    path = tmp_path / half / "FORMAT"
    sound = path.read_bytes()
    for byte in range(len(sound)):
        for bit in range(8):
            flip(path, byte, bit)
            with pytest.raises(Corrupt, match="FORMAT: damaged"):
                StoreDirectory(tmp_path / half, sound.decode().rpartition(" 2\n")[0] or "edm page files", 2)
            path.write_bytes(sound)
    assert found(tmp_path) == BATCHES * EACH


def test_older_format_is_one_line(tmp_path):
    make(tmp_path)
    (tmp_path / "spt" / "FORMAT").write_text("edm SPT journal 1\n")
    with pytest.raises(UsageError, match="has format 1, this EDM reads and writes format 2"):
        FileSpt(tmp_path / "spt")


@pytest.mark.parametrize("part", ["changes", "header", "chain", "length"])
def test_verify_lists_where_a_journal_is_damaged_and_checks_the_rest(tmp_path, part):
    make(tmp_path)
    journal = journal_of(tmp_path)
    start = frames_of(journal)[4]
    flip(journal, start + {"changes": 60, "header": 25, "chain": 28, "length": 17}[part])
    with pytest.raises(Corrupt, match=f"{journal}: damaged at byte {start}"):
        FileSpt(tmp_path / "spt")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file() and path.name != "LOCK"}
    status, figures = verify(tmp_path)
    assert status == 1
    (damage,) = figures["damaged"]
    assert (damage["file"], damage["offset"]) == (str(journal), start)
    assert "the frames behind it are read" in damage["reason"]
    # One eviction's pages are in the damaged frame.
    assert figures["pages"] == (BATCHES - 1) * EACH
    assert {path: path.read_bytes() for path in before} == before


def test_verify_finds_a_damaged_page_behind_a_damaged_frame(tmp_path):
    make(tmp_path)
    flip(journal_of(tmp_path), frames_of(journal_of(tmp_path))[3] + 60)
    (segment,) = (tmp_path / "pages").glob("*.pages")
    flip(segment, FIRST + (BATCHES * EACH - 1) * PAGE_BYTES + 7)
    status, figures = verify(tmp_path)
    assert status == 1
    assert [one["page"] for one in figures["damaged"]] == ["", f"0x100000000:{BATCHES * EACH - 1:#x}"]
    assert figures["damaged"][1]["offset"] == FIRST + (BATCHES * EACH - 1) * PAGE_BYTES
    human = CliRunner().invoke(command, ["verify", str(tmp_path)], standalone_mode=False)
    assert "1 damaged of 25 pages, and 1 other place is damaged" in human.stdout


@pytest.mark.parametrize("part", [60, 25, 28, 17])
def test_damage_before_what_was_synced_is_no_loss_of_power(tmp_path, part):
    make(tmp_path / "live", sync="always", copy=tmp_path / "dead")
    path = tmp_path / "dead"
    (path / "spt" / "LOCK").write_bytes(lock_record("another-boot"))
    journal = journal_of(path)
    frames = frames_of(journal)
    flip(journal, frames[-3] + part)
    with pytest.raises(Corrupt, match=f"damaged at byte {frames[-3]}"):
        FileSpt(path / "spt", "always")
    flip(journal, frames[-3] + part)
    # The last but one may be torn: the last, sealed, may have come to the disk before it.
    flip(journal, frames[-2] + part)
    spt = FileSpt(path / "spt", "always")
    assert sum(spt.regions().values()) == (BATCHES - 2) * EACH
    spt.close()


def test_journal_longer_than_the_reader_s_window(tmp_path, monkeypatch):
    monkeypatch.setattr("edm.plugins.store_file.reading._WINDOW_BYTES", 100)
    make(tmp_path)
    assert found(tmp_path) == BATCHES * EACH
