"""The fault source `uffd` keeps the contract, with a real program."""

import pytest

from edm.testing import FaultSourceContract


@pytest.mark.uffd
class TestUffd(FaultSourceContract):
    source = "uffd"
