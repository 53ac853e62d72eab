"""Eviction policies' models against naive ones, Belady's optimum against exhaustive search, and `edm simulate`."""

import json
from functools import cache

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edm.cli import main
from edm.plugins.policy_clock import Clock, ClockOptions
from edm.plugins.policy_scan import ScanOptions
from edm.registry import Registry
from edm.simulate.replaying import hits, optimal_hits

POLICIES = ("clock", "fifo", "scan")
traces = st.lists(st.integers(0, 12), min_size=1, max_size=80).map(lambda units: np.array(units, np.int64))
capacities = st.integers(2, 8)


def hits_of(name, units, capacity, **options):
    spec = Registry().policy(name)
    return hits(spec, spec.options(**options), units, capacity)


def naive_fifo(units, capacity):
    queue, found = [], 0
    for unit in units:
        if unit in queue:
            found += 1
        else:
            queue = [*queue, unit][-capacity:]
    return found


def naive_scan(units, capacity, kept_percent):
    """Written from the rules: order of arrival in lists, the log of evictions searched backwards."""
    probation, kept, log, found = [], [], [], 0
    for unit in units:
        if unit in probation or unit in kept:
            found += 1
            continue
        soon = unit in log and log[::-1].index(unit) + 1 <= capacity
        if len(probation) + len(kept) == capacity:
            log.append((probation or kept).pop(0))
        (kept if soon else probation).append(unit)
        while 100 * len(kept) > capacity * kept_percent and len(kept) > capacity * kept_percent // 100:
            probation.append(kept.pop(0))
    return found


def naive_clock(units, capacity, low, idle_bits):
    """A real circle with a hand."""
    circle, touched, hand, found = [], {}, 0, 0
    for unit in units:
        if unit in circle:
            found += 1
            touched[unit] = idle_bits
            continue
        if len(circle) == capacity:
            while len(circle) > low:
                if touched[circle[hand]]:
                    touched[circle[hand]] = False
                    hand = (hand + 1) % len(circle)
                else:
                    del circle[hand]
                    hand = hand % len(circle) if circle else 0
        circle.insert(hand, unit)  # just behind the hand: it is looked at last
        hand = (hand + 1) % len(circle)
        touched[unit] = False
    return found


def best_possible(units, capacity):
    """Exhaustive search over what to keep."""

    @cache
    def best(at, resident):
        if at == len(units):
            return 0
        unit = units[at]
        if unit in resident:
            return 1 + best(at + 1, resident)
        if len(resident) < capacity:
            return best(at + 1, resident | {unit})
        return max(best(at + 1, resident - {victim} | {unit}) for victim in resident)

    return best(0, frozenset())


@given(traces, capacities)
def test_fifo_is_a_queue(units, capacity):
    assert hits_of("fifo", units, capacity) == naive_fifo(units.tolist(), capacity)


@given(traces, capacities, st.sampled_from([0, 25, 50, 75, 100]))
def test_scan_follows_its_rules(units, capacity, kept):
    assert hits_of("scan", units, capacity, kept_percent=kept) == naive_scan(units.tolist(), capacity, kept)


@given(traces, capacities, st.integers(1, 100), st.booleans())
def test_clock_is_a_circle_with_a_hand(units, capacity, percent, idle_bits):
    low = min(max(capacity * percent // 100, 1), capacity - 1)
    found = hits_of("clock", units, capacity, low_percent=percent, idle_bits=idle_bits)
    assert found == naive_clock(units.tolist(), capacity, low, idle_bits)


@given(st.lists(st.integers(0, 5), min_size=1, max_size=14), st.integers(1, 4))
def test_the_optimum_is_what_exhaustive_search_finds(units, capacity):
    assert optimal_hits(np.array(units, np.int64), capacity) == best_possible(tuple(units), capacity)


@given(traces, capacities, st.sampled_from(POLICIES))
def test_no_policy_beats_the_optimum(units, capacity, name):
    assert hits_of(name, units, capacity) <= optimal_hits(units, capacity)


def hot_beside_a_scan():
    """Half of the touches on a hot tenth of 4096 units, the others a scan of the rest, again and again."""
    random = np.random.default_rng(6)
    units = 410 + np.arange(80_000) % (4096 - 410)
    hot = random.random(len(units)) < 0.5
    units[hot] = random.integers(0, 410, hot.sum())
    return units


def test_scan_keeps_what_is_hot_beside_a_scan():
    units = hot_beside_a_scan()
    scan, fifo, best = hits_of("scan", units, 1024), hits_of("fifo", units, 1024), optimal_hits(units, 1024)
    assert scan > 1.4 * fifo
    assert scan > 0.7 * best


def test_scan_follows_a_working_set_that_moves():
    random = np.random.default_rng(7)
    units = np.concatenate([part * 600 + random.integers(0, 600, 20_000) for part in range(5)])
    assert hits_of("scan", units, 1024) > 0.94 * len(units)


def test_a_model_that_holds_too_much_is_found_out():
    class Hoarder:
        def __init__(self, options, capacity):
            pass

        def hit(self, unit):
            pass

        def fault(self, unit):
            return []

    from edm.hookspecs import EvictionPolicySpec

    spec = EvictionPolicySpec(name="hoarder", summary="s", model=Hoarder)
    with pytest.raises(AssertionError, match="hoarder holds 3 units where there is room for 2"):
        hits(spec, spec.options(), np.arange(3), 2)


def test_options_out_of_range_are_refused():
    with pytest.raises(ValueError, match="low_percent"):
        Clock(ClockOptions(low_percent=0), 4)
    with pytest.raises(ValueError, match="kept_percent"):
        ScanOptions(kept_percent=101)


@pytest.fixture
def trace(tmp_path):
    path = tmp_path / "touches.txt"
    path.write_text("".join(f"r {page}\n" for _ in range(3) for page in range(8)) + "w 0 1\nremove 0 1\n")
    return path


def simulate(capsys, *arguments):
    with pytest.raises(SystemExit) as exit_:
        main(["simulate", *map(str, arguments)])
    captured = capsys.readouterr()
    return exit_.value.code, captured.out, captured.err


def test_the_command_prints_every_policy_beside_the_optimum(capsys, trace):
    status, out, _ = simulate(capsys, trace, "--memory", "50%")
    assert status == 0
    assert all(name in out for name in (*POLICIES, "optimum"))


def test_json_holds_the_ratios(capsys, trace):
    _, out, _ = simulate(capsys, trace, "--memory", "50%", "--memory", "32K", "--policy", "fifo", "--json")
    document = json.loads(out)
    assert document["accesses"] == 25
    half, whole = document["budgets"]
    assert half["hit_ratio"]["fifo"] == 0  # a loop larger than the queue
    assert half["hit_ratio"]["optimum"] == 9 / 25
    assert whole["hit_ratio"] == {"fifo": 17 / 25, "optimum": 17 / 25}


def test_units_of_several_pages_move_together(capsys, trace):
    _, out, _ = simulate(capsys, trace, "--memory", "32K", "--unit", "4", "--policy", "fifo", "--json")
    assert json.loads(out)["budgets"][0]["hit_ratio"]["fifo"] == 23 / 25


def test_options_reach_the_policy(capsys, trace):
    status, _, err = simulate(capsys, trace, "--policy", "scan", "-o", "policy.scan.kept=10")
    assert (status, err.split(" (")[0]) == (2, "edm: -o: unknown key 'policy.scan.kept'")


@pytest.mark.parametrize("memory", ["0%", "4K", "x%"])
def test_too_little_memory_is_refused(capsys, trace, memory):
    status, _, err = simulate(capsys, trace, "--memory", memory)
    assert status == 2
    assert err.startswith("edm: --memory")


def test_the_plot_is_a_picture(capsys, trace, tmp_path):
    pytest.importorskip("matplotlib")
    status, _, _ = simulate(capsys, trace, "--memory", "50%", "--plot", tmp_path / "p.svg")
    assert status == 0
    assert "<svg" in (tmp_path / "p.svg").read_text()
