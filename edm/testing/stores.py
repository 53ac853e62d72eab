"""The contracts of SPT stores and page stores, for pytest."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import run_state_machine_as_test

from edm.config.options import build_options
from edm.dms.table import page_checksums
from edm.errors import Corrupt, StoreFull
from edm.registry import Registry
from edm.testing.pages import batch_of
from edm.testing.store_machines import PageMachine, SptMachine
from edm.types import PAGE_BYTES, RunContext

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from edm.interfaces import PageStore, SptStore

_NO_SLOTS = np.empty(0, np.uint64)


def open_store(kind: str, name: str, path: Path, options: Mapping[str, Any]) -> Any:
    """Open a plugin's store in a directory. kind: "spt_store" or "page_store"; options: as a user would write them."""
    spec: Any = Registry().find(kind, name)
    origins = dict.fromkeys(options, "the test")
    return spec.open(build_options(spec.options, options, origins, f"store.{name}"), RunContext(path, path, "dms"))


def _run(machine: type[Any], kind: str, contract: Any) -> None:
    durable = getattr(Registry().find(kind, contract.store), "durable", False)
    opened = staticmethod(lambda path: open_store(kind, contract.store, path, contract.options))
    made = type(machine.__name__, (machine,), {"open_store": opened, "durable": durable})
    checks = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]
    run_state_machine_as_test(
        made,
        settings=settings(
            max_examples=contract.examples, stateful_step_count=30, deadline=None, suppress_health_check=checks
        ),
    )


class SptStoreContract:
    """What an SPT store must do.

    Example::

        class TestSqlite(SptStoreContract):
            store = "sqlite"

    options: the plugin's, as a user would write them. examples: how many histories hypothesis tries.
    """

    store: ClassVar[str]
    options: ClassVar[Mapping[str, Any]] = {}
    examples: ClassVar[int] = 40

    @pytest.fixture
    def spt(self, tmp_path: Path) -> Any:
        """A fresh store."""
        store = open_store("spt_store", self.store, tmp_path, self.options)
        yield store
        store.close()

    def test_any_history_is_the_model_s(self) -> None:
        """Random histories, reopening where the store is durable."""
        _run(SptMachine, "spt_store", self)

    def test_slot_of_a_clone_is_let_go_of_with_its_last_page(self, spt: SptStore) -> None:
        """A slot outlives the page it was recorded for."""
        refs, _ = batch_of(1 << 32, range(100), 1)
        assert not len(spt.record(refs, np.arange(100, 200, dtype=np.uint64)))
        assert not len(spt.clone(1 << 32, (1 << 32) + 1))
        assert not len(spt.drop_region(1 << 32))
        assert sorted(spt.drop((1 << 32) + 1, 0, 50).tolist()) == list(range(100, 150))
        assert sorted(spt.drop_region((1 << 32) + 1).tolist()) == list(range(150, 200))
        assert spt.regions() == {}

    def test_close_twice(self, spt: SptStore) -> None:
        """The second call does nothing."""
        spt.close()
        spt.close()


class PageStoreContract:
    """What a page store must do.

    Example::

        class TestS3(PageStoreContract):
            store = "s3"

    options: the plugin's, as a user would write them. limited: options that let it hold at least 64 pages, and not
    1024 times that; None where it has no limit. checks: it has its own checksums, so wrong ones are found when read.
    examples: how many histories hypothesis tries.
    """

    store: ClassVar[str]
    options: ClassVar[Mapping[str, Any]] = {}
    limited: ClassVar[Mapping[str, Any] | None] = None
    checks: ClassVar[bool] = True
    examples: ClassVar[int] = 40

    @pytest.fixture
    def pages(self, tmp_path: Path) -> Any:
        """A fresh store."""
        store = open_store("page_store", self.store, tmp_path, self.options)
        store.live(_NO_SLOTS)
        yield store
        store.close()

    def test_any_history_is_the_model_s(self) -> None:
        """Random histories, reopening where the store is durable."""
        _run(PageMachine, "page_store", self)

    def test_put_never_uses_a_slot_in_use(self, pages: PageStore) -> None:
        """Out of place: the first batch is intact after many others."""
        first = bytearray(np.random.default_rng(1).bytes(64 * PAGE_BYTES))
        kept = pages.put(memoryview(first), page_checksums(first))
        for seed in range(2, 20):
            other = bytearray(np.random.default_rng(seed).bytes(64 * PAGE_BYTES))
            slots = pages.put(memoryview(other), page_checksums(other))
            assert not set(slots.tolist()) & set(kept.tolist())
            pages.free(slots[::2].copy())
        into = bytearray(len(first))
        pages.get(kept, memoryview(into))
        assert into == first

    def test_freed_slot_is_not_served(self, pages: PageStore) -> None:
        """Reading it is `Corrupt`, never other bytes."""
        batch = bytearray(np.random.default_rng(1).bytes(4 * PAGE_BYTES))
        slots = pages.put(memoryview(batch), page_checksums(batch))
        pages.free(slots)
        pages.sync()
        into = bytearray(len(batch))
        try:
            pages.get(slots, memoryview(into))
        except Corrupt:
            return
        assert into == batch, "a freed slot may keep its page, and must not give another"

    def test_wrong_checksum_is_corrupt_and_names_the_slot(self, pages: PageStore) -> None:
        """What does not fit the checksum it was put with is never served."""
        if not self.checks:
            pytest.skip("this store leaves checking to the DMS")
        batch = bytearray(np.random.default_rng(1).bytes(3 * PAGE_BYTES))
        sums = page_checksums(batch)
        sums[1] ^= 1
        slots = pages.put(memoryview(batch), sums)
        with pytest.raises(Corrupt, match=f"slot {slots[1]}"):
            pages.get(slots, memoryview(bytearray(len(batch))))
        pages.get(slots[::2].copy(), memoryview(bytearray(2 * PAGE_BYTES)))

    def test_full_store_keeps_nothing_of_the_batch_and_goes_on_when_there_is_room(self, tmp_path: Path) -> None:
        """`StoreFull`; what was stored stays; after a free there is room again."""
        if self.limited is None:
            pytest.skip("this store has no limit of its own")
        store = open_store("page_store", self.store, tmp_path, {**self.options, **self.limited})
        store.live(_NO_SLOTS)
        stored: list[Any] = []
        batch = bytearray(np.random.default_rng(1).bytes(64 * PAGE_BYTES))
        with pytest.raises(StoreFull):
            for _ in range(1024):
                stored.append(store.put(memoryview(batch), page_checksums(batch)))
        assert stored
        assert store.stat()["pages"] == 64 * len(stored)
        into = bytearray(len(batch))
        for slots in stored:
            store.get(slots, memoryview(into))
            assert into == batch
        for slots in stored[: len(stored) // 2 + 1]:
            store.free(slots)
        store.get(store.put(memoryview(batch), page_checksums(batch)), memoryview(into))
        assert into == batch
        store.close()

    def test_close_twice(self, pages: PageStore) -> None:
        """The second call does nothing."""
        pages.close()
        pages.close()
