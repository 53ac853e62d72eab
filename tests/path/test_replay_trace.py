"""Traces: what a file may say, what patterns are like, and what reads must find."""

from pathlib import Path

import attrs
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edm.config.options import build_options
from edm.errors import UsageError
from edm.plugins.source_replay import MAX_PAGES, ReplayOptions
from edm.plugins.source_replay.trace import (
    OPERATION,
    READ,
    REMAP,
    REMOVE,
    UNMAP,
    WRITE,
    expected_reads,
    load,
    made_up,
    read,
)

PAGES = 40


def written(tmp_path, text):
    path = tmp_path / "a.trace"
    path.write_text(text)
    return path


def test_text_says_what_the_program_does(tmp_path):
    path = written(tmp_path, "# a comment\n\nr 0x11\n w 17 99 # so\nremove 16 4\nunmap 16 4\nremap 16 4 64\n")
    assert read(path).tolist() == [
        (READ, 0, 17, 0),
        (WRITE, 0, 17, 99),
        (REMOVE, 4, 16, 0),
        (UNMAP, 4, 16, 0),
        (REMAP, 4, 16, 64),
    ]


def test_array_file_says_the_same(tmp_path):
    operations = np.array([(WRITE, 0, 3, 4), (READ, 0, 3, 0)], OPERATION)
    np.save(tmp_path / "a.npy", operations)
    assert (read(tmp_path / "a.npy") == operations).all()
    assert load(ReplayOptions(trace=tmp_path / "a.npy")).pages == 4


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("r 1\nx 2\n", "a.trace:2: 'x 2' is no operation"),
        ("r\n", ":1: 'r' is no operation"),
        ("w 1\n", ":1: 'w 1' is no operation"),
        ("w 1 2 3\n", "is no operation"),
        ("r one\n", "is no operation"),
        ("r -1\n", "is no operation"),
        (f"w 1 {1 << 64}\n", "is no operation"),
        (f"remove 1 {1 << 32}\n", "is on more pages than there are"),
        ("r 1\nremove 1 0\n", "operation 1 changes no pages"),
        ("remap 1 4 3\n", "operation 0 remaps pages onto themselves"),
        ("remap 1 4 1\n", "operation 0 remaps pages onto themselves"),
        (f"r {MAX_PAGES}\n", "operation 0 is on a page beyond the last"),
        (f"r {(1 << 64) - 1}\n", "operation 0 is on a page beyond the last"),
        (f"remap 1 4 {MAX_PAGES - 3}\n", "operation 0 is on a page beyond the last"),
    ],
)
def test_bad_text_is_one_line_that_says_where(tmp_path, text, error):
    with pytest.raises(UsageError) as caught:
        load(ReplayOptions(trace=written(tmp_path, text)))
    assert error in str(caught.value)
    assert "\n" not in str(caught.value)


def test_files_that_are_no_traces_are_usage_errors(tmp_path):
    (tmp_path / "a.npy").write_bytes(b"\x93NUMPY\1\0")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\0")
    np.save(tmp_path / "floats.npy", np.zeros(3))
    np.save(tmp_path / "kind.npy", np.array([(9, 0, 0, 0)], OPERATION))
    for name, error in [
        ("a.npy", "not a NumPy file"),
        ("binary", "neither text"),
        ("floats.npy", "not a one-dimensional array"),
        ("kind.npy", "of no known kind: 9"),
        ("none", "No such file"),
        (".", "Is a directory"),
    ]:
        with pytest.raises(UsageError, match=error):
            read(tmp_path / name)


def test_options_that_do_not_fit_the_trace_are_usage_errors(tmp_path):
    path = written(tmp_path, "w 1 1\nremove 100 4\n")
    with pytest.raises(UsageError, match=r"touches page 103, but fault_source\.replay\.pages is 50"):
        load(ReplayOptions(trace=path, pages=50))
    with pytest.raises(UsageError, match="played by one thread"):
        load(ReplayOptions(trace=path, threads=2))
    assert load(ReplayOptions(trace=path)).pages == 104


@pytest.mark.parametrize("given", [{"pattern": "zigzag"}, {"writes": 101}, {"threads": 0}, {"pages": MAX_PAGES + 1}])
def test_bad_options_are_usage_errors(given):
    with pytest.raises(UsageError):
        build_options(ReplayOptions, given, dict.fromkeys(given, "test"), "fault_source.replay")


def test_options_are_read_as_a_user_writes_them():
    given = {"trace": "/x.trace", "threads": 3}
    options = build_options(ReplayOptions, given, dict.fromkeys(given, "test"), "fault_source.replay")
    assert options == ReplayOptions(trace=Path("/x.trace"), threads=3)


def test_patterns_are_what_they_are_called():
    options = ReplayOptions(touches=5000, writes=20)
    random = made_up(options, 100)
    assert (random == made_up(options, 100)).all()
    assert (random != made_up(attrs.evolve(options, seed=2), 100)).any()
    assert 0.15 < (random["kind"] == WRITE).mean() < 0.25
    assert set(random["page"].tolist()) == set(range(100))
    sequential = made_up(attrs.evolve(options, pattern="sequential"), 100)
    assert (sequential["page"] == np.arange(5000) % 100).all()
    hot = made_up(attrs.evolve(options, pattern="hot"), 100)
    assert (hot["page"] < 10).mean() > 0.85


def test_every_page_is_one_threads():
    trace = load(ReplayOptions(pages=1000, touches=3000, threads=3))
    parts = trace.split(3)
    assert sorted(np.concatenate(parts).tolist()) == list(range(3000))
    owners = [set(trace.operations["page"][part].tolist()) for part in parts]
    assert not owners[0] & owners[1]
    assert not owners[1] & owners[2]
    assert not owners[0] & owners[2]
    assert all((np.diff(part) > 0).all() for part in parts)


touches = st.tuples(st.sampled_from([READ, WRITE]), st.just(0), st.integers(0, PAGES - 1), st.integers(1, 99))
changes = st.tuples(st.sampled_from([REMOVE, UNMAP]), st.integers(1, 10), st.integers(0, PAGES - 10), st.just(0))
remaps = st.tuples(st.just(REMAP), st.integers(1, 10), st.integers(0, 10), st.integers(20, PAGES - 10))


@given(st.lists(touches | touches | changes | remaps))
def test_reads_must_find_what_one_step_after_the_other_gives(operations):
    held = [0] * PAGES
    due = []
    for kind, count, page, value in operations:
        due.append(held[page] if kind == READ else 0)
        if kind == WRITE:
            held[page] = value
        elif kind == REMAP:
            held[value : value + count] = held[page : page + count]
        if kind > WRITE:
            held[page : page + count] = [0] * count
    assert expected_reads(np.array(operations, OPERATION), PAGES).tolist() == due
