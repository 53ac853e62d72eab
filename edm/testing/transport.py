"""The contract of a transport, for pytest."""

from __future__ import annotations

import functools
import json
import os
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any, ClassVar, Final

import pytest

from edm.config.options import build_options
from edm.registry import Registry
from edm.testing.transport_cases import BUSY_CASES, CASES, LAST_CASE, LATE_CASES, SLOW_CASES

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from edm.types import LaunchPlan

LONGEST_S: Final = 90.0
"""For all cases together; they take about ten seconds."""
_NAMES: Final = [case.__name__ for case in (*CASES, *SLOW_CASES, LAST_CASE, *BUSY_CASES, *LATE_CASES)]


class TransportContract:
    """What a transport must do, tried with real processes, started by its own `plan`.

    Example::

        class TestRdma(TransportContract):
            transport = "rdma"

    stands_alone: memory servers serve on when the DM-Handler is gone, and are ended by SIGTERM.
    comes_back: a memory server that is started again finds its directory; not where several share that of the test.
    options: the plugin's, as a user would write them; a test may override the fixture `transport_options` where they
    depend on a directory.
    """

    transport: ClassVar[str]
    stands_alone: ClassVar[bool] = False
    comes_back: ClassVar[bool] = True
    options: ClassVar[Mapping[str, Any]] = {}

    @pytest.fixture(scope="class")
    @classmethod
    def transport_options(cls, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:  # noqa: ARG003
        """The options the transport is opened with."""
        return dict(cls.options)

    @pytest.fixture(scope="class")
    @classmethod
    def results(cls, tmp_path_factory: pytest.TempPathFactory, transport_options: dict[str, Any]) -> dict[str, str]:
        """For each case "" or its traceback: all cases run once, in a pair of processes for each of the two acts."""
        results: dict[str, str] = {"statuses": "", "log": ""}
        for act in ("cases", "late"):
            run_dir = tmp_path_factory.mktemp(cls.transport)
            found = run_contract(
                cls.transport, transport_options, run_dir, cls.plan, stands_alone=cls.stands_alone, act=act
            )
            results |= {name: results.get(name, "") + text for name, text in found.items()}
        return results

    @classmethod
    def plan(cls, options: Any, dms: tuple[str, ...], dm_handler: tuple[str, ...]) -> LaunchPlan:
        """The processes of the test: what a one-command run would start. A test of something bigger overrides it."""
        return Registry().transport(cls.transport).plan(options, dms, dm_handler)

    @pytest.mark.parametrize("case", _NAMES)
    def test_case(self, case: str, results: dict[str, str]) -> None:
        """Each case of `edm.testing.transport_cases`."""
        if Registry().transport(self.transport).embedded and case in {
            slow.__name__ for slow in (*SLOW_CASES, *LATE_CASES)
        }:
            # It calls the server itself: there is no reply that could be late.
            assert case not in results
            return
        assert results.get(case, "not run") == "", results.get(case, results.get("log"))

    def test_both_sides_end_by_themselves(self, results: dict[str, str]) -> None:
        """After the goodbye (or SIGTERM, if it stands alone) every process ends, and with status 0."""
        assert results["statuses"] == "", results["log"]

    def test_pages_are_there_after_a_crash_of_both_sides(
        self, tmp_path: Path, transport_options: dict[str, Any]
    ) -> None:
        """What was acknowledged is; the same instance goes on with it over a transport that is started again."""
        if not self.comes_back:
            return
        act = functools.partial(
            run_contract, self.transport, transport_options, tmp_path, self.plan, stands_alone=self.stands_alone
        )
        crashed = act(act="crash")
        assert (tmp_path / "instances").exists(), crashed["log"]
        after = act(act="after")
        assert after.get("after") == "", after["log"]
        assert after["statuses"] == "", after["log"]


def run_contract(
    transport: str,
    options: Mapping[str, Any],
    run_dir: Path,
    make_plan: Callable[..., LaunchPlan],
    *,
    stands_alone: bool,
    act: str = "cases",
) -> dict[str, str]:
    """Run all cases; the results, with "statuses" (exit statuses that are not 0) and "log" (what was printed).

    act: what the DM-Handler's side does. See `edm.testing.transport_peer`.
    """
    contract = {"transport": transport, "options": dict(options), "act": act}
    (run_dir / "contract.json").write_text(json.dumps(contract))
    spec = Registry().transport(transport)
    built = build_options(spec.options, options, dict.fromkeys(options, "the contract"), transport)
    peer = (sys.executable, "-m", "edm.testing.transport_peer")
    plan = make_plan(built, (*peer, "dms", str(run_dir)), (*peer, "dm-handler", str(run_dir)))
    with (run_dir / "log").open("w+") as log:
        ended_by = signal.SIGKILL if act == "crash" else signal.SIGTERM if stands_alone else None
        statuses = _run(plan, log, time.monotonic() + LONGEST_S, ended_by)
    results: dict[str, str] = {}
    if (run_dir / "results.json").exists():
        results = json.loads((run_dir / "results.json").read_text())
    results["statuses"] = " ".join(f"{command}: {status}" for command, status in statuses.items() if status)
    results["log"] = (run_dir / "log").read_text()
    return results


def _run(plan: LaunchPlan, log: Any, deadline: float, ended_by: signal.Signals | None) -> dict[str, int]:
    """Exit statuses; ended_by: what the memory servers are sent when the DM-Handler has gone."""
    environment = {**os.environ, **plan.environment}
    processes = [
        subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )
        for command in plan.commands
    ]
    try:
        processes[-1].wait(max(deadline - time.monotonic(), 0.1))
        if ended_by is not None:
            for server in processes[:-1]:
                server.send_signal(ended_by)
        return {
            " ".join(process.args): process.wait(max(deadline - time.monotonic(), 0.1))  # type: ignore[arg-type]
            for process in processes
        }
    except subprocess.TimeoutExpired as error:
        return {f"{error}": 1}
    finally:
        for process in processes:
            if process.poll() is None:
                # The session it leads holds what it started.
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
