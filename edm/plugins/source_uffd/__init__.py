"""The fault source `uffd`: Linux userfaultfd, through the C core. The default.

Its module is imported when it is opened; see `edm.plugins.source_uffd.source`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import attrs

from edm import hookimpl
from edm.hookspecs import FaultSourceSpec

if TYPE_CHECKING:
    from collections.abc import Iterable

    from edm.interfaces import FaultSource
    from edm.types import RunContext


@attrs.frozen(kw_only=True)
class UffdOptions:
    """`[fault_source.uffd]`."""

    user_mode: bool = attrs.field(
        default=False,
        metadata={
            "help": "go on where only UFFD_USER_MODE_ONLY is permitted: system calls fail on pages that are not there"
        },
    )


def _open(options: UffdOptions, settings: Any, context: RunContext) -> FaultSource:
    from edm.plugins.source_uffd.source import UffdSource  # noqa: PLC0415

    return UffdSource(options, settings, context)


def _check(options: UffdOptions) -> Iterable[str]:
    from edm.plugins.source_uffd.permission import check  # noqa: PLC0415

    return check(user_mode=options.user_mode)


@hookimpl
def edm_fault_sources() -> Iterable[FaultSourceSpec]:
    """Offer `uffd`."""
    yield FaultSourceSpec(
        name="uffd",
        summary="faults of unmodified programs, by Linux userfaultfd",
        options=UffdOptions,
        open=_open,
        check=_check,
    )
