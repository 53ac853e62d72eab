"""The programs that `TransportContract` starts: `python -m edm.testing.transport_peer dms|dm-handler RUN_DIR [LISTEN]`.

RUN_DIR/contract.json names the transport, its options and the act. In the act "cases" the DM-Handler's side writes
RUN_DIR/results.json: for each case "" or its traceback; in "late" the same for those in which a deadline passes. In
"crash" it evicts pages and is killed; in "after" it comes
back as the same instance, to the same store.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from edm.config import resolve
from edm.config.options import build_options
from edm.dms.process import open_server
from edm.dms.server import MemoryServer
from edm.registry import Registry
from edm.testing.pages import DictServer, batch_of
from edm.testing.transport_cases import (
    BUSY_CASES,
    CASES,
    DEADLINE_S,
    LAST_CASE,
    LATE_CASES,
    LATE_S,
    SLOW_CASES,
    Peer,
    wanted,
)
from edm.types import PAGE_BYTES, GetStatus, RunContext

if TYPE_CHECKING:
    from collections.abc import Callable

    from edm.interfaces import PageServer, Transport
    from edm.types import PageRefs

STORED: Final = 300
"""Pages that outlive a crash."""


def open_transport(run_dir: Path, role: str, listen: str = "") -> Transport:
    """The transport under test, as a process of this role opens it; listen: instead of the options'."""
    contract = _contract(run_dir)
    spec = Registry().transport(contract["transport"])
    given = contract["options"] | ({"listen": [listen]} if listen else {})
    options = build_options(spec.options, given, dict.fromkeys(given, "the contract"), spec.name)
    context = _context(run_dir, role)
    context.store_dir.mkdir(exist_ok=True)
    if spec.embedded:
        return spec.open(options, context, _server(run_dir))
    return spec.open(options, context)


def serve(run_dir: Path, listen: str = "") -> None:
    """Be the DMS until every peer has gone or SIGTERM."""
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    server = _server(run_dir)
    transport = open_transport(run_dir, "dms", listen)
    transport.serve(server, stop)
    if isinstance(server, MemoryServer):
        server.close()
    transport.close()


def be_handler(run_dir: Path) -> None:
    """Be the DM-Handler in the act that is on."""
    {"cases": run_cases, "late": run_cases, "crash": crash, "after": come_back}[_contract(run_dir)["act"]](run_dir)


def crash(run_dir: Path) -> None:
    """Have pages stored, and die of SIGKILL."""
    channel = open_transport(run_dir, "dm-handler").connect()
    instances = channel.control({"op": "hello", "client": "contract", "protocol": 1})["instances"]
    region = int(instances[0]) << 32
    for version in (1, 2):
        assert channel.evict(*_stored(region, version)) == ""
    drop = {"op": "drop_pages", "ranges": [[region, 0, 8]], "sequence": 1}
    assert channel.control(drop)["ok"]
    (run_dir / "instances").write_text(json.dumps(instances))
    os.kill(os.getpid(), signal.SIGKILL)


def come_back(run_dir: Path) -> None:
    """Be the instance that has crashed: its pages are there, what it dropped is not, and life goes on."""
    instances = json.loads((run_dir / "instances").read_text())
    transport = open_transport(run_dir, "dm-handler")
    channel = transport.connect()
    resumed = channel.control({"op": "resume", "instances": instances})
    assert resumed["ok"], resumed
    region = int(instances[0]) << 32
    refs, pages = _stored(region, 2)
    asked, into = wanted(region, refs["index"]), bytearray(b"Z" * len(pages))
    channel.fetch(asked, memoryview(into))
    assert asked["status"].tolist() == [GetStatus.NEW_PAGE] * 8 + [GetStatus.EXISTING_PAGE] * (STORED - 8)
    assert into[: 8 * PAGE_BYTES] == b"Z" * (8 * PAGE_BYTES)
    assert into[8 * PAGE_BYTES :] == pages[8 * PAGE_BYTES :]
    refs, pages = _stored(region, 3)
    assert channel.evict(refs, pages) == ""
    channel.fetch(asked, memoryview(into))
    assert into == pages
    transport.close()
    (run_dir / "results.json").write_text(json.dumps({"after": ""}))


def _stored(region: int, version: int) -> tuple[PageRefs, memoryview]:
    refs, pages = batch_of(region, np.arange(STORED), version)
    return refs, memoryview(pages)


def run_cases(run_dir: Path) -> None:
    """Run all cases of the act, write what became of them."""
    transport = open_transport(run_dir, "dm-handler")
    channel = transport.connect()
    instance = int(channel.control({"op": "hello", "client": "contract", "protocol": 1})["instance"])
    peer = Peer(transport, channel, instance, run_dir)
    results = {}
    for number, case in enumerate(_cases(_contract(run_dir))):
        peer.region = (instance << 32) + number
        results[case.__name__] = _outcome(case, peer)
        (run_dir / "results.json").write_text(json.dumps(results))
    transport.close()


def _cases(contract: dict[str, Any]) -> tuple[Callable[[Peer], None], ...]:
    embedded = Registry().transport(contract["transport"]).embedded
    if contract["act"] == "late":
        return (*BUSY_CASES, *(() if embedded else LATE_CASES))
    return (*CASES, *(() if embedded else SLOW_CASES), LAST_CASE)


def _contract(run_dir: Path) -> dict[str, Any]:
    return {"act": "cases", **json.loads((run_dir / "contract.json").read_text())}


def _context(run_dir: Path, role: str) -> RunContext:
    deadline_s = LATE_S if _contract(run_dir)["act"] == "late" else DEADLINE_S
    return RunContext(run_dir, run_dir / "store", role, deadline_s)


def _server(run_dir: Path) -> PageServer:
    """One in a dict for the cases; one that lasts, over the stores of that directory, for a crash and what follows."""
    if _contract(run_dir)["act"] in {"cases", "late"}:
        return DictServer()
    return open_server(resolve({"store": "file"}), _context(run_dir, "dms"), Registry())


def _outcome(case: Callable[[Peer], Any], peer: Peer) -> str:
    try:
        case(peer)
    except Exception:  # noqa: BLE001  a case's failure is its result, whatever it is
        return traceback.format_exc()
    return ""


if __name__ == "__main__":
    role: Callable[..., None] = {"dms": serve, "dm-handler": be_handler}[sys.argv[1]]
    role(Path(sys.argv[2]), *sys.argv[3:])
