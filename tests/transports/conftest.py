"""Fixtures of the transports' tests."""

import socket

import pytest


@pytest.fixture(scope="session")
def free_port():
    """Call it for a TCP port of the loopback interface that was free just now."""

    def find():
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            return listener.getsockname()[1]

    return find
