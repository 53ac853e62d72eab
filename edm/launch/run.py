"""What `edm run` does, in order: check, prepare, start, run, finish, report."""

from __future__ import annotations

import os
import sys
import time
from typing import TYPE_CHECKING, Final

import attrs

from edm.config.machine import memory_limit
from edm.errors import EdmError, UsageError
from edm.launch import checks
from edm.launch.limits import impose_limits, lifted_limits
from edm.launch.program import die_like
from edm.launch.revival import roles_of
from edm.launch.rundir import RunDir, make_run_dir
from edm.launch.session import Outcome, RunFailed, Session
from edm.launch.summary import Progress, as_document, print_summary, write_report
from edm.launch.user import find_user
from edm.registry import Registry
from edm.sizes import format_size

if TYPE_CHECKING:
    from pathlib import Path

    from edm.config import Config
    from edm.launch.user import User
    from edm.types import LaunchPlan

USER_MISTAKE: Final = 2
EDM_FAILED: Final = 70
"""Exit status when EDM itself failed (EX_SOFTWARE of sysexits.h): never a program's result."""


@attrs.frozen
class Wishes:
    """What the user wants to see."""

    summary: bool = False
    progress: bool = False
    report: Path | None = None
    user: str | None = None
    uncaptured: bool = False
    quiet: bool = False


def run(config: Config, command: tuple[str, ...], wishes: Wishes) -> int:
    """Run a program under EDM; returns our exit status, or does not return where the program died of a signal."""
    try:
        return _run_checked(config, command, wishes)
    except checks.CommandError as error:
        return _leave_job(config, _complain(str(error), error.status))
    except UsageError as error:
        return _leave_job(config, _complain(str(error), USER_MISTAKE))


def _leave_job(config: Config, status: int) -> int:
    """As a rank that will not take part: end the job, or the other ranks wait for it for ever."""
    if config.transport == "mpi" and _is_mpi_rank():
        from edm.plugins.transport_mpi import end_job  # noqa: PLC0415

        sys.stderr.flush()
        end_job(status)
    return status


def _run_checked(config: Config, command: tuple[str, ...], wishes: Wishes) -> int:
    program = checks.find_program(command[0])
    path = command[0] if "/" in command[0] else str(program)  # a script is told how it was called
    user = find_user(wishes.user) if wishes.user is not None else None
    try:
        checks.check_capturable(program, user)
    except UsageError as error:
        if not wishes.uncaptured:
            raise
        print(f"edm: warning: {error}", file=sys.stderr)
        if user is not None:
            user.become()
        impose_limits(lifted_limits())
        os.execv(path, command)  # noqa: S606 (the user's own command line)
    if user is not None:
        checks.check_user(user, program, config)
    checks.check_budget(config)
    _say_limit(config, wishes)
    if config.path is not None:
        checks.check_directory(config.path)
    registry = Registry()
    warnings = checks.check_plugins(config, registry)
    for text in warnings:
        print(f"edm: warning: {text}", file=sys.stderr, flush=True)
    under_mpi = config.transport == "mpi" and _is_mpi_rank()
    if under_mpi and config.on_death == "wait":
        raise UsageError("--on-death wait: nobody can start a rank of a job again that was started by hand")
    run_dir = make_run_dir(config)
    try:
        config = attrs.evolve(config, path=run_dir.files)
        config.write(run_dir.sockets / "config.json")
        if under_mpi:
            return _run_as_rank(config, run_dir, path, command, wishes, user)
        return _run_session(config, run_dir, path, command, wishes, make_plan(config, registry, run_dir), user)
    finally:
        if config.keep and run_dir.files.exists():
            run_dir.keep()
            print(f"edm: kept {run_dir.files}", file=sys.stderr)
        else:
            run_dir.remove()


def _say_limit(config: Config, wishes: Wishes) -> None:
    """Say where a cgroup's limit decided the budget, and warn of a budget that will not be had."""
    limit, budget = memory_limit(), config.local_memory
    if budget is None:
        return
    if budget > limit.bytes:
        print(
            f"edm: warning: local memory of {format_size(budget)} is more than {limit}: "
            f"{'the kernel may end the program' if limit.file else 'it cannot all stay here'}; "
            f"'--local-memory auto' takes {format_size(limit.budget())}",
            file=sys.stderr,
        )
    elif config.memory_derived and limit.file is not None and not wishes.quiet:
        print(f"edm: local memory: {format_size(budget)} of {limit}", file=sys.stderr)


def make_plan(config: Config, registry: Registry, run_dir: RunDir) -> LaunchPlan:
    """The processes that the chosen transport needs."""
    spec = registry.transport(config.transport)
    python = (sys.executable, "-m")
    return spec.plan(
        config.plugin_options("transport", spec.name, spec),
        (*python, "edm.dms.process", str(run_dir.sockets / "config.json"), str(run_dir.sockets)),
        (*python, "edm.handler.process", str(run_dir.sockets)),
    )


def planned_roles(plan: LaunchPlan | None) -> list[str]:
    """Whose readiness the launcher waits for: the processes it starts itself."""
    if plan is None:
        return ["dm-handler"]
    return [role for command in plan.commands for role in roles_of(command)]


def _run_session(
    config: Config,
    run_dir: RunDir,
    path: str,
    command: tuple[str, ...],
    wishes: Wishes,
    plan: LaunchPlan | None,
    user: User | None = None,
    listening: int = -1,
) -> int:
    """plan: the processes to start; None where this is the child of one that is already there."""
    began = time.monotonic()
    session = Session(config, run_dir, planned_roles(plan))
    if listening >= 0:
        os.close(listening)
    try:
        if plan is None:
            session.wait_ready()
        else:
            session.start(plan)
        startup_s = time.monotonic() - began
        with Progress(config, enabled=wishes.progress) as progress:
            outcome = session.run(path, command, progress.update, user)
        outcome.startup_s = startup_s
    except RunFailed as error:
        session.close()
        return _complain(str(error), EDM_FAILED)
    except KeyboardInterrupt:
        session.close()
        return _complain("interrupted while starting; nothing is left running", 130)
    except BaseException:
        session.close()
        raise
    session.close()
    return _report(config, run_dir, command, wishes, outcome)


def _report(config: Config, run_dir: RunDir, command: tuple[str, ...], wishes: Wishes, outcome: Outcome) -> int:
    document = as_document(config, command, outcome)
    if wishes.report is not None:
        write_report(wishes.report, document)
    if wishes.summary:
        print_summary(document)
    elif not outcome.counters.get("processes"):
        print("edm: warning: the program was not captured: its memory was all local", file=sys.stderr)
    if outcome.ending.signal and not config.keep:
        run_dir.remove()  # dying of the program's signal leaves no time for it
    return die_like(outcome.ending)


def _is_mpi_rank() -> bool:
    from edm.plugins.transport_mpi import under_mpi  # noqa: PLC0415

    return under_mpi()


def _run_as_rank(
    config: Config, run_dir: RunDir, path: str, command: tuple[str, ...], wishes: Wishes, user: User | None
) -> int:
    """`mpiexec -n 1 edm dms … : -n 1 edm run …`: this rank is the DM-Handler, a child of it is the launcher."""
    from edm.handler import process  # noqa: PLC0415
    from edm.plugins.transport_mpi import strip_mpi_environment  # noqa: PLC0415

    listening, ready = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(listening)
        program_environment = strip_mpi_environment(dict(os.environ))
        os.environ.clear()
        os.environ.update(program_environment)
        status = EDM_FAILED
        try:
            status = _run_session(config, run_dir, path, command, wishes, None, user, ready)
        except UsageError as error:
            status = _complain(str(error), USER_MISTAKE)
        except EdmError as error:
            status = _complain(str(error), EDM_FAILED)
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    os.close(ready)
    os.read(listening, 1)
    os.close(listening)
    process.run(run_dir.sockets)
    _, wait_status = os.waitpid(child, 0)
    return 128 + os.WTERMSIG(wait_status) if os.WIFSIGNALED(wait_status) else os.WEXITSTATUS(wait_status)


def _complain(text: str, status: int) -> int:
    print(f"edm: {' '.join(text.split())}", file=sys.stderr)
    return status
