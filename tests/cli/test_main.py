import subprocess
import sys

import click
import pytest

from edm import cli
from edm.errors import StoreFull, UsageError


def test_version_is_printed(edm):
    status, out, err = edm("--version")
    assert (status, err) == (0, "")
    assert out.startswith("edm 0.")


@pytest.mark.parametrize("argument", ["-h", "--help"])
def test_help_lists_every_command_there_is(edm, argument):
    status, out, _ = edm(argument)
    assert status == 0
    assert "plugins" in out
    assert "config" in out


def test_no_arguments_print_help_and_are_a_mistake(edm):
    status, out, err = edm()
    assert (status, out) == (2, "")
    assert "Usage: edm" in err


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["nosuch"], "edm: No such command 'nosuch' (see edm --help)\n"),
        (["config", "--transprt", "x"], None),
        (["config", "--local-memory", "3X"], None),
        (["config", "--config", "absent.toml"], "edm: cannot read absent.toml: No such file or directory\n"),
    ],
)
def test_mistake_is_one_line_and_exit_2(edm, arguments, line):
    status, out, err = edm(*arguments)
    assert (status, out) == (2, "")
    assert err.startswith("edm: ")
    assert err.count("\n") == 1
    if line:
        assert err == line


@pytest.fixture
def command(monkeypatch):
    """Put a command `edm try` in place that does what it is given."""

    def put(action):
        module = type(sys)("edm.cli.try")
        module.command = click.command("try")(action)
        monkeypatch.setitem(sys.modules, "edm.cli.try", module)
        monkeypatch.setattr(type(cli.group), "list_commands", lambda _self, _ctx: ["try"])

    return put


def _raise(error):
    def action():
        raise error

    return action


def test_own_errors_are_one_line_and_exit_2(edm, command):
    for error in (UsageError("bad\nthing"), StoreFull("no room")):
        command(_raise(error))
        status, _, err = edm("try")
        assert (status, err) == (2, f"edm: {' '.join(str(error).split())}\n")


def test_bug_is_a_traceback(command):
    command(_raise(ZeroDivisionError("a bug")))
    with pytest.raises(ZeroDivisionError):
        cli.main(["try"])


def test_commands_number_is_the_exit_status(edm, command):
    command(lambda: 77)
    assert edm("try")[0] == 77


def test_interrupt_ends_with_the_shells_status(edm, command):
    command(_raise(KeyboardInterrupt()))
    status, _, err = edm("try")
    assert status == 130
    assert "Traceback" not in err


def test_version_is_cheap():
    code = """
import sys
from edm.cli import main
try:
    main(["--version"])
except SystemExit:
    pass
heavy = {"numpy", "mpi4py", "rich", "msgpack", "edm._native"} & set(sys.modules)
assert not heavy, heavy
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_python_dash_m_is_the_same_command():
    run = subprocess.run(
        [sys.executable, "-m", "edm", "--version"], capture_output=True, text=True, timeout=60, check=True
    )
    assert run.stdout.startswith("edm 0.")


def test_reader_that_goes_away_is_no_traceback():
    run = subprocess.run(
        f"{sys.executable} -m edm --help | head -c 1",
        shell=True,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert "Traceback" not in run.stderr
    assert "Exception ignored" not in run.stderr
