"""A flipped bit anywhere in a store on disk is found, named, and never served; the server ends with words."""

import json
import os
import random
import shutil
import sys

import pytest
from children import in_a_child
from click.testing import CliRunner

from edm.cli.store import command
from edm.dms.server import MemoryServer
from edm.errors import EdmError
from edm.plugins.store_lmdb.checking import examine
from edm.testing.pages import batch_of
from edm.testing.stores import open_store
from edm.types import PAGE_BYTES, GetStatus

COUNT = 40
REGION = 1 << 32
OPTIONS = {"file": {"segment": "256K"}, "lmdb": {"map_size": "1M", "sync": "none"}}
SPT_OPTIONS = {"file": {}, "lmdb": OPTIONS["lmdb"]}


def open_server(path, name):
    table = open_store("spt_store", name, path, SPT_OPTIONS[name])
    try:
        return MemoryServer(table, open_store("page_store", name, path, OPTIONS[name]))
    except BaseException:
        table.close()
        raise


def make(path, name, *, killed=None):
    """Pages of which some are written over and some dropped. killed: a copy of what a death would leave, made there."""
    server = open_server(path, name)
    for indices, version in ((range(COUNT), 6), (range(COUNT + 30), 7)):
        refs, pages = batch_of(REGION, indices, version)
        assert server.evict(1, refs, memoryview(pages)) == ""
    assert server.control(1, {"op": "drop_pages", "ranges": [[REGION, COUNT, 30]], "sequence": 1})["ok"]
    if killed:
        shutil.copytree(path, killed)
    store, (_, slots) = server.pages, server.spt.pages(REGION)
    places = {}
    for slot in slots.tolist() if name == "file" else []:
        places.setdefault(store.where(slot).name, []).append(store.offset(slot))
    server.close()
    return bytes(pages[: COUNT * PAGE_BYTES]), places


def serve(path, name):
    """What each page is answered with: "ERROR", "NEW_PAGE", or its bytes."""
    server = open_server(path, name)
    refs, _ = batch_of(REGION, range(COUNT), 0)
    into = bytearray(COUNT * PAGE_BYTES)
    server.get(1, refs, memoryview(into))
    # Writing over and deleting, too, must not end it.
    more, pages = batch_of(REGION, range(COUNT, COUNT + 20), 9)
    server.evict(1, more, memoryview(pages))
    server.control(1, {"op": "drop_pages", "ranges": [[REGION, COUNT, 10]], "sequence": 2})
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


def answer_of(path, name, pages):
    try:
        answers = serve(path, name)
    except EdmError as error:
        return "refused to open" if str(path) in str(error) else f"WRONG: {error}"
    wanted = [pages[i * PAGE_BYTES : (i + 1) * PAGE_BYTES] for i in range(COUNT)]
    if answers == wanted:
        return "all right"
    if all(answer in {right, "ERROR"} for answer, right in zip(answers, wanted, strict=True)):
        return "error"
    return "WRONG"


def verified(path):
    """What `edm store verify` says: "sound", or that it found damage, with a file for each."""
    result = CliRunner().invoke(command, ["verify", "--json", str(path)], standalone_mode=False)
    if result.exception:
        return f"{type(result.exception).__name__}: {result.exception}"
    damaged = json.loads(result.stdout)["damaged"]
    assert result.return_value == bool(damaged)
    assert all(str(path) in one["file"] and one["reason"] for one in damaged)
    return "found" if damaged else "sound"


def outcome(made, copy, file, bit, name, pages):
    """The server's answer and verify's, for one flipped bit."""
    words = []
    for work in (lambda: answer_of(copy, name, pages), lambda: verified(copy)):
        shutil.copytree(made, copy)
        flip(copy / file.relative_to(made), bit)
        words.append(in_a_child(work))
        shutil.rmtree(copy)
    return tuple(words)


def used_bits(file, places, random_, each):
    """Some bits of every part of a file that holds something; by part."""
    if file.name.endswith(".pages"):
        pages = places.get(file.name, [])
        parts = {
            "header": range(28),
            "page": [at + i for at in pages for i in range(PAGE_BYTES)],
            "checksum": [PAGE_BYTES + (at - 64 * PAGE_BYTES) // PAGE_BYTES * 4 + i for at in pages for i in range(4)],
        }
    elif file.name == "data.mdb":
        parts = lmdb_parts(file.read_bytes())
    else:
        parts = {"all": range(file.stat().st_size)}
    return {
        part: [random_.choice(where) * 8 + random_.randrange(8) for _ in range(each)]
        for part, where in parts.items()
        if where
    }


def lmdb_parts(data):
    """Bytes of an LMDB file that mean something, by kind of page: of trees, not of what has been given up."""
    txnid = [int.from_bytes(data[i * PAGE_BYTES + 144 : i * PAGE_BYTES + 152], "little") for i in range(2)]
    meta = max(range(2), key=lambda i: txnid[i]) * PAGE_BYTES
    parts = {
        "meta page": [*range(meta, meta + 152)],
        "older meta page": [*range(PAGE_BYTES - meta, PAGE_BYTES - meta + 152)],
        "guard": [*range(meta + 2048, meta + 2048 + 24)],
    }
    roots = [(int.from_bytes(data[meta + at + 40 : meta + at + 48], "little"), at == 40) for at in (40, 88)]
    seen = set()
    while roots:
        page, is_free = roots.pop()
        if page in seen or page == (1 << 64) - 1:
            continue
        seen.add(page)
        start = page * PAGE_BYTES
        word = lambda at, size, start=start: int.from_bytes(data[start + at : start + at + size], "little")  # noqa: E731
        branch, lower = word(10, 2) == 1, word(12, 2)
        bytes_ = [*range(8), *range(10, lower)]
        for i in range(16, lower, 2):
            node = word(i, 2)
            flags, key_bytes = word(node + 4, 2), word(node + 6, 2)
            value = node + 8 + key_bytes
            # The first key of a branch means nothing, nor does a byte that makes a length even.
            bytes_ += range(node, node + 8)
            if branch:
                roots.append((word(node, 4) | flags << 32, is_free))
                continue
            # Since which transaction pages are free: an earlier one says the same.
            bytes_ += [] if is_free else range(node + 8, value)
            if flags == 1:
                bytes_ += range(value, value + 8)
                head = word(value, 8) * PAGE_BYTES
                parts.setdefault("large value's head", []).extend(
                    [*range(head, head + 8), *range(head + 10, head + 16)]
                )
                parts.setdefault("large value", []).extend(range(head + 16, head + 4096))
            else:
                size = word(node, 4)
                # Of a row of "tails" the last four bytes are reserved.
                bytes_ += range(value, value + (20 if size == 24 else size))
                if flags == 2:
                    roots.append((word(value + 40, 8), False))
        parts.setdefault("branch" if branch else "leaf", []).extend(start + at for at in bytes_)
    return parts


@pytest.mark.parametrize("state", ["closed", "killed"])
@pytest.mark.parametrize("name", ["file", "lmdb"])
def test_no_flip_is_ever_served_and_verify_finds_each(name, state, in_memory):
    flips(name, state, in_memory, random.Random(3), 1)


@pytest.mark.soak
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("state", ["closed", "killed"])
@pytest.mark.parametrize("name", ["file", "lmdb"])
def test_no_flip_of_many_is_ever_served(name, state, in_memory):
    print(name, state, flips(name, state, in_memory, random.Random(), 300))


def flips(name, state, tmp_path, random_, each):
    """How often a flip had which outcome, by file and part."""
    made, killed = tmp_path / "made", tmp_path / "killed"
    pages, places = make(made, name, killed=killed)
    made = made if state == "closed" else killed
    seen = {}
    assert in_a_child(lambda: answer_of(shutil.copytree(made, tmp_path / "sound"), name, pages)) == "all right"
    for file in sorted(path for path in made.rglob("*") if path.is_file() and path.stat().st_size):
        for part, bits in used_bits(file, places, random_, each).items():
            for bit in bits:
                served, told = outcome(made, tmp_path / "copy", file, bit, name, pages)
                assert served in {"all right", "error", "refused to open"}, (served, file.name, part, bit)
                # A death leaves rows that nothing speaks of any more: opening deletes them.
                sound = {"found"} if state == "closed" or served != "all right" else {"found", "sound"}
                assert told in sound, (told, served, file.name, part, bit)
                key = f"{file.parent.name}/{file.name}, {part}: {served}"
                seen[key] = seen.get(key, 0) + 1
    return seen


@pytest.mark.soak
@pytest.mark.timeout(3000)
def test_every_bit_of_lmdb_s_trees(in_memory):
    """What the check before opening lets pass is a page's content or a row's, and is found by their checksums."""
    made = in_memory / "made"
    pages, _ = make(made, "lmdb")
    file = made / "lmdb" / "data.mdb"
    passed = tried = 0
    parts = lmdb_parts(file.read_bytes())
    for part in ("meta page", "older meta page", "guard", "branch", "leaf", "large value's head"):
        for byte in parts.get(part, []):
            for bit in range(8 * byte, 8 * byte + 8):
                tried += 1
                flip(file, bit)
                damage, harmless = examine(file, lost_power=False, deep=True)
                flip(file, bit)
                passed += not damage and not harmless
                if not damage and not harmless and passed % 20 == 0:
                    served, told = outcome(made, in_memory / "copy", file, bit, "lmdb", pages)
                    assert (served, told) in {("error", "found"), ("refused to open", "found")}, (part, bit)
    print(f"{tried} bits, {passed} of them found by the checksums of pages and rows only")


def test_damage_that_comes_while_lmdb_is_in_use_ends_the_server_with_a_line(tmp_path, capfd):
    make(tmp_path, "lmdb")
    file = tmp_path / "lmdb" / "data.mdb"

    def work():
        server = open_server(tmp_path, "lmdb")
        with file.open("r+b") as data:
            # Nothing left behind what the map shows: as a disk that cannot be read, SIGBUS.
            data.truncate(2 * PAGE_BYTES)
        refs, _ = batch_of(REGION, range(COUNT), 0)
        server.get(1, refs, memoryview(bytearray(COUNT * PAGE_BYTES)))
        return "went on"

    assert in_a_child(work) == "ended with a line and status 1"
    assert capfd.readouterr().err == f"edm: {file}: damaged while it was in use: LMDB crashed\n"


def test_crash_elsewhere_is_still_a_crash(tmp_path):
    make(tmp_path, "lmdb")
    code = (
        "import ctypes, pathlib, sys\n"
        "from edm.testing.stores import open_store\n"
        "spt = open_store('spt_store', 'lmdb', pathlib.Path(sys.argv[1]), {})\n"
        "ctypes.string_at(8)\n"
    )
    assert os.spawnv(os.P_WAIT, sys.executable, [sys.executable, "-c", code, str(tmp_path)]) == -11


def test_verify_names_page_and_file(tmp_path):
    _, places = make(tmp_path, "file")
    name, offsets = next(iter(places.items()))
    file = tmp_path / "pages" / name
    flip(file, (offsets[5] + 100) * 8)
    result = CliRunner().invoke(command, ["verify", "--json", str(tmp_path)], standalone_mode=False)
    assert result.return_value == 1
    (damaged,) = json.loads(result.stdout)["damaged"]
    assert damaged["page"] == "0x100000000:0x5"
    assert (damaged["file"], damaged["offset"]) == (str(file), offsets[5])
    assert "checksum" in damaged["reason"]
    human = CliRunner().invoke(command, ["verify", str(tmp_path)], standalone_mode=False)
    assert "1 damaged of 40 pages" in human.stdout
    assert "0x100000000:0x5" in human.stdout


def test_segment_that_is_gone_is_named(tmp_path):
    make(tmp_path, "file")
    segments = set((tmp_path / "pages").glob("*.pages"))
    for segment in segments:
        segment.unlink()
    result = CliRunner().invoke(command, ["verify", "--json", str(tmp_path)], standalone_mode=False)
    assert result.return_value == 1
    damaged = json.loads(result.stdout)["damaged"]
    assert len(damaged) == COUNT
    assert {entry["file"] for entry in damaged} <= set(map(str, segments))
    assert set(serve(tmp_path, "file")) == {"ERROR"}
