"""The C tables plugins offer."""

import ctypes

import pytest

from edm.errors import PluginBroken
from edm.ops import CHANNEL, SERVER, address_of, capsule


class Table(ctypes.Structure):
    _fields_ = (("version", ctypes.c_uint32), ("bytes", ctypes.c_uint32), ("self", ctypes.c_void_p))


class Offers:
    def __init__(self, version=1, name=CHANNEL):
        self.table = Table(version, ctypes.sizeof(Table), None)
        self.__edm_ops__ = capsule(ctypes.addressof(self.table), name)


def test_an_offered_table_is_found():
    offers = Offers()
    assert address_of(offers, CHANNEL, ctypes.sizeof(Table)) == ctypes.addressof(offers.table)


def test_nothing_offered_is_no_table():
    assert address_of(object(), CHANNEL) == 0


@pytest.mark.parametrize("version", [0, 2])
def test_another_version_is_no_table(version):
    assert address_of(Offers(version), CHANNEL) == 0


def test_a_table_shorter_than_what_is_known_is_no_table():
    assert address_of(Offers(), CHANNEL, ctypes.sizeof(Table) + 1) == 0


def test_another_name_is_an_error():
    with pytest.raises(PluginBroken, match=r"Offers\.__edm_ops__ is not a PyCapsule named 'edm.server_ops'"):
        address_of(Offers(), SERVER)


def test_something_else_is_an_error():
    offers = Offers()
    offers.__edm_ops__ = 3
    with pytest.raises(PluginBroken):
        address_of(offers, CHANNEL)
