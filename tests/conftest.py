"""Fixtures for every test; a folder's own are in its conftest.py."""

import faulthandler
import sys
from textwrap import dedent

import pytest


@pytest.fixture(autouse=True)
def no_dump_of_what_is_long(request):
    """Of a test that may take longer than `faulthandler_timeout`, no stacks in the middle: what dumps them reads the
    frames while they run on, and can end Python. pytest-timeout prints them where the test's own time is over.
    """
    allowed = request.node.get_closest_marker("timeout")
    if allowed and allowed.args and allowed.args[0] > float(request.config.getini("faulthandler_timeout")):
        faulthandler.cancel_dump_traceback_later()


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Install a throw-away distribution: `install("edm-transport-rdma", "edm_transport_rdma", source, …)`.

    It is a real one for importlib.metadata: a module and a .dist-info directory on sys.path, gone after the test.
    """
    site = tmp_path / "site-packages"
    site.mkdir()
    monkeypatch.syspath_prepend(site)
    before = set(sys.modules)

    def add(distribution, module, source, *, version="1.0", entry_point=None):
        (site / f"{module}.py").write_text(dedent(source))
        info = site / f"{distribution.replace('-', '_')}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n")
        (info / "entry_points.txt").write_text(f"[edm]\n{entry_point or distribution} = {module}\n")

    yield add
    for name in set(sys.modules) - before:
        file = getattr(sys.modules[name], "__file__", None)
        if file and file.startswith(str(site)):
            del sys.modules[name]
