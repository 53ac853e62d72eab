"""The five hooks a plugin may implement, and the specs they return.

A plugin is a module with functions marked `@edm.hookimpl`, listed under the entry point group `edm`. Each hook
returns an iterable of frozen specs; the user chooses one by name, and the chosen spec's `open` makes the object that
the hot path holds. Hooks choose; they never move a page.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import attrs
import pluggy

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from edm.dms.table import PageTable
    from edm.interfaces import EvictionModel, FaultSource, PageStore, SptStore, Transport
    from edm.privileges import Capability
    from edm.stores.damage import Damage
    from edm.types import LaunchPlan, RunContext

PROJECT: Final = "edm"
API_VERSION: Final = 1
hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@attrs.frozen
class NoOptions:
    """For a plugin that has nothing to set."""


@attrs.frozen(kw_only=True)
class PluginSpec:
    """What every spec has.

    name: what the user types. summary: one line for `edm plugins`. options: an attrs class whose fields are the
    plugin's settings (`[transport.NAME]`, `[store.NAME]` …), each with a default; a field's metadata may hold
    "help" and "type" ("size" for 512M-style values). api: the interface version it was written for.
    """

    name: str
    summary: str
    options: type[Any] = NoOptions
    api: int = API_VERSION


@attrs.frozen(kw_only=True)
class FaultSourceSpec(PluginSpec):
    """A fault source. `open(options, settings, context)`: settings is `edm.config.HandlerSettings`."""

    open: Callable[[Any, Any, RunContext], FaultSource]
    check: Callable[[Any], Iterable[str] | None] = lambda _options: None
    """Raises `UsageError` with the remedy where this machine or user may not use it; what it returns is warned of."""


@attrs.frozen(kw_only=True)
class TransportSpec(PluginSpec):
    """A transport.

    open: in the DM-Handler's or DMS's process, by `context.role`. plan: the processes a one-command `edm run` starts,
    from (options, the DMS's argv, the DM-Handler's argv). embedded: the DMS runs inside the DM-Handler, whose process
    builds the `PageServer` and passes it to `open` as `server`. check: as for fault sources. capabilities: those of
    root's that the transport works with; EDM's processes give the others up before `open`.
    """

    open: Callable[..., Transport]
    plan: Callable[[Any, tuple[str, ...], tuple[str, ...]], LaunchPlan]
    embedded: bool = False
    capabilities: tuple[Capability, ...] = ()
    check: Callable[[Any], Iterable[str] | None] = lambda _options: None


@attrs.frozen(kw_only=True)
class SptStoreSpec(PluginSpec):
    """An SPT store. `open(options, context)`; `context.store_dir` exists. durable: survives the server.

    inspect: for `edm store verify`, where `open` raises `Corrupt`: what can be read without changing anything, and
    what is damaged.
    """

    open: Callable[[Any, RunContext], SptStore]
    durable: bool = False
    inspect: Callable[[RunContext], tuple[PageTable, list[Damage]]] | None = None


@attrs.frozen(kw_only=True)
class PageStoreSpec(PluginSpec):
    """A page store. `open(options, context)`; `context.store_dir` exists. durable: survives the server."""

    open: Callable[[Any, RunContext], PageStore]
    durable: bool = False


@attrs.frozen(kw_only=True)
class EvictionPolicySpec(PluginSpec):
    """An eviction policy.

    model(options, capacity): the algorithm for `edm simulate`, `capacity` units of memory. open(options): an object
    that offers the C table "edm.policy_ops" (native/edm_ops.h), for `edm run`; None: there is only the model.
    """

    model: Callable[[Any, int], EvictionModel]
    open: Callable[[Any], object] | None = None


class Hooks:
    """The hook specifications."""

    @hookspec
    def edm_fault_sources(self) -> Iterable[FaultSourceSpec]:  # type: ignore[empty-body]
        """Offer fault sources.

        Example::

            @edm.hookimpl
            def edm_fault_sources():
                yield FaultSourceSpec(name="replay", summary="faults from a recorded trace", open=open_replay)
        """

    @hookspec
    def edm_transports(self) -> Iterable[TransportSpec]:  # type: ignore[empty-body]
        """Offer transports.

        Example::

            @edm.hookimpl
            def edm_transports():
                yield TransportSpec(name="rdma", summary="RDMA verbs", open=open_rdma, plan=plan_rdma)
        """

    @hookspec
    def edm_spt_stores(self) -> Iterable[SptStoreSpec]:  # type: ignore[empty-body]
        """Offer SPT stores.

        Example::

            @edm.hookimpl
            def edm_spt_stores():
                yield SptStoreSpec(name="memory", summary="a dict in the DMS", open=open_spt)
        """

    @hookspec
    def edm_page_stores(self) -> Iterable[PageStoreSpec]:  # type: ignore[empty-body]
        """Offer page stores.

        Example::

            @edm.hookimpl
            def edm_page_stores():
                yield PageStoreSpec(name="memory", summary="the EMU's RAM", open=open_pages)
        """

    @hookspec
    def edm_eviction_policies(self) -> Iterable[EvictionPolicySpec]:  # type: ignore[empty-body]
        """Offer eviction policies: as models that `edm simulate` plays traces over, and as C tables for `edm run`.

        Example::

            @edm.hookimpl
            def edm_eviction_policies():
                yield EvictionPolicySpec(name="lru", summary="what was used last stays", model=Lru)
        """
