"""The transport `zmq`: a memory server that stands alone, reached by TCP or, on one machine, a socket file.

Place on the path: carries [5] and [11]. pyzmq (the extra `zmq`) is imported when the transport opens.
"""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Any

import attrs

from edm import hookimpl
from edm.errors import MissingExtra
from edm.hookspecs import TransportSpec
from edm.plugins.transport_zmq.endpoints import check_endpoints
from edm.types import LaunchPlan

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from edm.interfaces import Transport
    from edm.types import RunContext

__all__ = ["ZmqOptions", "open_transport"]


def _option(default: Any, text: str) -> Any:
    return attrs.field(default=default, metadata={"help": text})


@attrs.frozen(kw_only=True)
class ZmqOptions:
    """Where memory servers are, who may speak to whom, and how long silence may last."""

    dms: tuple[str, ...] = _option((), "memory servers that run already: tcp://HOST:PORT, …; none: start a private one")
    listen: tuple[str, ...] = _option((), "where a memory server listens: tcp://0.0.0.0:7070, ipc:///run/edm.sock")
    key: Path | None = attrs.field(
        default=None, metadata={"help": "this side's secret key, as 'edm keys new' makes it"}
    )
    server_key: str = _option("", "the memory server's public key, or a file that holds it")
    clients: Path | None = attrs.field(
        default=None, metadata={"help": "public keys of the clients a memory server lets in, one a line"}
    )
    insecure: bool = _option(False, "do without keys on a network; only where everybody on it may read and write")
    heartbeat_s: float = _option(1.0, "ask a silent peer for a sign of life this often")
    silence_s: float = _option(4.0, "drop a connection after such a silence, and connect anew")
    resend_s: float = _option(1.0, "send a request again after so long without an answer")


def check(options: ZmqOptions) -> None:
    """Raise `UsageError` where pyzmq or a key is missing."""
    if importlib.util.find_spec("zmq") is None:
        raise MissingExtra("the transport 'zmq' needs pyzmq: pip install 'edm[zmq]'")
    check_endpoints(options)


def open_transport(options: ZmqOptions, context: RunContext, server: Any = None) -> Transport:  # noqa: ARG001
    """Open the side that `context.role` names; raises `UsageError`."""
    check(options)
    from edm.plugins.transport_zmq.client import ZmqClient  # noqa: PLC0415
    from edm.plugins.transport_zmq.serving import ZmqServing  # noqa: PLC0415

    return ZmqServing(options, context) if context.role == "dms" else ZmqClient(options, context)


def plan(options: ZmqOptions, dms: tuple[str, ...], dm_handler: tuple[str, ...]) -> LaunchPlan:
    """A private memory server beside the DM-Handler, unless one is named that runs already."""
    check(options)
    return LaunchPlan((dm_handler,) if options.dms else (dms, dm_handler))


@hookimpl
def edm_transports() -> Iterable[TransportSpec]:
    """Offer `zmq`."""
    yield TransportSpec(
        name="zmq",
        summary="ZeroMQ over TCP or a socket file: memory servers that stand alone (extra: zmq)",
        options=ZmqOptions,
        open=open_transport,
        plan=plan,
        check=check,
    )
