"""Addresses: which there are, which are this machine's own, and which demand keys."""

from __future__ import annotations

import ipaddress
import re
from typing import TYPE_CHECKING, Final

from edm.errors import UsageError

if TYPE_CHECKING:
    from pathlib import Path

    from edm.plugins.transport_zmq import ZmqOptions

_TCP: Final = re.compile(r"tcp://(?P<host>\[[0-9a-fA-F:.%\w]+\]|[^\s:/\[\]]+):(?P<port>\d{1,5}|\*)")
_LONGEST_IPC: Final = 107
"""Bytes of a socket file's path. Source: unix(7)."""


def check_endpoints(options: ZmqOptions) -> None:
    """Raise `UsageError` for an address that is none, or that needs keys which are not there."""
    for endpoint in (*options.dms, *options.listen):
        _check(endpoint)
    if options.insecure:
        return
    for endpoint in options.dms:
        if not is_private(endpoint) and not (options.server_key and options.key):
            raise UsageError(
                f"transport.zmq.dms: {endpoint} is not this machine: give transport.zmq.server_key and "
                "transport.zmq.key (see 'edm keys new'), or transport.zmq.insecure=true on a network you trust"
            )
    for endpoint in options.listen:
        if not is_private(endpoint) and not (options.key and options.clients):
            raise UsageError(
                f"transport.zmq.listen: {endpoint} can be reached from other machines: give transport.zmq.key and "
                "transport.zmq.clients (see 'edm keys new'), or transport.zmq.insecure=true on a network you trust"
            )


def is_private(endpoint: str) -> bool:
    """Whether only this machine reaches the address: a socket file, or TCP over the loopback interface."""
    tcp = _TCP.fullmatch(endpoint)
    if tcp is None:
        return True
    host = tcp["host"].strip("[]")
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        # A name, an interface or *: may lead anywhere.
        return False


def own_endpoint(run_dir: Path) -> str:
    """The address of a run's private memory server: a socket file in its private directory."""
    endpoint = f"ipc://{run_dir}/pages.sock"
    _check(endpoint)
    return endpoint


def _check(endpoint: str) -> None:
    if endpoint.startswith("ipc://"):
        path = endpoint.removeprefix("ipc://")
        if not path or len(path.encode()) > _LONGEST_IPC:
            raise UsageError(f"bad address '{endpoint}': a socket file's path has 1 to {_LONGEST_IPC} bytes")
        return
    tcp = _TCP.fullmatch(endpoint)
    if tcp is None or (tcp["port"] != "*" and int(tcp["port"]) > 65535):
        raise UsageError(f"bad address '{endpoint}': use tcp://HOST:PORT or ipc://PATH")
