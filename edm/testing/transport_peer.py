"""The programs that `TransportContract` starts: `python -m edm.testing.transport_peer dms|dm-handler RUN_DIR [LISTEN]`.

RUN_DIR/contract.json names the transport and its options. The DM-Handler's side writes RUN_DIR/results.json: for each
case "" or its traceback.
"""

from __future__ import annotations

import json
import signal
import sys
import threading
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edm.config.options import build_options
from edm.registry import Registry
from edm.testing.pages import DictServer
from edm.testing.transport_cases import CASES, DEADLINE_S, LAST_CASE, SLOW_CASES, Peer
from edm.types import RunContext

if TYPE_CHECKING:
    from collections.abc import Callable

    from edm.interfaces import Transport


def open_transport(run_dir: Path, role: str, listen: str = "") -> Transport:
    """The transport under test, as a process of this role opens it; listen: instead of the options'."""
    contract = json.loads((run_dir / "contract.json").read_text())
    spec = Registry().transport(contract["transport"])
    given = contract["options"] | ({"listen": [listen]} if listen else {})
    options = build_options(spec.options, given, dict.fromkeys(given, "the contract"), spec.name)
    store_dir = run_dir / "store"
    store_dir.mkdir(exist_ok=True)
    context = RunContext(run_dir, store_dir, role, DEADLINE_S)
    if spec.embedded:
        return spec.open(options, context, DictServer())
    return spec.open(options, context)


def serve(run_dir: Path, listen: str = "") -> None:
    """Be the DMS until every peer has gone or SIGTERM."""
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    transport = open_transport(run_dir, "dms", listen)
    transport.serve(DictServer(), stop)
    transport.close()


def run_cases(run_dir: Path) -> None:
    """Be the DM-Handler: run all cases, write what became of them."""
    transport = open_transport(run_dir, "dm-handler")
    channel = transport.connect()
    instance = int(channel.control({"op": "hello", "client": "contract", "protocol": 1})["instance"])
    peer = Peer(transport, channel, instance)
    slow = () if Registry().transport(_name(run_dir)).embedded else SLOW_CASES
    results = {}
    for number, case in enumerate((*CASES, *slow, LAST_CASE)):
        peer.region = (instance << 32) + number
        results[case.__name__] = _outcome(case, peer)
        (run_dir / "results.json").write_text(json.dumps(results))
    transport.close()


def _name(run_dir: Path) -> str:
    name: str = json.loads((run_dir / "contract.json").read_text())["transport"]
    return name


def _outcome(case: Callable[[Peer], Any], peer: Peer) -> str:
    try:
        case(peer)
    except Exception:  # noqa: BLE001  a case's failure is its result, whatever it is
        return traceback.format_exc()
    return ""


if __name__ == "__main__":
    role: Callable[..., None] = {"dms": serve, "dm-handler": run_cases}[sys.argv[1]]
    role(Path(sys.argv[2]), *sys.argv[3:])
