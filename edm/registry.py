"""Which fault sources, transports, stores and policies there are, and the one the user named.

Place on the path: asked once, before the run starts, by `edm.config` and the command line; the spec it returns opens
the object that the hot path holds, and the registry is not seen again.

Built-ins are the modules of `edm.plugins`. Third parties' plugins are entry points in the group `edm`, and are imported
only when a name is not a built-in's, so that starting up stays cheap and nobody can shadow a built-in.
"""

from __future__ import annotations

import importlib
import pkgutil
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Final, TypeVar, cast

import attrs
import pluggy

import edm.plugins
from edm.errors import PluginConflict, UnknownPlugin, UsageError
from edm.hookspecs import (
    API_VERSION,
    PROJECT,
    EvictionPolicySpec,
    FaultSourceSpec,
    Hooks,
    PageStoreSpec,
    PluginSpec,
    SptStoreSpec,
    TransportSpec,
)

if TYPE_CHECKING:
    from collections.abc import Iterator
    from importlib.metadata import EntryPoint

    Spec = TypeVar("Spec", bound=PluginSpec)


@attrs.frozen
class Kind:
    """One of the five kinds of plugin. title: for people. prefix: of a third party's distribution, by convention."""

    name: str
    title: str
    hook: str
    spec: type[PluginSpec]
    prefix: str


KINDS: Final = {
    kind.name: kind
    for kind in (
        Kind("fault_source", "fault source", "edm_fault_sources", FaultSourceSpec, "edm-source"),
        Kind("transport", "transport", "edm_transports", TransportSpec, "edm-transport"),
        Kind("spt_store", "SPT store", "edm_spt_stores", SptStoreSpec, "edm-store"),
        Kind("page_store", "page store", "edm_page_stores", PageStoreSpec, "edm-store"),
        Kind("policy", "eviction policy", "edm_eviction_policies", EvictionPolicySpec, "edm-policy"),
    )
}


@attrs.frozen
class Offer:
    """A spec, and who offers it. distribution: "edm-transport-rdma 1.0", or "edm 0.1.0" for a built-in."""

    kind: Kind
    spec: PluginSpec
    distribution: str
    builtin: bool


@attrs.frozen
class Problem:
    """A plugin that is installed and cannot be used, with the reason on one line."""

    distribution: str
    reason: str

    def __str__(self) -> str:
        return f"{self.distribution}: {self.reason}"


class Registry:
    """The installed plugins. Making one imports nothing; built-ins load at the first question, others when needed."""

    def __init__(self) -> None:
        self._builtins: list[Offer] | None = None
        self._third_parties: tuple[list[Offer], list[Problem]] | None = None

    def fault_source(self, name: str) -> FaultSourceSpec:
        """The fault source of that name; raises `UnknownPlugin`, `PluginConflict` or `UsageError`."""
        return cast("FaultSourceSpec", self.find("fault_source", name))

    def transport(self, name: str) -> TransportSpec:
        """The transport of that name; raises as `fault_source` does."""
        return cast("TransportSpec", self.find("transport", name))

    def spt_store(self, name: str) -> SptStoreSpec:
        """The SPT store of that name; raises as `fault_source` does."""
        return cast("SptStoreSpec", self.find("spt_store", name))

    def page_store(self, name: str) -> PageStoreSpec:
        """The page store of that name; raises as `fault_source` does."""
        return cast("PageStoreSpec", self.find("page_store", name))

    def policy(self, name: str) -> EvictionPolicySpec:
        """The eviction policy of that name; raises as `fault_source` does."""
        return cast("EvictionPolicySpec", self.find("policy", name))

    def find(self, kind: str, name: str) -> PluginSpec:
        """The spec of a kind (a key of `KINDS`) and name."""
        wanted = KINDS[kind]
        for offers in (self.builtins, lambda: self.third_parties()[0]):
            found = [offer for offer in offers() if offer.kind is wanted and offer.spec.name == name]
            if len(found) > 1:
                raise PluginConflict(_conflict(found))
            if found:
                return _checked(found[0])
        raise UnknownPlugin(self._unknown(wanted, name))

    def offers(self, kind: str, name: str) -> bool:
        """Whether there is a plugin of that kind and name; third parties are imported only if no built-in has it."""
        return any(
            offer.kind.name == kind and offer.spec.name == name
            for offers in (self.builtins, lambda: self.third_parties()[0])
            for offer in offers()
        )

    def names(self, kind: str) -> list[str]:
        """The names of one kind, sorted, third parties' included."""
        offers = self.builtins() + self.third_parties()[0]
        return sorted({offer.spec.name for offer in offers if offer.kind.name == kind})

    def all(self) -> tuple[list[Offer], list[Problem]]:
        """Everything installed, in the order of `KINDS`, and every plugin that cannot be used."""
        third_parties, problems = self.third_parties()
        order = list(KINDS.values())
        offers = sorted(self.builtins() + third_parties, key=lambda offer: (order.index(offer.kind), offer.spec.name))
        return offers, problems + list(_conflicts(offers))

    def builtins(self) -> list[Offer]:
        """What EDM itself offers. A fault in a built-in is a bug, and raises as what it is."""
        if self._builtins is None:
            distribution = f"edm {edm.__version__}"
            self._builtins = []
            for found in pkgutil.iter_modules(edm.plugins.__path__, "edm.plugins."):
                module = importlib.import_module(found.name)
                self._builtins += _offers_of(module, found.name, distribution, builtin=True)
        return self._builtins

    def third_parties(self) -> tuple[list[Offer], list[Problem]]:
        """What other distributions offer, and what is wrong with those that cannot be used. Imports them all, once."""
        if self._third_parties is None:
            offers: list[Offer] = []
            problems: list[Problem] = []
            for entry_point in _entry_points():
                distribution = _distribution(entry_point)
                try:
                    module = entry_point.load()
                    offers += _offers_of(module, f"{distribution} {entry_point.value}", distribution, builtin=False)
                except UsageError as error:
                    problems.append(Problem(distribution, str(error)))
                # Whatever a third party's module does when it is imported must not end `edm plugins`.
                except Exception as error:  # noqa: BLE001
                    problems.append(Problem(distribution, f"cannot be loaded: {_one_line(error)}"))
            self._third_parties = offers, problems
        return self._third_parties

    def _unknown(self, kind: Kind, name: str) -> str:
        installed = ", ".join(self.names(kind.name)) or "none"
        text = f"unknown {kind.title} '{name}' (installed: {installed}); try: pip install {kind.prefix}-{name}"
        problems = self.third_parties()[1]
        if problems:
            text += f"; cannot be used: {'; '.join(map(str, problems))}"
        return text


def _entry_points() -> list[EntryPoint]:
    # The same distribution seen twice on sys.path (as an editable install and its sources, say) is one.
    unique = {(_distribution(point), point.name, point.value): point for point in entry_points(group=PROJECT)}
    return [unique[key] for key in sorted(unique)]


def _distribution(entry_point: EntryPoint) -> str:
    dist = entry_point.dist
    return f"{dist.name} {dist.version}" if dist is not None else f"entry point {entry_point.name}"


def _offers_of(plugin: object, name: str, distribution: str, *, builtin: bool) -> list[Offer]:
    """Ask one plugin's hooks; raises `UsageError` for a plugin that breaks the rules."""
    manager = pluggy.PluginManager(PROJECT)
    manager.add_hookspecs(Hooks)
    try:
        manager.register(plugin, name)
        manager.check_pending()
    except pluggy.PluginValidationError as error:
        raise UsageError(_bad_hook(plugin, manager, error)) from None
    offers = []
    for kind in KINDS.values():
        for specs in getattr(manager.hook, kind.hook)():
            for spec in specs:
                if not isinstance(spec, kind.spec):
                    raise UsageError(f"{kind.hook} gave {spec!r}: it must give {kind.spec.__name__}")
                offers.append(Offer(kind, spec, distribution, builtin))
    return offers


def _bad_hook(plugin: object, manager: pluggy.PluginManager, error: pluggy.PluginValidationError) -> str:
    known = [kind.hook for kind in KINDS.values()]
    found = [name for name in dir(plugin) if manager.parse_hookimpl_opts(plugin, name) is not None]
    unknown = [name for name in found if name not in known]
    if unknown:
        return f"unknown hook {', '.join(unknown)} (there are: {', '.join(known)})"
    return _one_line(error)


def _checked(offer: Offer) -> PluginSpec:
    wrong = _wrong_api(offer)
    if wrong:
        raise UsageError(f"{offer.kind.title} '{offer.spec.name}' of {offer.distribution} {wrong}")
    return offer.spec


def _wrong_api(offer: Offer) -> str:
    if offer.spec.api == API_VERSION:
        return ""
    remedy = "upgrade edm" if offer.spec.api > API_VERSION else "upgrade that distribution"
    return f"is written for plugin interface {offer.spec.api}, edm {edm.__version__} has {API_VERSION}: {remedy}"


def _conflicts(offers: list[Offer]) -> Iterator[Problem]:
    seen: dict[tuple[str, str], list[Offer]] = {}
    for offer in offers:
        seen.setdefault((offer.kind.name, offer.spec.name), []).append(offer)
        wrong = _wrong_api(offer)
        if wrong:
            yield Problem(offer.distribution, f"{offer.kind.title} '{offer.spec.name}' {wrong}")
    for same in seen.values():
        if len(same) > 1:
            yield Problem(same[0].distribution, _conflict(same))


def _conflict(same: list[Offer]) -> str:
    providers = " and ".join(offer.distribution for offer in same)
    text = f"{same[0].kind.title} '{same[0].spec.name}' is offered by {providers}"
    if same[0].builtin:
        return f"{text}: the built-in one is used"
    return f"{text}: uninstall all but one"


def _one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
