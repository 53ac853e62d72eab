"""The coverage-guided fuzzer of the decoder: for seconds, and in `make soak` for minutes."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.timeout(400)
@pytest.mark.parametrize("seconds", [5, pytest.param(120, marks=pytest.mark.soak)])
def test_fuzzing_the_decoder_finds_nothing(tmp_path, seconds):
    if importlib.util.find_spec("atheris") is None:
        pytest.skip("needs atheris: pip install 'edm[fuzz]'")
    fuzzer = Path(__file__).with_name("fuzz_wire.py")
    done = subprocess.run(
        [sys.executable, fuzzer, str(seconds)], cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert "Done" in done.stderr
