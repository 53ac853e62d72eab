import os
from pathlib import Path

import pytest

from edm.config import Config, HandlerSettings, resolve
from edm.config.machine import memory_limit
from edm.errors import UnknownPlugin, UsageError
from edm.registry import Registry

STORES = """
    from pathlib import Path
    from typing import Literal

    import attrs
    import edm
    from edm.hookspecs import FaultSourceSpec, PageStoreSpec, SptStoreSpec, TransportSpec

    @attrs.frozen
    class Both:
        map_size: int = attrs.field(default=1 << 30, metadata={"type": "size"})
        sync: Literal["full", "none"] = "full"

    @attrs.frozen
    class Pages(Both):
        extent_pages: int = 64
        compress: bool = False
        hosts: tuple[str, ...] = ()
        where: Path | None = None
        ratio: float = attrs.field(default=0.5, validator=attrs.validators.le(1.0))

    @attrs.frozen
    class Wire:
        spin_us: int = 200

    @edm.hookimpl
    def edm_fault_sources():
        yield FaultSourceSpec(name="t-source", summary="for tests", open=print)

    @edm.hookimpl
    def edm_transports():
        yield TransportSpec(name="t-wire", summary="for tests", options=Wire, open=print, plan=print)

    @edm.hookimpl
    def edm_spt_stores():
        yield SptStoreSpec(name="t-both", summary="for tests", options=Both, open=print)
        yield SptStoreSpec(name="t-spt", summary="for tests", open=print)

    @edm.hookimpl
    def edm_page_stores():
        yield PageStoreSpec(name="t-both", summary="for tests", options=Pages, open=print)
        yield PageStoreSpec(name="t-pages", summary="for tests", options=Pages, open=print)
"""


@pytest.fixture
def given(install, tmp_path):
    """Resolve with plugins of this test's own: `given(settings, options, env=…, toml=…, pyproject=…)`."""
    install("edm-test-plugins", "edm_test_plugins", STORES)

    def resolved(settings=None, options=(), *, env=None, toml="", pyproject="", **named):
        (tmp_path / "edm.toml").write_text(toml)
        (tmp_path / "pyproject.toml").write_text(pyproject)
        chosen = {"fault_source": "t-source", "transport": "t-wire", "store": "t-both", **(settings or {})}
        return resolve(chosen, options, environ=env or {}, directory=tmp_path, **named)

    return resolved


def test_defaults_are_the_documented_ones():
    config = Config()
    assert (config.fault_source, config.transport, config.spt_store, config.page_store) == (
        "uffd",
        "mpi",
        "file",
        "file",
    )
    assert (config.local_memory, config.high, config.low) == (None, None, None)
    assert (config.write_back, config.sweep_ms, config.fault_threads) == (16 << 20, 5, 1)
    assert (config.patience_s, config.path, config.keep) == (60, None, False)
    assert (config.track_writes, config.ask, config.cpus) == (True, False, "auto")
    assert config.origin("transport") == "default"


def test_argument_beats_variable_beats_file_beats_pyproject_beats_default(given):
    pyproject = "[tool.edm]\nsweep_ms = 1\nfault_threads = 1\nlocal_memory = '1M'\nwrite-back = '1M'"
    toml = "sweep_ms = 2\nfault_threads = 2\nlocal_memory = '2M'"
    env = {"EDM_SWEEP_MS": "3", "EDM_FAULT_THREADS": "3"}
    config = given({"sweep_ms": "4"}, env=env, toml=toml, pyproject=pyproject)
    assert (config.sweep_ms, config.origin("sweep_ms")) == (4, "--sweep-ms")
    assert (config.fault_threads, config.origin("fault_threads")) == (3, "EDM_FAULT_THREADS")
    assert (config.local_memory, config.origin("local_memory")) == (2 << 20, "edm.toml")
    assert (config.write_back, config.origin("write_back")) == (1 << 20, "pyproject.toml")
    assert (config.patience_s, config.origin("patience_s")) == (60, "default")


def test_named_file_replaces_edm_toml(given, tmp_path):
    (tmp_path / "other.toml").write_text("sweep_ms = 9")
    config = given(toml="sweep_ms = 2", file=tmp_path / "other.toml")
    assert (config.sweep_ms, config.origin("sweep_ms")) == (9, "other.toml")
    with pytest.raises(UsageError, match=r"^cannot read .*/absent\.toml: No such file"):
        given(file=tmp_path / "absent.toml")


def test_store_takes_both_halves(given):
    config = given({"store": "t-both"})
    assert (config.spt_store, config.page_store) == ("t-both", "t-both")
    assert config.origin("page_store") == "--store"


def test_store_that_offers_one_half_leaves_the_other(given):
    config = given({"store": "t-pages"}, env={"EDM_STORE": "t-both"})
    assert (config.spt_store, config.page_store) == ("t-both", "t-pages")
    config = given({"store": "t-spt"}, toml="page_store = 't-pages'")
    assert (config.spt_store, config.page_store) == ("t-spt", "t-pages")


def test_half_named_beside_store_wins_in_the_same_place_only(given):
    assert given({"store": "t-both", "spt_store": "t-spt"}).spt_store == "t-spt"
    assert given({"store": "t-both"}, env={"EDM_SPT_STORE": "t-spt"}).spt_store == "t-both"


def test_unknown_store_says_what_is_installed(given):
    with pytest.raises(
        UnknownPlugin, match=r"^unknown store 'ceph' \(installed: .*t-both.*\); try: pip install edm-store-ceph"
    ):
        given({"store": "ceph"})


def test_unknown_transport_stops_before_its_options_are_read(given):
    with pytest.raises(UnknownPlugin, match="unknown transport 'ucx'"):
        given({"transport": "ucx"}, ["transport.ucx.rails=2"])


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"local_memory": "3X"}, "--local-memory: bad size '3X': use a number with K, M, G or T, or a percentage"),
        ({"local_memory": "17"}, "--local-memory: bad size '17': smaller than one page (4096 bytes)"),
        ({"write_back": "10%"}, "--write-back: bad size '10%': use a number with K, M, G or T"),
        ({"sweep_ms": "0"}, "--sweep-ms: must be a number above 0, not '0'"),
        ({"sweep_ms": "nan"}, "--sweep-ms: must be a number above 0, not 'nan'"),
        ({"sweep_ms": "0.0001"}, "--sweep-ms: must be from 0.1 to 10000 milliseconds, not '0.0001'"),
        ({"fault_threads": "0"}, "--fault-threads: must be a whole number from 1 to 16, not '0'"),
        ({"fault_threads": "two"}, "--fault-threads: must be a whole number from 1 to 16, not 'two'"),
        ({"cpus": "3-1"}, "--cpus: bad list of CPUs '3-1': 3-1 counts down"),
        ({"cpus": "all"}, "--cpus: must be auto or a list of CPU numbers as 0,2-3, not 'all'"),
        ({"transport": "M PI"}, "--transport: bad name 'M PI': use lower-case letters, digits, - and _"),
        (
            {"high": "50%", "local_memory": "none"},
            "--high: '50%' is a percentage of local memory, and none is set: add --local-memory",
        ),
        (
            {"high": "lots"},
            "--high: bad size 'lots': use a number with K, M, G or T, or a percentage, or pages as 5000p",
        ),
        ({"high": "10p", "low": "20p"}, "low (20 pages) is above high (10 pages): nothing would be evicted"),
        ({"high": "0p"}, "high: the threshold must be at least one page"),
        ({"high": "2G", "local_memory": "1G"}, "high (524288 pages) is above the local memory (262144 pages)"),
    ],
)
def test_bad_value_is_one_line_that_names_the_argument(given, settings, text):
    with pytest.raises(UsageError) as error:
        given(settings)
    assert str(error.value) == text


def test_bad_value_names_variable_or_file_and_key(given):
    with pytest.raises(UsageError, match=r"^EDM_KEEP: must be true or false, not 'perhaps'$"):
        given(env={"EDM_KEEP": "perhaps"})
    with pytest.raises(
        UsageError, match=r"^edm\.toml: fault_threads: must be a whole number from 1 to 16, not 'True'$"
    ):
        given(toml="fault_threads = true")
    with pytest.raises(UsageError, match=r"^edm\.toml: 'keep' must be one value$"):
        given(toml="keep = [1]")


def test_unknown_key_names_file_and_key_and_what_was_meant(given):
    with pytest.raises(UsageError, match=r"^edm\.toml: unknown key 'local_mem' \(did you mean 'local_memory'\?\)$"):
        given(toml="local_mem = '64M'")
    with pytest.raises(
        UsageError, match=r"^pyproject\.toml: unknown key 'tool\.edm\.transprt' \(did you mean 'transport'"
    ):
        given(pyproject="[tool.edm]\ntransprt = 'mpi'")


def test_file_that_is_no_toml_is_one_line(given):
    with pytest.raises(UsageError, match=r"edm\.toml: .*line 1") as error:
        given(toml="a = = b")
    assert "\n" not in str(error.value)


def test_thresholds_are_pages_whatever_was_written(given):
    config = given({"local_memory": "64M", "high": "75%", "low": "32M"})
    assert (config.high, config.low) == (12288, 8192)
    assert given({"high": "5000p"}).high == 5000
    assert given({"high": "auto"}).high is None


def test_local_memory_is_most_of_what_there_is_unless_something_is_said(given):
    limit = memory_limit()
    config = given()
    assert (config.local_memory, config.origin("local_memory")) == (limit.budget(), "default")
    assert config.memory_derived
    assert given({"local_memory": "auto"}, toml="local_memory = '1G'").local_memory == limit.budget()
    assert given({"high": "50%"}).high == limit.budget() // 2 // 4096
    assert given({"high": "5000p"}).local_memory is None
    assert given({"local_memory": "25%"}).memory_derived
    assert not given({"local_memory": "64M"}).memory_derived


def test_local_memory_may_be_a_percentage_of_the_machine(given):
    assert given({"local_memory": "50%"}).local_memory == memory_limit().bytes // 2
    assert given({"local_memory": "none"}, toml="local_memory = '1G'").local_memory is None


def test_path_is_made_absolute(given, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert given({"path": "pages"}).path == tmp_path / "pages"


def test_options_come_from_every_place_in_the_same_order(given):
    toml = """
        [transport]
        use = "t-wire"
        [transport.t-wire]
        spin_us = 1
        [store.t-both]
        sync = "none"
        map-size = "1M"
        extent_pages = 8
    """
    env = {"EDM_STORE_T_BOTH_MAP_SIZE": "2M", "EDM_STORE_T_BOTH_EXTENT_PAGES": "16"}
    config = given(options=["store.t-both.extent-pages=32"], env=env, toml=toml)
    assert config.origin("store.t-both.extent_pages") == "-o store.t-both.extent-pages"
    assert config.origin("store.t-both.map_size") == "EDM_STORE_T_BOTH_MAP_SIZE"
    assert config.origin("store.t-both.sync") == "edm.toml"
    registry = Registry()
    pages = config.plugin_options("page_store", "t-both", registry.page_store("t-both"))
    assert (pages.map_size, pages.extent_pages, pages.sync) == (2 << 20, 32, "none")
    table = config.plugin_options("spt_store", "t-both", registry.spt_store("t-both"))
    assert (table.map_size, table.sync) == (2 << 20, "none")
    assert config.plugin_options("transport", "t-wire", registry.transport("t-wire")).spin_us == 1


def test_options_are_converted_to_their_fields_types(given):
    options = ["store.t-pages.compress=yes", "store.t-pages.hosts=a:1, b:2", "store.t-pages.where=/x"]
    config = given({"store": "t-pages", "spt_store": "t-spt"}, options)
    pages = config.plugin_options("page_store", "t-pages", Registry().page_store("t-pages"))
    assert (pages.compress, pages.hosts, pages.where) == (True, ("a:1", "b:2"), Path("/x"))


@pytest.mark.parametrize(
    ("option", "text"),
    [
        (
            "store.t-both.map_sise=1M",
            "-o store.t-both.map_sise: unknown key 'store.t-both.map_sise' (did you mean 'map_size'?)",
        ),
        ("store.t-both.map_size=3X", "-o store.t-both.map_size: store.t-both.map_size: bad size '3X': use a number"),
        ("store.t-both.sync=half", "-o store.t-both.sync: store.t-both.sync: must be one of full, none, not 'half'"),
        ("store.t-both.extent_pages=1.5", "-o store.t-both.extent_pages: store.t-both.extent_pages: must be a whole"),
        ("store.t-both.ratio=2", "-o store.t-both.ratio: store.t-both: 'ratio' must be <= 1.0: 2.0"),
        ("transport.t-wire=3", "bad option 'transport.t-wire=3': write it as transport.mpi.KEY=VALUE"),
        ("wire.t-wire.spin_us=3", "bad option 'wire.t-wire.spin_us=3': write it as"),
        ("transport.t-wire.spin_us", "bad option 'transport.t-wire.spin_us': write it as"),
        ("transport.ucx.rails=2", "-o transport.ucx.rails: unknown transport 'ucx' in [transport.ucx] (installed:"),
    ],
)
def test_bad_option_is_one_line_that_names_it(given, option, text):
    with pytest.raises(UsageError) as error:
        given(options=[option])
    assert str(error.value).startswith(text)


def test_option_variable_of_an_unknown_plugin_is_refused(given):
    with pytest.raises(UsageError, match=r"^EDM_STORE_CEPH_POOL: no store of that name \(installed: "):
        given(env={"EDM_STORE_CEPH_POOL": "x"})


def test_variable_that_is_nearly_a_setting_is_refused(given):
    with pytest.raises(UsageError, match=r"^EDM_LOCAL_MEMROY: no such setting \(did you mean EDM_LOCAL_MEMORY\?\)$"):
        given(env={"EDM_LOCAL_MEMROY": "64M"})


def test_cpus_are_ones_there_are(given):
    usable = sorted(os.sched_getaffinity(0))
    assert given({"cpus": str(usable[0])}).handler_settings().cpus == (usable[0],)
    with pytest.raises(UsageError, match=r"^--cpus: CPU 99999 is not one this process may use \("):
        given({"cpus": f"{usable[0]},99999"})


def test_variables_of_others_and_internal_ones_are_left_alone(given):
    env = {"EDM_INTERNAL_TRANSPORT": "x", "EDM_SOCK": "/x", "EDM_VIDEO_GAIN": "3", "OTHER_EDM_KEEP": "x"}
    assert given(env=env) == given()


def test_config_survives_the_way_to_another_process(given, tmp_path):
    config = given({"local_memory": "64M", "path": str(tmp_path), "keep": True}, ["store.t-both.sync=none"])
    config.write(tmp_path / "config.json")
    assert Config.read(tmp_path / "config.json") == config
    assert (tmp_path / "config.json").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": 1, "settings": {"a": 1}}', '{"format": 99}'])
def test_config_that_is_not_ours_is_refused(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UsageError, match=r"config\.json"):
        Config.read(tmp_path / "config.json")


def test_handler_settings_are_in_pages():
    config = Config(local_memory=64 << 20, high=100, low=50, cpus="0,2-3")
    settings = config.handler_settings()
    assert (settings.local_pages, settings.high_pages, settings.low_pages) == (16384, 100, 50)
    assert settings.write_back_pages == 4096
    assert settings.cpus == (0, 2, 3)
    assert Config().handler_settings() == HandlerSettings()
