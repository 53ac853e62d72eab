import json
from pathlib import Path

import pytest

PLUGINS = """
    import attrs
    import edm
    from edm.hookspecs import FaultSourceSpec, PageStoreSpec, SptStoreSpec, TransportSpec

    @attrs.frozen
    class Options:
        rails: int = 2

    @edm.hookimpl
    def edm_fault_sources():
        yield FaultSourceSpec(name="t-source", summary="for tests", open=print)

    @edm.hookimpl
    def edm_transports():
        yield TransportSpec(name="t-wire", summary="for tests", options=Options, open=print, plan=print)

    @edm.hookimpl
    def edm_spt_stores():
        yield SptStoreSpec(name="t-store", summary="for tests", open=print)

    @edm.hookimpl
    def edm_page_stores():
        yield PageStoreSpec(name="t-store", summary="for tests", open=print)
"""

CHOICE = ["--fault-source", "t-source", "--transport", "t-wire", "--store", "t-store"]


@pytest.fixture(autouse=True)
def plugins(install, monkeypatch):
    for name in ("EDM_LOCAL_MEMORY", "EDM_TRANSPORT", "EDM_STORE"):
        monkeypatch.delenv(name, raising=False)
    install("edm-test-plugins", "edm_test_plugins", PLUGINS)


def test_every_value_is_shown_with_where_it_came_from(edm, monkeypatch):
    monkeypatch.setenv("EDM_LOCAL_MEMORY", "64M")
    Path("edm.toml").write_text("keep = true\n[transport.t-wire]\nrails = 3\n")
    status, out, err = edm("config", *CHOICE, "--low", "25%")
    assert (status, err) == (0, "")
    rows = {line.split()[0]: line.split()[1:] for line in out.splitlines()}
    assert rows["transport"] == ["t-wire", "--transport"]
    assert rows["page_store"] == ["t-store", "--store"]
    assert rows["local_memory"] == ["64M", "EDM_LOCAL_MEMORY"]
    assert rows["low"] == ["4096", "pages", "--low"]
    assert rows["high"] == ["auto", "default"]
    assert rows["keep"] == ["true", "edm.toml"]
    assert rows["transport.t-wire.rails"] == ["3", "edm.toml"]


def test_json_has_value_and_origin(edm):
    status, out, _ = edm("config", *CHOICE, "--json", "-o", "transport.t-wire.rails=4", "--no-track-writes")
    document = json.loads(out)
    assert status == 0
    assert document["transport"] == {"value": "t-wire", "origin": "--transport"}
    assert document["track_writes"] == {"value": False, "origin": "--track-writes"}
    assert document["write_back"] == {"value": 16 << 20, "origin": "default"}
    assert document["transport.t-wire.rails"] == {"value": 4, "origin": "-o transport.t-wire.rails"}


def test_help_shows_every_setting(edm):
    _, out, _ = edm("config", "--help")
    for argument in ("--fault-source", "--store", "--local-memory", "--no-track-writes", "--cpus", "--config"):
        assert argument in out
