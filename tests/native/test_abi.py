"""What Python and C have to agree on."""

import re
from pathlib import Path

import pytest

from edm._native import ffi
from edm.config.values import count
from edm.errors import UsageError
from edm.types import PAGE_REF

NATIVE = Path(__file__).parents[2] / "native"


def test_page_ref_has_one_layout():
    fields = dict(ffi.typeof("struct edm_page_ref").fields)
    assert ffi.sizeof("struct edm_page_ref") == PAGE_REF.itemsize
    assert list(fields) == list(PAGE_REF.names)
    for name, (dtype, offset) in PAGE_REF.fields.items():
        assert fields[name].offset == offset
        assert ffi.sizeof(fields[name].type) == dtype.itemsize


def test_as_many_fault_threads_are_allowed_as_the_engine_has_workers():
    workers = int(re.search(r"#define MAX_WORKERS (\d+)", (NATIVE / "engine.h").read_text())[1])
    assert count(str(workers), {}) == workers
    with pytest.raises(UsageError):
        count(str(workers + 1), {})


def test_header_for_python_includes_nothing():
    directives = re.findall(r"^\s*#\s*(\w+)", (NATIVE / "edm_abi.h").read_text(), re.MULTILINE)
    assert set(directives) <= {"define"}
