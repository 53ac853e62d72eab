"""The store `memory`: the SPT and the pages in the memory server's own RAM. Fast, and gone with the server.

Its parts are imported when they are opened; see `edm.plugins.store_memory.pages`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import attrs

from edm import hookimpl
from edm.hookspecs import NoOptions, PageStoreSpec, SptStoreSpec
from edm.stores.options import WrapperOptions, option

if TYPE_CHECKING:
    from collections.abc import Iterable

    from edm.interfaces import PageStore, SptStore
    from edm.types import RunContext


@attrs.frozen(kw_only=True)
class MemoryPagesOptions(WrapperOptions):
    """`[store.memory]`, the page store's half."""

    limit: int = option(0, "the most memory for pages; 0: half of the machine's or cgroup's", size=True)


def _open_spt(_options: NoOptions, _context: RunContext) -> SptStore:
    from edm.plugins.store_memory.spt import MemorySpt  # noqa: PLC0415

    return MemorySpt()


def _open_pages(options: MemoryPagesOptions, context: RunContext) -> PageStore:
    from edm.plugins.store_memory.pages import MemoryPages  # noqa: PLC0415
    from edm.stores.wrapping import wrapped  # noqa: PLC0415

    return wrapped(MemoryPages(options.limit), options, context, durable=False)


@hookimpl
def edm_spt_stores() -> Iterable[SptStoreSpec]:
    """Offer `memory`."""
    yield SptStoreSpec(name="memory", summary="a table in the memory server's RAM", open=_open_spt)


@hookimpl
def edm_page_stores() -> Iterable[PageStoreSpec]:
    """Offer `memory`."""
    yield PageStoreSpec(
        name="memory", summary="the memory server's RAM, up to a limit", options=MemoryPagesOptions, open=_open_pages
    )
