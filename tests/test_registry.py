import subprocess
import sys
from textwrap import dedent

import pytest

from edm.errors import PluginConflict, UnknownPlugin, UsageError
from edm.hookspecs import API_VERSION, PageStoreSpec, TransportSpec
from edm.registry import KINDS, Registry

RDMA = """
    import edm
    from edm.hookspecs import TransportSpec

    @edm.hookimpl
    def edm_transports():
        yield TransportSpec(name="rdma", summary="RDMA verbs", open=print, plan=print)
"""


def test_third_party_transport_is_found_by_its_name(install):
    install("edm-transport-rdma", "edm_transport_rdma", RDMA)
    spec = Registry().transport("rdma")
    assert isinstance(spec, TransportSpec)
    assert spec.summary == "RDMA verbs"
    assert "rdma" in Registry().names("transport")


def test_one_plugin_may_offer_several_kinds(install):
    source = """
        import edm
        from edm.hookspecs import PageStoreSpec, SptStoreSpec

        @edm.hookimpl
        def edm_page_stores():
            yield PageStoreSpec(name="etcd", summary="pages", open=print)

        @edm.hookimpl
        def edm_spt_stores():
            yield SptStoreSpec(name="etcd", summary="table", open=print)
    """
    install("edm-store-etcd", "edm_store_etcd", source)
    registry = Registry()
    assert registry.spt_store("etcd").summary == "table"
    assert isinstance(registry.page_store("etcd"), PageStoreSpec)
    assert registry.offers("page_store", "etcd")
    assert not registry.offers("transport", "etcd")


def test_unknown_name_says_what_is_installed_and_what_to_install(install):
    install("edm-transport-rdma", "edm_transport_rdma", RDMA)
    installed = ", ".join(Registry().names("transport"))
    with pytest.raises(UnknownPlugin) as error:
        Registry().transport("ucx")
    assert str(error.value) == f"unknown transport 'ucx' (installed: {installed}); try: pip install edm-transport-ucx"
    assert "rdma" in installed


@pytest.mark.parametrize(
    ("kind", "wanted"),
    [
        ("fault_source", "unknown fault source 'x' (.*); try: pip install edm-source-x"),
        ("spt_store", "unknown SPT store 'x' (.*); try: pip install edm-store-x"),
        ("page_store", "unknown page store 'x' (.*); try: pip install edm-store-x"),
    ],
)
def test_unknown_name_of_every_kind_is_named_for_what_it_is(kind, wanted):
    with pytest.raises(UnknownPlugin, match=wanted):
        getattr(Registry(), kind)("x")


def test_two_distributions_with_one_name_are_a_conflict_that_names_both(install):
    install("edm-transport-rdma", "edm_transport_rdma", RDMA)
    install("fast-rdma", "fast_rdma", RDMA, version="2.1")
    with pytest.raises(PluginConflict) as error:
        Registry().transport("rdma")
    text = "transport 'rdma' is offered by edm-transport-rdma 1.0 and fast-rdma 2.1: uninstall all but one"
    assert str(error.value) == text
    assert text in [problem.reason for problem in Registry().all()[1]]


def test_two_distributions_with_one_entry_point_name_are_both_seen(install):
    install("edm-transport-rdma", "edm_transport_rdma", RDMA, entry_point="rdma")
    install("edm-transport-ucx", "edm_transport_ucx", RDMA.replace('"rdma"', '"ucx"'), entry_point="rdma")
    assert {"rdma", "ucx"} <= set(Registry().names("transport"))


def test_misspelt_hook_is_found_and_its_distribution_named(install):
    install("edm-transport-rdma", "edm_transport_rdma", RDMA.replace("edm_transports", "edm_transport"))
    with pytest.raises(UnknownPlugin, match=r"edm-transport-rdma 1\.0: unknown hook edm_transport \(there are: .*\)"):
        Registry().transport("rdma")


def test_broken_plugin_is_a_problem_and_not_the_end(install):
    install("edm-transport-rdma", "edm_transport_rdma", "import nothing_of_that_name")
    install("edm-transport-ucx", "edm_transport_ucx", RDMA.replace('"rdma"', '"ucx"'))
    offers, problems = Registry().all()
    assert "ucx" in [offer.spec.name for offer in offers]
    assert [str(problem) for problem in problems] == [
        "edm-transport-rdma 1.0: cannot be loaded: ModuleNotFoundError: No module named 'nothing_of_that_name'"
    ]
    with pytest.raises(UnknownPlugin, match=r"cannot be used: edm-transport-rdma 1\.0: cannot be loaded: ModuleNot"):
        Registry().transport("rdma")


def test_hook_that_raises_is_a_problem_and_not_the_end(install):
    source = """
        import edm

        @edm.hookimpl
        def edm_transports():
            raise RuntimeError("no card")
    """
    install("edm-transport-rdma", "edm_transport_rdma", source)
    assert [problem.reason for problem in Registry().all()[1]] == ["cannot be loaded: RuntimeError: no card"]


def test_spec_of_the_wrong_kind_is_a_problem(install):
    install("edm-transport-rdma", "edm_transport_rdma", RDMA.replace("def edm_transports", "def edm_page_stores"))
    (problem,) = Registry().all()[1]
    assert problem.reason.endswith("it must give PageStoreSpec")


@pytest.mark.parametrize(
    ("api", "remedy"), [(API_VERSION + 1, "upgrade edm"), (API_VERSION - 1, "upgrade that distribution")]
)
def test_plugin_for_another_interface_version_is_refused(install, api, remedy):
    install("edm-transport-rdma", "edm_transport_rdma", RDMA.replace("summary=", f"api={api}, summary="))
    with pytest.raises(UsageError) as error:
        Registry().transport("rdma")
    text = str(error.value)
    assert text.startswith("transport 'rdma' of edm-transport-rdma 1.0 is written for plugin interface")
    assert text.endswith(remedy)
    assert len(Registry().all()[1]) == 1


def test_third_party_is_imported_only_for_a_name_that_is_not_built_in(install):
    install("edm-transport-rdma", "edm_transport_rdma", RDMA)
    registry = Registry()
    builtins = registry.builtins()
    assert builtins
    for offer in builtins:
        registry.find(offer.kind.name, offer.spec.name)
    assert "edm_transport_rdma" not in sys.modules
    registry.transport("rdma")
    assert "edm_transport_rdma" in sys.modules


def test_third_party_cannot_shadow_a_built_in(install):
    offer = next(offer for offer in Registry().builtins() if offer.kind.name in {"spt_store", "page_store"})
    source = f"""
        import edm
        from edm.hookspecs import {offer.kind.spec.__name__}

        @edm.hookimpl
        def {offer.kind.hook}():
            yield {offer.kind.spec.__name__}(name="{offer.spec.name}", summary="an impostor", open=print)
    """
    install("impostor", "impostor", source)
    assert Registry().find(offer.kind.name, offer.spec.name) == offer.spec
    (problem,) = Registry().all()[1]
    assert "is offered by edm " in problem.reason
    assert problem.reason.endswith("and impostor 1.0: the built-in one is used")


def test_every_built_in_has_a_summary_of_one_line_and_defaults_for_all_options():
    offers = Registry().builtins()
    assert {offer.kind.name for offer in offers} == set(KINDS)
    for offer in offers:
        assert offer.spec.summary
        assert "\n" not in offer.spec.summary
        offer.spec.options()


def test_built_ins_import_nothing_heavy():
    code = """
        import sys
        from edm.registry import Registry

        Registry().builtins()
        heavy = {"mpi4py", "mpi4py.MPI", "zmq", "lmdb", "redis", "rich", "edm._native"} & set(sys.modules)
        assert not heavy, heavy
    """
    subprocess.run([sys.executable, "-c", dedent(code)], check=True, timeout=60)
