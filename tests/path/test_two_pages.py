"""A budget of two pages: every touch of another page evicts one, with as many threads as there are pages and more."""

import os
import time

import attrs
import pytest

from edm.config.settings import HandlerSettings
from edm.plugins.source_replay import ReplayOptions

SOAK_S = float(os.environ.get("EDM_SOAK_S", "1800"))
SETTINGS = HandlerSettings(local_pages=2, write_back_pages=2, fault_threads=2)
OPTIONS = ReplayOptions(pages=64, touches=2000, writes=50)


def churn(play, seed, touches):
    """One trace, another pattern, number of threads, buffer and way to ask each time; returns its counters."""
    settings = attrs.evolve(
        SETTINGS, write_back_pages=1 + seed % 4, track_writes=seed % 2 == 0, ask=seed % 3 == 0, ahead_pages=seed % 5 * 8
    )
    pattern = ("random", "sequential", "hot")[seed % 3]
    options = attrs.evolve(OPTIONS, pattern=pattern, seed=seed + 1, touches=touches, threads=(1, 2, 7)[seed // 3 % 3])
    counters = play(settings, options)
    assert counters["lost"] == counters["internal_errors"] == 0
    assert counters["peak_resident"] <= 2 + settings.ahead_pages + options.threads, counters
    assert counters["evictions"] > touches / 8
    return counters


@pytest.mark.parametrize("seed", range(3))
def test_a_program_within_two_pages(play, seed):
    churn(play, seed, 1000)


@pytest.mark.soak
@pytest.mark.timeout(SOAK_S + 300)
def test_programs_within_two_pages_for_as_long_as_one_likes(play):
    end, seed, evictions = time.monotonic() + SOAK_S, 0, 0
    while time.monotonic() < end:
        evictions += churn(play, seed, 20_000)["evictions"]
        seed += 1
    print(f"{seed} runs, {evictions} evictions")
