"""The transport `inproc`: the DMS inside the DM-Handler's process, called directly; nothing is serialised.

Place on the path: between a worker of the DM-Handler [5] and the `PageServer` [6-11], which is called under a lock
since it serves one thread at a time. The reference for what the other transports must do.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from edm import hookimpl
from edm.errors import UsageError
from edm.hookspecs import NoOptions, TransportSpec
from edm.types import LaunchPlan

if TYPE_CHECKING:
    from collections.abc import Iterable

    from edm.interfaces import PageServer, Transport
    from edm.types import RunContext


def open_transport(_options: NoOptions, context: RunContext, server: PageServer | None = None) -> Transport:
    """Open it around a `PageServer`; raises `UsageError` in a process that has none."""
    if server is None:
        raise UsageError("the transport 'inproc' lives inside 'edm run'; a DMS that stands alone needs mpi or zmq")
    from edm.plugins.transport_inproc.transport import InprocTransport  # noqa: PLC0415

    return InprocTransport(server, context.deadline_s)


def plan(_options: NoOptions, _dms: tuple[str, ...], dm_handler: tuple[str, ...]) -> LaunchPlan:
    """One process: the DM-Handler."""
    return LaunchPlan((dm_handler,))


@hookimpl
def edm_transports() -> Iterable[TransportSpec]:
    """Offer `inproc`."""
    yield TransportSpec(
        name="inproc",
        summary="the DMS inside the DM-Handler; nothing leaves the process",
        open=open_transport,
        plan=plan,
        embedded=True,
    )
