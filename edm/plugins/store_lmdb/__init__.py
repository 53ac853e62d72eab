"""The store `lmdb`: pages and the SPT in one LMDB environment. py-lmdb (the extra `lmdb`) is imported when it opens.

See `edm.plugins.store_lmdb.environment` for the sync policies and how the map grows.
"""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Literal

import attrs

from edm import hookimpl
from edm.errors import MissingExtra
from edm.hookspecs import PageStoreSpec, SptStoreSpec
from edm.stores.options import SYNC_HELP, WrapperOptions, option

if TYPE_CHECKING:
    from collections.abc import Iterable

    from edm.dms.table import PageTable
    from edm.interfaces import PageStore, SptStore
    from edm.stores.damage import Damage
    from edm.types import RunContext


@attrs.frozen(kw_only=True)
class LmdbSptOptions:
    """`[store.lmdb]`, the SPT's half."""

    sync: Literal["none", "batch", "always"] = option("batch", SYNC_HELP)
    map_size: int = option(1 << 30, "the memory map's first size; it grows by itself", size=True)
    limit: int = option(0, "the most the map grows to; 0: what the disk has", size=True)


@attrs.frozen(kw_only=True)
class LmdbPagesOptions(WrapperOptions):
    """`[store.lmdb]`, the page store's half."""

    sync: Literal["none", "batch", "always"] = option("batch", SYNC_HELP)
    map_size: int = option(1 << 30, "the memory map's first size; it grows by itself", size=True)
    limit: int = option(0, "the most the map grows to; 0: what the disk has", size=True)


def _check() -> None:
    if importlib.util.find_spec("lmdb") is None:
        raise MissingExtra("the store 'lmdb' needs py-lmdb: pip install 'edm[lmdb]'")


def _open_spt(options: LmdbSptOptions, context: RunContext) -> SptStore:
    _check()
    from edm.plugins.store_lmdb.environment import Environment  # noqa: PLC0415
    from edm.plugins.store_lmdb.spt import LmdbSpt  # noqa: PLC0415

    path = context.store_dir / "lmdb"
    return LmdbSpt(Environment.open(path, "spt", options.sync, options.map_size, options.limit))


def _inspect_spt(context: RunContext) -> tuple[PageTable, list[Damage]]:
    _check()
    from edm.plugins.store_lmdb.inspecting import inspect  # noqa: PLC0415

    return inspect(context.store_dir / "lmdb")


def _open_pages(options: LmdbPagesOptions, context: RunContext) -> PageStore:
    _check()
    from edm.plugins.store_lmdb.environment import Environment  # noqa: PLC0415
    from edm.plugins.store_lmdb.pages import LmdbPages  # noqa: PLC0415
    from edm.stores.wrapping import wrapped  # noqa: PLC0415

    path = context.store_dir / "lmdb"
    store = LmdbPages(Environment.open(path, "pages", options.sync, options.map_size, options.limit))
    return wrapped(store, options, context, durable=True)


@hookimpl
def edm_spt_stores() -> Iterable[SptStoreSpec]:
    """Offer `lmdb`."""
    yield SptStoreSpec(
        name="lmdb",
        summary="rows in LMDB, the table in memory (extra: lmdb)",
        options=LmdbSptOptions,
        open=_open_spt,
        durable=True,
        inspect=_inspect_spt,
    )


@hookimpl
def edm_page_stores() -> Iterable[PageStoreSpec]:
    """Offer `lmdb`."""
    yield PageStoreSpec(
        name="lmdb",
        summary="pages in LMDB, one file (extra: lmdb)",
        options=LmdbPagesOptions,
        open=_open_pages,
        durable=True,
    )
