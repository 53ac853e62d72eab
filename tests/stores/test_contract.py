"""Every store of EDM, under each of its sync policies and with packing, passes the contracts it ships."""

from pathlib import Path
from unittest.mock import Mock

import pytest

from edm.testing import PageStoreContract, SptStoreContract
from edm.testing.store_machines import PageMachine, SptMachine
from edm.testing.stores import open_store


class TestMemorySpt(SptStoreContract):
    store = "memory"


class TestFileSpt(SptStoreContract):
    store = "file"


class TestFileSptNone(SptStoreContract):
    store = "file"
    options = {"sync": "none"}
    examples = 15


class TestFileSptAlways(SptStoreContract):
    store = "file"
    options = {"sync": "always"}
    examples = 10


class TestLmdbSpt(SptStoreContract):
    store = "lmdb"
    options = {"sync": "none"}
    examples = 25


class TestMemoryPages(PageStoreContract):
    store = "memory"
    limited = {"limit": "1M"}


class TestFilePages(PageStoreContract):
    store = "file"
    options = {"segment": "256K"}
    limited = {"limit": "1M"}


class TestFilePagesDirect(PageStoreContract):
    store = "file"
    options = {"segment": "1M", "direct": True}
    examples = 15


class TestFilePagesZstd(PageStoreContract):
    store = "file"
    options = {"segment": "1M", "compress": "zstd", "elide_zeros": True}
    limited = {"limit": "1M"}
    examples = 20


class TestMemoryPagesLz4(PageStoreContract):
    store = "memory"
    options = {"compress": "lz4"}
    limited = {"limit": "1M"}
    examples = 20


class TestLmdbPages(PageStoreContract):
    store = "lmdb"
    options = {"sync": "none", "map_size": "1M"}
    limited = {"limit": "4M"}
    examples = 25


class TestLmdbPagesZeros(PageStoreContract):
    store = "lmdb"
    options = {"sync": "none", "elide_zeros": True}
    examples = 10


@pytest.mark.parametrize(("machine", "kind"), [(PageMachine, "page_store"), (SptMachine, "spt_store")])
def test_a_history_that_ends_badly_is_closed_and_leaves_no_directory(machine, kind):
    opened = staticmethod(lambda path: open_store(kind, "file", path, {}))
    history = type("History", (machine,), {"open_store": opened, "durable": True})()
    scratch = Path(history._scratch.name)
    history._store.close()
    history._store = Mock(stat=Mock(side_effect=AssertionError("bad")), regions=Mock(side_effect=AssertionError("bad")))
    with pytest.raises(AssertionError, match="bad"):
        history.teardown()
    history._store.close.assert_called_once_with()
    assert not scratch.exists()
