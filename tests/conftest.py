"""Fixtures for every test; a folder's own are in its conftest.py."""

import sys
from textwrap import dedent

import pytest


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
