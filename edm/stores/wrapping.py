"""Puts compression and zero-page elision around a page store, where its options ask for it.

Place on the path: called when a page store is opened.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from edm.stores.directory import saying

if TYPE_CHECKING:
    from edm.interfaces import PageStore
    from edm.stores.options import WrapperOptions
    from edm.types import RunContext

MARKER: Final = "packed"
"""A file in a store's directory: it may hold packed pages, whatever the options say now."""


def wrapped(store: PageStore, options: WrapperOptions, context: RunContext, *, durable: bool) -> PageStore:
    """`store`, or a `PackedPages` around it. durable: what is stored now will be read by a later server."""
    marker = context.store_dir / MARKER
    asked = options.compress != "none" or options.elide_zeros
    if not asked and not (durable and marker.exists()):
        return store
    from edm.stores.packed import PackedPages  # noqa: PLC0415

    try:
        packed = PackedPages(store, options.compress, elide_zeros=options.elide_zeros)
        if durable:
            with saying(marker):
                marker.touch(mode=0o600)
    except BaseException:
        store.close()
        raise
    return packed
