"""The fault source `replay`: a recorded or made-up trace of touches, played without userfaultfd and without privileges.

For tests, and for trying policies, transports and stores on a machine that allows nothing else. Every read of the
trace is checked against what the trace wrote. Its modules are imported when it is opened; the format of a trace is
described in `edm.plugins.source_replay.trace`.
"""

from __future__ import annotations

from pathlib import Path  # noqa: TC003 - read at run time, to convert what the user wrote
from typing import TYPE_CHECKING, Any, Final, Literal

import attrs

from edm import hookimpl
from edm.hookspecs import FaultSourceSpec

if TYPE_CHECKING:
    from collections.abc import Iterable

    from edm.interfaces import FaultSource
    from edm.types import RunContext

MAX_THREADS: Final = 256
MAX_PAGES: Final = 1 << 24
"""64 GiB: what is known of every page is kept, touched or not."""


def _in(least: int, most: int) -> Any:
    return attrs.validators.and_(attrs.validators.ge(least), attrs.validators.le(most))


@attrs.frozen(kw_only=True)
class ReplayOptions:
    """`[fault_source.replay]`."""

    trace: Path | None = attrs.field(default=None, metadata={"help": "a trace to play; without one, the pattern is"})
    pattern: Literal["random", "sequential", "hot"] = attrs.field(
        default="random", metadata={"help": "made-up touches: random, sequential, or hot (nine of ten in a tenth)"}
    )
    pages: int = attrs.field(
        default=0,
        validator=_in(0, MAX_PAGES),
        metadata={"help": "the program's size; 0: as the trace needs, or 16384"},
    )
    touches: int = attrs.field(
        default=100_000, validator=_in(1, 1 << 32), metadata={"help": "how many touches the pattern has"}
    )
    writes: int = attrs.field(default=30, validator=_in(0, 100), metadata={"help": "of 100 touches, how many write"})
    threads: int = attrs.field(
        default=1, validator=_in(1, MAX_THREADS), metadata={"help": "threads of the program; each has its own pages"}
    )
    seed: int = attrs.field(default=1, validator=_in(0, 1 << 63), metadata={"help": "of the pattern's random numbers"})


def _open(options: ReplayOptions, settings: Any, _context: RunContext) -> FaultSource:
    from edm.plugins.source_replay.source import ReplaySource  # noqa: PLC0415

    return ReplaySource(settings, options)


def _check(options: ReplayOptions) -> None:
    from edm.plugins.source_replay.trace import load  # noqa: PLC0415

    load(options)


@hookimpl
def edm_fault_sources() -> Iterable[FaultSourceSpec]:
    """Offer `replay`."""
    yield FaultSourceSpec(
        name="replay",
        summary="a recorded or made-up trace of touches; needs no privileges",
        options=ReplayOptions,
        open=_open,
        check=_check,
    )
