import numpy as np

from edm.plugins.store_memory.pages import SLAB_PAGES, MemoryPages
from edm.types import PAGE_BYTES


def test_batch_that_alternates_between_slabs_is_read_in_its_order():
    store = MemoryPages(limit_bytes=4 * SLAB_PAGES * PAGE_BYTES)
    pages = np.zeros((2 * SLAB_PAGES, PAGE_BYTES), np.uint8)
    pages[:, :4] = np.arange(2 * SLAB_PAGES, dtype="<u4").view(np.uint8).reshape(-1, 4)
    from edm._native import ffi, lib

    sums = np.empty(len(pages), np.uint32)
    lib.edm_crc32c_pages(ffi.from_buffer(pages), len(pages), ffi.from_buffer("uint32_t[]", sums))
    slots = store.put(memoryview(pages).cast("B"), sums)
    order = [10, SLAB_PAGES + 5, 11, SLAB_PAGES + 6, 12]
    into = bytearray(len(order) * PAGE_BYTES)
    store.get(slots[order], memoryview(into))
    assert into == pages[order].tobytes()
