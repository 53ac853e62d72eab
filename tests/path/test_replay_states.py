"""Any sequence of touches, address-space changes and forks: every page of every program holds what it must."""

import contextlib
import tempfile
from pathlib import Path as Directory

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, precondition, rule

from edm.config.settings import HandlerSettings
from edm.engine import Engine
from edm.plugins.source_replay.program import ReplayProgram

from .conftest import Path

PAGES = 160
pages = st.integers(0, PAGES - 1)
counts = st.integers(1, 70)


class Programs(RuleBasedStateMachine):
    """Programs under one small budget, each beside an array that says what its pages hold."""

    programs = Bundle("programs")

    def __init__(self):
        super().__init__()
        self.stack = contextlib.ExitStack()

    @initialize(
        target=programs,
        budget=st.sampled_from([1, 2, 5, 16, 40]),
        buffer=st.sampled_from([1, 4, 64]),
        track=st.booleans(),
        ask=st.booleans(),
    )
    def start(self, budget, buffer, track, ask):
        directory = Directory(self.stack.enter_context(tempfile.TemporaryDirectory()))
        asked = HandlerSettings(local_pages=budget, write_back_pages=buffer, track_writes=track, ask=ask)
        self.engine = self.stack.enter_context(contextlib.closing(Engine(asked)))
        self.path = Path(directory, self.engine, asked)
        self.alive = []
        return self.another()

    @precondition(lambda self: len(self.alive) < 2)
    @rule(target=programs)
    def another(self):
        return self.join(ReplayProgram(self.engine, self.path.instance, PAGES), np.zeros(PAGES, np.uint64))

    def join(self, program, held):
        self.alive.append((program, held))
        return self.alive[-1]

    @rule(entry=programs, page=pages, value=st.integers(0, 2**64 - 1))
    def write(self, entry, page, value):
        program, held = entry
        program.write(page, value)
        held[page] = value

    @rule(entry=programs, page=pages, count=counts, value=st.integers(1, 2**32))
    def write_run(self, entry, page, count, value):
        program, held = entry
        for at in range(page, min(page + count, PAGES)):
            program.write(at, value + at)
            held[at] = value + at

    @rule(entry=programs, page=pages, count=counts)
    def read_run(self, entry, page, count):
        program, held = entry
        end = min(page + count, PAGES)
        assert [program.read(at) for at in range(page, end)] == held[page:end].tolist()

    @rule(entry=programs, page=pages, count=counts, unmap=st.booleans())
    def remove(self, entry, page, count, unmap):
        program, held = entry
        count = min(count, PAGES - page)
        (program.unmap if unmap else program.remove)(page, count)
        held[page : page + count] = 0

    @rule(entry=programs, page=pages, to=pages, count=counts)
    def remap(self, entry, page, to, count):
        program, held = entry
        count = min(count, PAGES - page, PAGES - to, abs(page - to))
        if count:
            program.remap(page, count, to)
            held[to : to + count] = held[page : page + count]
            held[page : page + count] = 0

    @precondition(lambda self: len(self.alive) < 5)
    @rule(target=programs, entry=programs)
    def fork(self, entry):
        program, held = entry
        return self.join(program.fork(), held.copy())

    @rule(entry=consumes(programs))
    def end(self, entry):
        entry[0].close()
        self.alive.remove(entry)

    @rule(entry=programs, page=pages, count=counts, pinned=st.booleans())
    def pin(self, entry, page, count, pinned):
        entry[0].pin(page, min(count, PAGES - page), pinned=pinned)

    @invariant()
    def engine_is_sound(self):
        if hasattr(self, "engine"):
            assert self.engine.error() == ""

    def teardown(self):
        try:
            if not hasattr(self, "alive"):
                return
            for program, held in self.alive:
                assert [program.read(page) for page in range(PAGES)] == held.tolist()
            assert self.engine.counters()["lost"] == 0
            for program, _ in self.alive:
                program.close()
            self.path.finish()
        finally:
            self.stack.close()


def some(examples):
    """The machine as a test of so many examples."""

    class Case(Programs.TestCase):
        settings = settings(
            max_examples=examples, stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck)
        )

    return Case


TestPrograms = some(30)
TestManyPrograms = pytest.mark.soak(pytest.mark.timeout(1800)(some(1500)))
