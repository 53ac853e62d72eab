"""Has a DM-Handler and a memory server run with the sanitized extension, and with the sanitizer loaded before them.

Python imports this module at its start where tests/sanitized/run.py has put it on its path. The launcher, the tests and
the programs are left as they are: a sanitizer wants to be there first, and a program's memory is the program's.
"""

import importlib.util
import os
import sys
from pathlib import Path

ROLES = {"edm.handler.process", "edm.dms.process"}
NAME = "edm._native"


def load(path):
    """Be the module of that name before anybody imports it."""
    spec = importlib.util.spec_from_file_location(NAME, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[NAME] = module
    spec.loader.exec_module(module)


if ROLES & set(sys.orig_argv):
    if os.environ.get("LD_PRELOAD") == os.environ["EDM_TEST_SANITIZER"]:
        load(os.environ["EDM_TEST_EXTENSION"])
        Path(os.environ["EDM_TEST_REPORTS"], f"ran.{os.getpid()}").touch()
    else:
        environment = {**os.environ, "LD_PRELOAD": os.environ["EDM_TEST_SANITIZER"]}
        os.execve(sys.executable, sys.orig_argv, environment)  # this very command once more
