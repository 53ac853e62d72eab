import google_crc32c
from hypothesis import given
from hypothesis import strategies as st

from edm._native import ffi, lib


@given(st.binary(max_size=9000), st.integers(0, 8))
def test_crc_is_the_one_others_compute(data, start):
    view = ffi.from_buffer(data)
    length = max(0, len(data) - start)
    assert lib.edm_crc32c(view + start, length) == google_crc32c.value(data[start : start + length])


def test_crc_of_pages_is_each_page_s_own():
    pages = b"".join(bytes([n]) * 4096 for n in range(5))
    out = ffi.new("uint32_t[5]")
    lib.edm_crc32c_pages(ffi.from_buffer(pages), 5, out)
    assert list(out) == [google_crc32c.value(bytes([n]) * 4096) for n in range(5)]
