"""A flipped bit anywhere in a store on disk is found, named, and never served."""

import json
import os
import random
import shutil

import pytest
from click.testing import CliRunner

from edm.cli.store import command
from edm.dms.server import MemoryServer
from edm.errors import EdmError
from edm.testing.pages import batch_of
from edm.testing.stores import open_store
from edm.types import PAGE_BYTES, GetStatus

COUNT = 40
REGION = 1 << 32
OPTIONS = {"file": {"segment": "256K"}, "lmdb": {"map_size": "1M", "sync": "none"}}


def make(path, name):
    server = MemoryServer(*(open_store(kind, name, path, _own(kind, name)) for kind in ("spt_store", "page_store")))
    refs, pages = batch_of(REGION, range(COUNT), 7)
    assert server.evict(1, refs, memoryview(pages)) == ""
    server.close()
    return bytes(pages)


def _own(kind, name):
    return OPTIONS[name] if (kind, name) != ("spt_store", "file") else {}


def serve(path, name):
    """What each page is answered with: "new", "error", or its bytes."""
    server = MemoryServer(*(open_store(kind, name, path, _own(kind, name)) for kind in ("spt_store", "page_store")))
    refs, _ = batch_of(REGION, range(COUNT), 0)
    into = bytearray(COUNT * PAGE_BYTES)
    server.get(1, refs, memoryview(into))
    server.close()
    return [
        bytes(into[i * PAGE_BYTES : (i + 1) * PAGE_BYTES])
        if ref["status"] == GetStatus.EXISTING_PAGE
        else GetStatus(int(ref["status"])).name
        for i, ref in enumerate(refs)
    ]


def flip(path, bit):
    with path.open("r+b") as file:
        file.seek(bit // 8)
        byte = file.read(1)[0]
        file.seek(bit // 8)
        file.write(bytes([byte ^ 1 << bit % 8]))


def outcome(path, name, pages):
    """In a process of its own: a damaged LMDB tree may end it, which serves nothing either. Returns a word."""
    read_end, write_end = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            os.write(write_end, _outcome(path, name, pages).encode())
        finally:
            os._exit(0)
    os.close(write_end)
    with os.fdopen(read_end) as words:
        word = words.read()
    status = os.waitpid(pid, 0)[1]
    return word or f"ended by {status}"


def _outcome(path, name, pages):
    try:
        answers = serve(path, name)
    except EdmError:
        return "refused to open"
    wanted = [pages[i * PAGE_BYTES : (i + 1) * PAGE_BYTES] for i in range(COUNT)]
    if answers == wanted:
        return "all right"
    if all(answer in {right, "ERROR"} for answer, right in zip(answers, wanted, strict=True)):
        return "error"
    return "WRONG"


@pytest.mark.parametrize("name", ["file", "lmdb"])
def test_no_flip_is_ever_served(name, tmp_path):
    made = tmp_path / "made"
    pages = make(made, name)
    random_ = random.Random(3)
    seen = set()
    files = [path for path in made.rglob("*") if path.is_file() and path.name != "LOCK"]
    for path in files:
        bits = path.stat().st_size * 8
        # The pages' own bits are all alike: headers, checksums, frames and trees are looked at closer.
        chosen = {random_.randrange(bits) for _ in range(12)} | {
            random_.randrange(min(bits, 4096 * 8)) for _ in range(12)
        }
        for bit in chosen:
            copy = tmp_path / "copy"
            shutil.copytree(made, copy)
            flip(copy / path.relative_to(made), bit)
            result = outcome(copy, name, pages)
            assert result != "WRONG", f"bit {bit} of {path.name}"
            seen.add(result)
            shutil.rmtree(copy)
    assert seen >= {"all right", "error", "refused to open"} or name == "lmdb"


def test_verify_names_page_and_file(tmp_path):
    make(tmp_path, "file")
    (segment,) = (tmp_path / "pages").glob("*.pages")
    # One page of checksums at least lies between the header and the pages.
    flip(segment, (2 * PAGE_BYTES + 5 * PAGE_BYTES + 100) * 8)
    result = CliRunner().invoke(command, ["verify", "--json", str(tmp_path)], standalone_mode=False)
    assert result.return_value == 1
    (damaged,) = json.loads(result.stdout)["damaged"]
    assert damaged["page"] == "0x100000000:0x5"
    assert damaged["file"] == str(segment)
    assert "checksum" in damaged["reason"]
    human = CliRunner().invoke(command, ["verify", str(tmp_path)], standalone_mode=False)
    assert "1 damaged of 40 pages" in human.stdout
    assert "0x100000000:0x5" in human.stdout


def test_verify_finds_a_flip_in_a_segment_s_header(tmp_path):
    make(tmp_path, "file")
    (segment,) = (tmp_path / "pages").glob("*.pages")
    flip(segment, 70)
    result = CliRunner().invoke(command, ["verify", "--json", str(tmp_path)], standalone_mode=False)
    assert result.return_value == 1
    assert json.loads(result.stdout)["damaged"][0]["file"] == str(segment)


def test_segment_that_is_gone_is_named(tmp_path):
    make(tmp_path, "file")
    (segment,) = (tmp_path / "pages").glob("*.pages")
    segment.unlink()
    result = CliRunner().invoke(command, ["verify", "--json", str(tmp_path)], standalone_mode=False)
    assert result.return_value == 1
    damaged = json.loads(result.stdout)["damaged"]
    assert len(damaged) == COUNT
    assert {entry["file"] for entry in damaged} == {str(segment)}
    assert set(serve(tmp_path, "file")) == {"ERROR"}
