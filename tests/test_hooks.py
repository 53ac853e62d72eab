"""Each hook, from a plugin's implementation to the spec the registry gives."""

import inspect

import attrs
import pytest

import edm
import edm.errors
import edm.hookspecs
import edm.types
from edm.hookspecs import (
    EvictionPolicySpec,
    FaultSourceSpec,
    Hooks,
    NoOptions,
    PageStoreSpec,
    PluginSpec,
    SptStoreSpec,
    TransportSpec,
)
from edm.registry import KINDS, Registry
from edm.types import LaunchPlan


@pytest.fixture
def offered(install):
    """Install a plugin with one hook that gives one spec, and look that up."""

    def offer(hook, spec):
        source = f"""
            import edm
            from edm.hookspecs import *
            from edm.types import LaunchPlan

            @edm.hookimpl
            def {hook}():
                yield {spec}
        """
        install("edm-test-hook", "edm_test_hook", source)
        (kind,) = [kind.name for kind in KINDS.values() if kind.hook == hook]
        return Registry().find(kind, "t-one")

    return offer


def test_edm_fault_sources_spec_opens_with_options_settings_and_context(offered):
    spec = offered(
        "edm_fault_sources",
        "FaultSourceSpec(name='t-one', summary='s', open=lambda *given: given)",
    )
    assert isinstance(spec, FaultSourceSpec)
    assert spec.open(1, 2, 3) == (1, 2, 3)
    assert spec.check(NoOptions()) is None


def test_edm_transports_spec_opens_and_plans(offered):
    spec = offered(
        "edm_transports",
        "TransportSpec(name='t-one', summary='s', open=lambda options, context, server=None: server, "
        "plan=lambda options, dms, handler: LaunchPlan((dms, handler)), embedded=True)",
    )
    assert isinstance(spec, TransportSpec)
    assert spec.open(None, None, server=7) == 7
    assert spec.plan(None, ("dms",), ("handler",)) == LaunchPlan((("dms",), ("handler",)), {})
    assert spec.embedded


def test_edm_spt_stores_spec_says_whether_it_is_durable(offered):
    spec = offered("edm_spt_stores", "SptStoreSpec(name='t-one', summary='s', open=lambda o, c: c, durable=True)")
    assert isinstance(spec, SptStoreSpec)
    assert spec.durable
    assert spec.open(None, "context") == "context"


def test_edm_eviction_policies_spec_makes_a_model_of_options_and_capacity(offered):
    spec = offered("edm_eviction_policies", "EvictionPolicySpec(name='t-one', summary='s', model=lambda *given: given)")
    assert isinstance(spec, EvictionPolicySpec)
    assert spec.model(1, 2) == (1, 2)


def test_edm_page_stores_spec_has_no_options_unless_it_says_so(offered):
    spec = offered("edm_page_stores", "PageStoreSpec(name='t-one', summary='s', open=lambda o, c: o)")
    assert isinstance(spec, PageStoreSpec)
    assert (spec.options, spec.durable) == (NoOptions, False)


def test_specs_are_frozen():
    for spec in (FaultSourceSpec, TransportSpec, SptStoreSpec, PageStoreSpec):
        assert issubclass(spec, PluginSpec)
        made = spec(name="x", summary="s", open=print, **({"plan": print} if spec is TransportSpec else {}))
        with pytest.raises(attrs.exceptions.FrozenInstanceError):
            made.name = "y"


def test_every_hook_s_docstring_has_an_example():
    for kind in KINDS.values():
        assert "Example::" in inspect.getdoc(getattr(Hooks, kind.hook))


def _public(module):
    return sorted(
        name
        for name, value in vars(module).items()
        if not name.startswith("_")
        and getattr(value, "__module__", module.__name__) == module.__name__
        and not inspect.ismodule(value)
        and type(value).__name__ != "_Feature"
    )


def test_exported_names_are_the_ones_plugins_rely_on():
    assert edm.__all__ == ["__version__", "hookimpl"]
    assert _public(edm.errors) == [
        "Corrupt", "EdmError", "MissingExtra", "NativeError", "PeerLost", "PluginBroken", "PluginConflict",
        "ProtocolError", "StaleVersion", "StoreError", "StoreFull", "StoreLocked", "TransportError", "TransportTimeout",
        "UnknownPlugin", "UsageError",
    ]  # fmt: skip
    assert {
        "EvictStatus", "GetStatus", "LaunchPlan", "MAX_BATCH_PAGES", "PAGE_BYTES", "PAGE_REF", "PageId", "PageRange",
        "RunContext", "SptRows", "refs_from",
    } <= set(dir(edm.types))  # fmt: skip
    assert {
        "API_VERSION", "FaultSourceSpec", "Hooks", "NoOptions", "PROJECT", "PageStoreSpec", "PluginSpec",
        "SptStoreSpec", "TransportSpec", "hookimpl", "hookspec",
    } <= set(dir(edm.hookspecs))  # fmt: skip


def test_error_tree_in_the_docstring_is_the_real_one():
    drawn = edm.errors.__doc__.split("\n\n", 1)[1]
    for name in _public(edm.errors):
        assert name in drawn
        assert issubclass(getattr(edm.errors, name), edm.errors.EdmError)
