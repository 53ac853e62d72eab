"""Fixtures for the command line's tests."""

import pytest

from edm.cli import main


@pytest.fixture
def edm(capsys, monkeypatch, tmp_path):
    """Run the command line in this process, in an empty directory: `status, out, err = edm("plugins", "--json")`."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        with pytest.raises(SystemExit) as exit_:
            main(arguments)
        captured = capsys.readouterr()
        return exit_.value.code, captured.out, captured.err

    return run
