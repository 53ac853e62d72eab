"""How EDM's ZeroMQ sockets are set up, on both sides: bounded queues, heartbeats, keys."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import zmq

from edm.plugins.transport_zmq.keys import read_public, read_secret
from edm.wire import MAX_MESSAGE_BYTES

if TYPE_CHECKING:
    from edm.plugins.transport_zmq import ZmqOptions

QUEUE_MESSAGES: Final = 16
"""Messages of one peer that wait, on either side. A channel has one request under way, and repeats of it."""
SLICE_MS: Final = 100
"""Longest wait in libzmq before looking whether to end."""
OVERHEAD_BYTES: Final = 256
"""What encryption adds to a message, and to spare."""
RECONNECT_MS: Final = 20
RECONNECT_MAX_MS: Final = 500


def configure(socket: zmq.Socket[Any], options: ZmqOptions) -> None:
    """What both sides have in common."""
    socket.setsockopt(zmq.SNDHWM, QUEUE_MESSAGES)
    socket.setsockopt(zmq.RCVHWM, QUEUE_MESSAGES)
    socket.setsockopt(zmq.MAXMSGSIZE, MAX_MESSAGE_BYTES + OVERHEAD_BYTES)
    socket.setsockopt(zmq.IPV6, 1)
    socket.setsockopt(zmq.HEARTBEAT_IVL, int(options.heartbeat_s * 1000))
    socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, int(options.silence_s * 1000))
    # Bytes that nobody acknowledges for so long end the connection as silence does. Source: zmq_setsockopt(3).
    socket.setsockopt(zmq.TCP_MAXRT, int(options.silence_s * 1000))
    socket.setsockopt(zmq.RCVTIMEO, SLICE_MS)


def configure_client(socket: zmq.Socket[Any], options: ZmqOptions) -> None:
    """A client's: connects anew by itself, and queues nothing for a server that is not there."""
    configure(socket, options)
    socket.setsockopt(zmq.LINGER, 0)
    socket.setsockopt(zmq.IMMEDIATE, 1)
    socket.setsockopt(zmq.RECONNECT_IVL, RECONNECT_MS)
    socket.setsockopt(zmq.RECONNECT_IVL_MAX, RECONNECT_MAX_MS)
    socket.setsockopt(zmq.CONNECT_TIMEOUT, int(options.silence_s * 1000))
    if options.server_key and options.key is not None:
        public, secret = read_secret(options.key)
        socket.setsockopt(zmq.CURVE_SERVERKEY, read_public(options.server_key))
        socket.setsockopt(zmq.CURVE_PUBLICKEY, public)
        socket.setsockopt(zmq.CURVE_SECRETKEY, secret)


def configure_server(socket: zmq.Socket[Any], options: ZmqOptions) -> None:
    """A memory server's: a client that connects anew takes its old connection's place."""
    configure(socket, options)
    socket.setsockopt(zmq.ROUTER_HANDOVER, 1)
    socket.setsockopt(zmq.LINGER, 1000)
    if options.key is not None:
        _, secret = read_secret(options.key)
        socket.setsockopt(zmq.CURVE_SERVER, 1)
        socket.setsockopt(zmq.CURVE_SECRETKEY, secret)
        socket.setsockopt(zmq.ZAP_DOMAIN, b"edm")
