"""Options of TCP sockets by which a peer whose host or network is gone is noticed."""

from __future__ import annotations

from typing import Final

import zmq

LOST_AFTER: Final = 8
"""Seconds after which a silent host counts as gone, with data on their way to it or without.

ZMTP's heartbeats cannot be used: libzmq aborts the process when one is due on a connection that broke while its
messages were unread (`stream_engine_base.cpp`, "!_io_error").
"""
IDLE: Final = 4
"""Seconds without data before the kernel probes the peer, once a second."""


def detect_lost_peers(socket: zmq.Socket[bytes]) -> None:
    """Have the kernel close the connections of a socket to hosts that do not answer."""
    socket.setsockopt(zmq.TCP_KEEPALIVE, 1)
    socket.setsockopt(zmq.TCP_KEEPALIVE_IDLE, IDLE)
    socket.setsockopt(zmq.TCP_KEEPALIVE_INTVL, 1)
    socket.setsockopt(zmq.TCP_KEEPALIVE_CNT, LOST_AFTER - IDLE)
    socket.setsockopt(zmq.TCP_MAXRT, LOST_AFTER * 1000)
