"""The DM-Handler's main program: `python -m edm.handler.process RUN_DIR`.

It reads RUN_DIR/config.json, reports to the launcher over RUN_DIR/control.sock (one JSON object a line), and serves
until the launcher says finish, or, when the launcher has gone, until the last captured program has.
"""

from __future__ import annotations

import json
import logging
import os
import queue
import shutil
import signal
import socket
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import setproctitle

from edm import faultpoints, privileges
from edm._native import lib
from edm.config import Config
from edm.engine import IDLE_BITS
from edm.errors import EdmError, NativeError, PeerLost, PluginBroken, TransportError, UsageError
from edm.handler.inheritance import inherited, leave
from edm.handler.tracing import Recorder
from edm.handler.uncaptured import Uncaptured
from edm.handler.watching import Bare, Stall
from edm.handler.workers import Workers
from edm.interfaces import TakesPolicy
from edm.ops import POLICY, POLICY_BYTES, address_of
from edm.peers import peer_of
from edm.registry import Registry
from edm.types import Inheritance, RunContext

if TYPE_CHECKING:
    from edm.interfaces import FaultSource, PageServer, Transport

log = logging.getLogger(__name__)

REPORT_EVERY_S: Final = 0.2
DRAIN_S: Final = 30.0
ANSWER_S: Final = 10.0
"""Longest wait for one answer of the memory server, before it counts as lost."""


class Launcher:
    """The line to `edm run`: events go there, commands come from it."""

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.connect(str(path))
        peer = peer_of(self._socket)
        if not peer.trusted:
            raise EdmError(f"{path} is user {peer.uid}'s")
        self.pid = peer.pid
        self.commands: queue.Queue[str] = queue.Queue()
        self._lock = threading.Lock()
        self.gone = False

    def listen(self) -> None:
        """Start reading commands into `commands`."""
        threading.Thread(target=self._read, name="edm-control", daemon=True).start()

    def say(self, event: str, **details: Any) -> None:
        """Send one event; a launcher that has gone hears nothing."""
        line = json.dumps({"role": "dm-handler", "pid": os.getpid(), "event": event, **details}) + "\n"
        with self._lock:
            try:
                self._socket.sendall(line.encode())
            except OSError:
                self.gone = True

    def _read(self) -> None:
        try:
            with self._socket.makefile("r") as lines:
                for line in lines:
                    self.commands.put(json.loads(line)["command"])
        except (OSError, ValueError) as error:
            log.debug("the launcher's line broke: %s", error)
        self.gone = True
        self.commands.put("launcher gone")


def start_holder(launcher_pid: int, *, waits: bool = False) -> int:
    """Start the process that keeps every uffd when this one dies; returns its pid. Before any thread is started.

    waits: when the launcher has died too it keeps the programs waiting, and does not end them.
    """
    pid: int = lib.edm_holder_start(launcher_pid, waits)
    if pid < 0:
        raise NativeError(-pid, "starting the holder")
    return pid


class Holder:
    """The process that keeps this one's descriptors, watched: without it our own death would be the programs' end."""

    def __init__(self, launcher: Launcher, run_dir: Path, *, waits: bool) -> None:
        self._launcher = launcher
        self._run_dir = run_dir
        self._waits = waits
        self._source: Any = None
        self._instances: tuple[int, ...] = ()
        self.pid = start_holder(launcher.pid, waits=waits)

    def serve(self, source: FaultSource, inheritance: Inheritance | None) -> None:
        """Have it keep what `source` is to go on from, and tell the launcher."""
        self._source = source if hasattr(source, "held_by") else None
        self._instances = inheritance.instances if inheritance else ()
        self._tell()

    def known_as(self, instances: tuple[int, ...]) -> None:
        """Note this DM-Handler's numbers at the memory servers: from now on another can take over."""
        if instances != self._instances:
            self._instances = instances
            self._tell()

    def watch(self) -> None:
        """Start another where it has ended, and say so."""
        if self.pid and os.waitpid(self.pid, os.WNOHANG)[0]:
            self.pid = start_holder(self._launcher.pid, waits=self._waits)
            self._tell()

    def end(self) -> None:
        """End it, once no program needs it."""
        pid, self.pid = self.pid, 0
        end_holder(pid)

    def _tell(self) -> None:
        segment = self._source.held_by(self.pid) if self._source is not None else -1
        if segment >= 0 and self._instances:
            leave(self._run_dir, Inheritance(self.pid, segment, self._instances))
        self._launcher.say("holder", holder=self.pid, segment=segment)


def end_holder(pid: int) -> None:
    """End the holder, once no program needs it."""
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


class DmHandler:
    """One DM-Handler: opened in order, closed in reverse."""

    def __init__(self, config: Config, run_dir: Path, launcher: Launcher, inheritance: Inheritance | None) -> None:
        self._config = config
        self._launcher = launcher
        self._failure: queue.Queue[BaseException] = queue.Queue()
        self.last_error = ""
        self._uncaptured = Uncaptured(config.local_memory)
        registry = Registry()
        context = RunContext(
            run_dir=run_dir,
            store_dir=Path(config.path or run_dir) / "store",
            role="dm-handler",
            deadline_s=min(ANSWER_S, max(1.0, config.patience_s)),
            inheritance=inheritance,
        )
        self._server: PageServer | None = None
        settings = config.handler_settings()
        # Programs that wait come first: their descriptors are ours before anything else is tried, and the stores are
        # free when the former holder, which keeps their locks too, is gone.
        self.source: FaultSource = self._open_source(registry, context)
        self.holder = Holder(launcher, run_dir, waits=config.on_death == "wait")
        self.holder.serve(self.source, inheritance)
        if inheritance is not None:
            self.source.release()  # type: ignore[attr-defined]
        self._transport = self._open_transport(registry, context)
        self._control = self._transport.connect()
        self.instances = self._greet(inheritance)
        self.holder.known_as(self.instances)
        self._tracing = Recorder(self.source, config.trace) if config.trace is not None else None
        self._policy = self._choose_policy(registry)
        if hasattr(self.source, "admit_below"):
            self.source.admit_below(launcher.pid)
        self.source.start(self.instances[0])
        self._workers = Workers(
            self.source,
            self._transport,
            fault_threads=settings.fault_threads,
            patience_s=settings.patience_s,
            on_loss=settings.on_loss,
            cpus=settings.cpus,
            failed=self._failed,
            warn=self._warn,
        )
        self._workers.start()
        # A memory server elsewhere that does not answer is the workers' to notice.
        self._stall = Stall(self._warn, patience_s=settings.patience_s, ends=settings.on_loss == "kill")
        self._bare = Bare(self._warn)

    def _warn(self, text: str) -> None:
        self._launcher.say("warning", message=text)

    def _open_source(self, registry: Registry, context: RunContext) -> FaultSource:
        spec = registry.fault_source(self._config.fault_source)
        options = self._config.plugin_options("fault_source", spec.name, spec)
        return spec.open(options, self._config.handler_settings(), context)

    def _choose_policy(self, registry: Registry) -> object:
        """Have the source evict in the order the user chose; what is returned must live as long as the source."""
        spec = registry.policy(self._config.policy)
        if not isinstance(self.source, TakesPolicy) or spec.open is None:
            raise UsageError(f"fault source {self._config.fault_source!r} cannot evict by policy {spec.name!r}")
        policy = spec.open(self._config.plugin_options("policy", spec.name, spec))
        table = address_of(policy, POLICY, POLICY_BYTES)
        if not table:
            raise PluginBroken(f"policy {spec.name!r} offers no table {POLICY.decode()!r} of this version of edm")
        if refused := self.source.use_policy(table):
            self._warn(
                f"policy {spec.name}: the kernel does not say which pages were touched "
                f"({IDLE_BITS.decode()}: {os.strerror(refused)}); it does without"
            )
        return policy

    def _greet(self, inheritance: Inheritance | None) -> tuple[int, ...]:
        """Say hello, or go on as who died; returns this DM-Handler's numbers, one from each memory server."""
        if inheritance is None:
            client = f"{socket.gethostname()}:{os.getpid()}"
            request: dict[str, Any] = {"op": "hello", "client": client, "protocol": 1}
        else:
            request = {"op": "resume", "instances": list(inheritance.instances)}
        answer = self._control.control(request)
        if not answer.get("ok"):
            raise EdmError(f"the memory server refused this DM-Handler: {answer.get('error')}")
        return inheritance.instances if inheritance else tuple(answer.get("instances") or [int(answer["instance"])])

    def _open_transport(self, registry: Registry, context: RunContext) -> Transport:
        spec = registry.transport(self._config.transport)
        options = self._config.plugin_options("transport", spec.name, spec)
        if not spec.embedded:
            return spec.open(options, context)
        from edm.dms.process import open_server  # noqa: PLC0415 (only an embedded DMS needs the stores here)
        from edm.dms.reports import Forwarding  # noqa: PLC0415

        Forwarding(self._warn).start()
        self._server = open_server(self._config, context, registry)
        return spec.open(options, context, self._server)

    def _failed(self, error: BaseException) -> None:
        self._failure.put(error)
        self._launcher.commands.put("failed")

    def serve(self) -> None:
        """Report counters until told to finish; raises what a worker raised."""
        while True:
            try:
                command = self._launcher.commands.get(timeout=REPORT_EVERY_S)
            except queue.Empty:
                command = "report"
            if not self._failure.empty():
                raise self._failure.get()
            self.holder.watch()
            if command == "finish":
                return
            if command == "pids":
                self._launcher.say("pids", pids=self._pids())
            if self._launcher.gone and not self.source.counters()["spaces"]:
                return
            self._look_at_uncaptured()
            counters, now = self.source.counters(), time.monotonic()
            self._bare.look(counters)
            if self._server is not None:
                self._stall.look(counters)
            self._launcher.say(
                "counters",
                at=now,
                counters=counters,
                error=self._engine_error(),
                uncaptured=self._uncaptured.peak,
                pids=self._pids(),
            )

    def _look_at_uncaptured(self) -> None:
        warning = self._uncaptured.look(self._pids())
        if warning:
            self._warn(warning)

    def _pids(self) -> list[int]:
        pids = getattr(self.source, "pids", None)
        return pids() if pids else []

    def _engine_error(self) -> str:
        error = getattr(self.source, "error", None)
        return error() if error else ""

    def close(self) -> dict[str, int]:
        """Wait for the programs' ends to be noticed, send what is queued, say goodbye; returns the last counters."""
        end = time.monotonic() + DRAIN_S
        while self.source.counters()["spaces"] and time.monotonic() < end:
            time.sleep(0.002)
        counters, self.last_error = self.source.counters(), self._engine_error()
        if self._tracing is not None:
            self._tracing.close()
        self.source.stop()
        if not self._workers.join(DRAIN_S):
            raise EdmError("a worker did not end: the memory server keeps it waiting")
        try:
            self._control.control({"op": "bye"})
        except TransportError as error:
            log.debug("goodbye: %s", error)  # it may have gone first; everything was acknowledged
        self._control.close()
        self._transport.close()
        close = getattr(self._server, "close", None)
        if close:
            close()
        self.source.close()
        return counters


def run(run_dir: Path) -> int:
    """Serve a run; returns the exit status."""
    setproctitle.setproctitle("edm: dm-handler")
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTSTP):
        signal.signal(number, signal.SIG_IGN)  # a terminal's keys are for the program
    launcher = Launcher(run_dir / "control.sock")
    takes_over = served = False
    try:
        config = Config.read(run_dir / "config.json")
        give_up_privileges(config)
        launcher.listen()
        launcher.say("started")
        faultpoints.arm("dm-handler")
        inheritance = inherited(run_dir)
        takes_over = inheritance is not None
        handler = DmHandler(config, run_dir, launcher, inheritance)
        served = True
        launcher.say("ready", instances=handler.instances, environment=handler.source.prepare({}))
        handler.serve()
        counters = handler.close()
        launcher.say("finished", counters=counters, error=handler.last_error)
        if launcher.gone:
            remove_run(run_dir)  # nobody else will
        handler.holder.end()
    except EdmError as error:
        launcher.say(
            "error", message=str(error), lost=isinstance(error, PeerLost), mistake=isinstance(error, UsageError)
        )
        # While it takes over it ends at once, as if it had been killed: another is started.
        return _leave(launcher) if served or not takes_over else 1
    except Exception as error:
        log.exception("the DM-Handler failed")
        # As if it had been killed here: another takes over.
        launcher.say("error", message=f"internal error in the DM-Handler: {_named(error)}", internal=True)
        return 1
    return 0


def _named(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".removesuffix(": ")


def give_up_privileges(config: Config) -> None:
    """Keep what serving programs takes; before any thread is started."""
    frames = [privileges.FRAMES] if config.record_pfn or Path(os.fsdecode(IDLE_BITS)).exists() else []
    places = [place for place in (config.path, config.trace and config.trace.parent) if place is not None]
    transport = Registry().transport(config.transport)
    privileges.keep_only([*privileges.HANDLER, *frames, *transport.capabilities], writes_to=places)


def remove_run(run_dir: Path) -> None:
    """Remove the directories of a run whose launcher was killed."""
    config = Config.read(run_dir / "config.json")
    if config.path is not None and not config.keep:
        shutil.rmtree(config.path, ignore_errors=True)
    shutil.rmtree(run_dir, ignore_errors=True)


def _leave(launcher: Launcher) -> int:
    """After an error: the launcher ends the programs and the holder. Without a launcher the holder does so itself."""
    if launcher.gone:
        return 1
    end = time.monotonic() + DRAIN_S
    while time.monotonic() < end and not launcher.gone:
        time.sleep(0.01)
    return 1


def main() -> None:
    """Entry point of the module."""
    logging.basicConfig(level=os.environ.get("EDM_INTERNAL_LOG", "WARNING"), format="edm: dm-handler: %(message)s")
    sys.stdout.flush()
    status = run(Path(sys.argv[1]))
    sys.stderr.flush()
    if status:
        os._exit(status)  # threads may hang in a transport that no longer answers
    sys.exit(status)


if __name__ == "__main__":
    main()
