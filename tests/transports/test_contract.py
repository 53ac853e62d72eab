"""All built-in transports keep the contract, with real processes."""

import pytest

from edm.plugins.transport_mpi.launch import find_mpiexec
from edm.plugins.transport_zmq.keys import new_keys
from edm.testing import TransportContract
from edm.types import LaunchPlan


class TestInproc(TransportContract):
    transport = "inproc"


@pytest.mark.mpi
class TestMpi(TransportContract):
    transport = "mpi"


@pytest.mark.mpi
class TestMpiWithThreeMemoryServers(TransportContract):
    transport = "mpi"
    comes_back = False

    @classmethod
    def plan(cls, options, dms, dm_handler):
        return LaunchPlan(((find_mpiexec(), "-n", "3", *dms, ":", "-n", "1", *dm_handler),))


class TestZmq(TransportContract):
    """A private server on a socket file."""

    transport = "zmq"


class TestZmqWithKeys(TransportContract):
    """Loopback TCP, with keys on both sides."""

    transport = "zmq"
    stands_alone = True

    @pytest.fixture(scope="class")
    @classmethod
    def transport_options(cls, tmp_path_factory, free_port):
        here = tmp_path_factory.mktemp("keys")
        secret, public = new_keys(here, "both sides")
        return {
            "listen": [f"tcp://127.0.0.1:{free_port()}"],
            "key": str(secret),
            "server_key": str(public),
            "clients": str(public),
        }

    @classmethod
    def plan(cls, options, dms, dm_handler):
        return LaunchPlan((dms, dm_handler))


class TestZmqWithTwoMemoryServers(TransportContract):
    """Two servers on socket files, each started with its own listen address."""

    transport = "zmq"
    stands_alone = True
    comes_back = False

    @pytest.fixture(scope="class")
    @classmethod
    def transport_options(cls, tmp_path_factory):
        here = tmp_path_factory.mktemp("two")
        return {"dms": [f"ipc://{here}/a.sock", f"ipc://{here}/b.sock"]}

    @classmethod
    def plan(cls, options, dms, dm_handler):
        servers = [(*dms, endpoint) for endpoint in options.dms]
        return LaunchPlan((*servers, dm_handler))
