"""Every store of EDM, under each of its sync policies and with packing, passes the contracts it ships."""

from edm.testing import PageStoreContract, SptStoreContract


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
