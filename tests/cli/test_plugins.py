import json

RDMA = """
    import attrs
    import edm
    from edm.hookspecs import TransportSpec

    @attrs.frozen
    class Options:
        rails: int = attrs.field(default=2, metadata={"help": "how many cards to use"})

    @edm.hookimpl
    def edm_transports():
        yield TransportSpec(name="rdma", summary="RDMA verbs", options=Options, open=print, plan=print)
"""


def test_plugins_are_listed_with_who_offers_them(edm, install):
    install("edm-transport-rdma", "edm_transport_rdma", RDMA)
    status, out, err = edm("plugins")
    assert (status, err) == (0, "")
    (line,) = [line for line in out.splitlines() if "rdma" in line]
    assert line.split() == ["rdma", "RDMA", "verbs", "[edm-transport-rdma", "1.0]"]
    assert out.index("transports") < out.index("rdma") < out.index("SPT stores")


def test_options_are_listed_on_demand(edm, install):
    install("edm-transport-rdma", "edm_transport_rdma", RDMA)
    assert "rails" not in edm("plugins")[1]
    assert "rails = 2  how many cards to use" in edm("plugins", "--options")[1]


def test_json_has_plugins_and_problems(edm, install):
    install("edm-transport-rdma", "edm_transport_rdma", RDMA)
    install("edm-store-broken", "edm_store_broken", "import nothing_of_that_name")
    status, out, err = edm("plugins", "--json")
    assert status == 0
    document = json.loads(out)
    (rdma,) = [plugin for plugin in document["plugins"] if plugin["name"] == "rdma"]
    assert rdma == {
        "kind": "transport",
        "name": "rdma",
        "summary": "RDMA verbs",
        "distribution": "edm-transport-rdma 1.0",
        "builtin": False,
        "api": 1,
        "options": {"rails": {"default": 2, "help": "how many cards to use"}},
    }
    assert [problem["distribution"] for problem in document["problems"]] == ["edm-store-broken 1.0"]
    assert err.startswith("edm: warning: edm-store-broken 1.0: cannot be loaded: ModuleNotFoundError")
    assert err.count("\n") == 1
