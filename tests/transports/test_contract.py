"""All built-in transports keep the contract, with real processes."""

import pytest

from edm.testing import TransportContract


class TestInproc(TransportContract):
    transport = "inproc"


@pytest.mark.mpi
class TestMpi(TransportContract):
    transport = "mpi"
