"""The order of eviction in the engine itself: what each policy keeps, and that a plugin's own table is asked."""

import contextlib
import ctypes

import attrs
import numpy as np
import pytest

from edm.config import Config
from edm.errors import NativeError, UsageError
from edm.launch.checks import check_plugins
from edm.plugins.source_replay.program import ReplayProgram
from edm.policy import NativePolicy
from edm.registry import Registry

LEAF = 64
BUDGET = 16 * LEAF
HOT = 6
"""Leaves that get half of the touches; a scan goes over all the others meanwhile."""


def fetched(engine_path, settings, table):
    """Pages that had to come back, of a hot set beside three scans of ten times the budget."""
    settings = attrs.evolve(settings, local_pages=BUDGET, write_back_pages=LEAF, fault_threads=1, ahead_pages=0)
    random = np.random.default_rng(7)
    with engine_path(settings) as path:
        engine = path.source
        assert engine.use_policy(table) in (0, 2)
        pages = 10 * BUDGET
        with contextlib.closing(ReplayProgram(engine, path.instance, pages)) as program:
            for _scan in range(3):
                for at in range(HOT * LEAF, pages, 16):
                    for page in range(at, at + 16):
                        program.write(page, page)
                    for page in random.integers(0, HOT * LEAF, 16).tolist():
                        program.write(page, page)
        counters = engine.counters()
        assert counters["internal_errors"] == 0
        assert counters["peak_resident"] <= BUDGET
        return counters["fetches"] + counters["rescues"]


def table_of(policy):
    from edm.ops import POLICY, POLICY_BYTES, address_of

    return address_of(policy, POLICY, POLICY_BYTES)


def opened(name, **options):
    spec = Registry().policy(name)
    return spec.open(spec.options(**options))


def test_scan_keeps_what_comes_back_soon(engine_path, settings):
    counts = {}
    for name in ("scan", "fifo"):
        policy = opened(name)
        counts[name] = fetched(engine_path, settings, table_of(policy))
    assert counts["scan"] < 0.8 * counts["fifo"], counts


def test_clock_without_idle_bits_is_fifo(engine_path, settings):
    clock, fifo = opened("clock"), opened("fifo")
    counts = [fetched(engine_path, settings, table_of(policy)) for policy in (clock, fifo)]
    assert abs(counts[0] - counts[1]) < 0.1 * counts[1], counts


class View(ctypes.Structure):
    _fields_ = (("capacity", ctypes.c_uint64), ("pages", ctypes.c_uint64 * 4))


class Leaf(ctypes.Structure):
    _fields_ = (
        ("queue", ctypes.c_uint32),
        ("pages", ctypes.c_uint32),
        ("away", ctypes.c_uint64),
        ("back", ctypes.c_uint32),
        ("reserved", ctypes.c_uint32),
    )


ARRIVED = ctypes.CFUNCTYPE(ctypes.c_uint32, ctypes.c_void_p, ctypes.POINTER(View), ctypes.POINTER(Leaf))
LEAVING = ctypes.CFUNCTYPE(ctypes.c_uint32, ctypes.c_void_p, ctypes.POINTER(View), ctypes.POINTER(Leaf), ctypes.c_int)


class Table(ctypes.Structure):
    _fields_ = (
        ("version", ctypes.c_uint32),
        ("bytes", ctypes.c_uint32),
        ("self", ctypes.c_void_p),
        ("looks", ctypes.c_uint32),
        ("reserved", ctypes.c_uint32),
        ("arrived", ARRIVED),
        ("balance", ctypes.c_void_p),
        ("leaving", LEAVING),
    )


NOWHERE = 0xFFFFFFFF


def test_a_policy_of_a_plugin_is_asked_and_told_the_truth(engine_path, settings):
    """It counts what it is told, keeps what came back in the last queue, and never lets that leave."""
    told = {"new": 0, "back": 0, "left": 0, "kept": 0, "wrong": []}

    def arrived(_self, view, leaf):
        v, t = view[0], leaf[0]
        if (
            v.capacity > BUDGET
            or sum(v.pages) > BUDGET + LEAF
            or not 1 <= t.pages <= LEAF
            or t.queue not in (0, 3, NOWHERE)
        ):
            told["wrong"].append((v.capacity, list(v.pages), t.pages, t.queue))
        if t.back and t.away > 10 * BUDGET * 3:
            told["wrong"].append(("away", t.away))
        told["back" if t.back else "new"] += 1
        return 3 if t.back else 0 if t.queue == NOWHERE else NOWHERE

    def leaving(_self, _view, leaf, idle):
        told["left"] += 1
        if idle != -1:
            told["wrong"].append(("idle", idle))
        told["kept"] += leaf[0].queue == 3
        return NOWHERE

    table = Table(1, ctypes.sizeof(Table), None, 0, 0, ARRIVED(arrived), None, LEAVING(leaving))
    count = fetched(engine_path, settings, ctypes.addressof(table))
    assert not told["wrong"], told["wrong"][:5]
    assert told["back"] == count
    assert told["new"] >= 10 * BUDGET
    assert told["left"] > told["new"] / LEAF
    assert told["kept"] < told["left"]


def test_what_cannot_leave_hides_nothing_behind_it(engine_path, settings):
    """Two leaves that stay stand in the first queue, all others in the last."""
    arrivals = []

    def arrived(_self, _view, _leaf):
        arrivals.append(None)
        return 0 if len(arrivals) <= 2 * LEAF else 3

    table = Table(1, ctypes.sizeof(Table), None, 0, 0, ARRIVED(arrived), None, LEAVING(lambda *_: NOWHERE))
    settings = attrs.evolve(settings, local_pages=BUDGET, write_back_pages=LEAF, fault_threads=1, ahead_pages=0)
    with engine_path(settings) as path:
        engine = path.source
        assert engine.use_policy(ctypes.addressof(table)) == 0
        with contextlib.closing(ReplayProgram(engine, path.instance, 4 * BUDGET)) as program:
            for page in range(2 * LEAF):
                program.write(page, page)
            program.pin(0, 2 * LEAF)
            for page in range(2 * LEAF, 4 * BUDGET):
                program.write(page, page)
        counters = engine.counters()
    assert counters["evictions"] >= 2 * BUDGET
    assert counters["over_limit"] == 0


@pytest.mark.parametrize("change", [{"version": 2}, {"bytes": 40}])
def test_a_table_of_another_version_is_refused(engine_path, settings, change):
    table = Table(1, ctypes.sizeof(Table), None, 0, 0, ARRIVED(lambda *_: 0), None, LEAVING(lambda *_: NOWHERE))
    for field, value in change.items():
        setattr(table, field, value)
    with engine_path(settings) as path, pytest.raises(NativeError):
        path.source.use_policy(ctypes.addressof(table))


def test_a_model_alone_cannot_be_run_with(monkeypatch):
    fifo = Registry().policy("fifo")
    registry = Registry()
    monkeypatch.setattr(registry, "policy", lambda _name: attrs.evolve(fifo, name="lru", open=None))
    config = Config(fault_source="replay", transport="inproc", policy="lru")
    with pytest.raises(UsageError, match="'lru' is a model only"):
        check_plugins(config, registry)


def test_options_are_checked_before_anything_starts():
    config = Config(fault_source="replay", transport="inproc", options={"policy": {"scan": {"kept_percent": 101}}})
    with pytest.raises(UsageError, match="between 0 and 100"):
        check_plugins(config, Registry())


def test_no_memory_is_no_policy():
    from edm._native import ffi

    with pytest.raises(MemoryError):
        NativePolicy(ffi.NULL)
