"""The store `file` (the default): page files on disk, and the SPT as a journal beside them.

Its parts are imported when they are opened; see `edm.plugins.store_file.pages` and `edm.plugins.store_file.spt`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import attrs

from edm import hookimpl
from edm.hookspecs import PageStoreSpec, SptStoreSpec
from edm.stores.options import SYNC_HELP, WrapperOptions, option
from edm.types import PAGE_BYTES

if TYPE_CHECKING:
    from collections.abc import Iterable

    from edm.dms.table import PageTable
    from edm.interfaces import PageStore, SptStore
    from edm.stores.damage import Damage
    from edm.types import RunContext


def _whole_segment(_options: object, _field: object, size_bytes: int) -> None:
    if not 64 * PAGE_BYTES <= size_bytes <= 1 << 40 or size_bytes % (64 * PAGE_BYTES):
        raise ValueError("segment must be a multiple of 256K, up to 1T")


@attrs.frozen(kw_only=True)
class FileSptOptions:
    """`[store.file]`, the SPT's half."""

    sync: Literal["none", "batch", "always"] = option("batch", SYNC_HELP)
    group: int = option(64 << 20, "with sync = batch: flush after so many bytes of pages", size=True)


@attrs.frozen(kw_only=True)
class FilePagesOptions(WrapperOptions):
    """`[store.file]`, the page store's half."""

    sync: Literal["none", "batch", "always"] = option("batch", SYNC_HELP)
    direct: bool = option(False, "O_DIRECT: past the page cache")
    segment: int = option(
        256 << 20, "size of a page file; fixed when the store is made", size=True, validator=_whole_segment
    )
    limit: int = option(0, "the most bytes of pages to keep; 0: what the disk has", size=True)


def _open_spt(options: FileSptOptions, context: RunContext) -> SptStore:
    from edm.plugins.store_file.spt import FileSpt  # noqa: PLC0415

    return FileSpt(context.store_dir / "spt", options.sync, group_pages=max(1, options.group // PAGE_BYTES))


def _inspect_spt(context: RunContext) -> tuple[PageTable, list[Damage]]:
    from edm.plugins.store_file.spt import inspect  # noqa: PLC0415

    return inspect(context.store_dir / "spt")


def _open_pages(options: FilePagesOptions, context: RunContext) -> PageStore:
    from edm.plugins.store_file.pages import FilePages  # noqa: PLC0415
    from edm.stores.wrapping import wrapped  # noqa: PLC0415

    store = FilePages(
        context.store_dir / "pages",
        options.sync,
        segment_pages=options.segment // PAGE_BYTES,
        limit_pages=-(-options.limit // PAGE_BYTES),
        direct=options.direct,
    )
    return wrapped(store, options, context, durable=True)


@hookimpl
def edm_spt_stores() -> Iterable[SptStoreSpec]:
    """Offer `file`."""
    yield SptStoreSpec(
        name="file",
        summary="a journal on disk, the table in memory",
        options=FileSptOptions,
        open=_open_spt,
        durable=True,
        inspect=_inspect_spt,
    )


@hookimpl
def edm_page_stores() -> Iterable[PageStoreSpec]:
    """Offer `file`."""
    yield PageStoreSpec(
        name="file", summary="page files on disk, checksummed", options=FilePagesOptions, open=_open_pages, durable=True
    )
