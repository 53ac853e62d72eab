"""The fault source `uffd`: Linux userfaultfd, through the C core. The default.

Its module is imported when it is opened; see `edm.plugins.source_uffd.source`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from edm import hookimpl
from edm.hookspecs import FaultSourceSpec, NoOptions

if TYPE_CHECKING:
    from collections.abc import Iterable

    from edm.interfaces import FaultSource
    from edm.types import RunContext


def _open(_options: NoOptions, settings: Any, context: RunContext) -> FaultSource:
    from edm.plugins.source_uffd.source import UffdSource  # noqa: PLC0415

    return UffdSource(settings, context)


def _check(_options: NoOptions) -> None:
    from edm.plugins.source_uffd.permission import check  # noqa: PLC0415

    check()


@hookimpl
def edm_fault_sources() -> Iterable[FaultSourceSpec]:
    """Offer `uffd`."""
    yield FaultSourceSpec(
        name="uffd", summary="faults of unmodified programs, by Linux userfaultfd", open=_open, check=_check
    )
