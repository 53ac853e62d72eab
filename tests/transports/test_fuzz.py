"""The coverage-guided fuzzer of the decoder, for `make soak`."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.soak
@pytest.mark.timeout(400)
def test_fuzzing_the_decoder_finds_nothing(tmp_path):
    if importlib.util.find_spec("atheris") is None:
        pytest.skip("needs atheris: pip install 'edm[fuzz]'")
    fuzzer = Path(__file__).with_name("fuzz_wire.py")
    done = subprocess.run(
        [sys.executable, fuzzer, "120"], cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert "Done" in done.stderr
