"""The connection to a server. A separate thread uses the socket and ends with the connection."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass
from typing import Any

import zmq
from zmq.utils.monitor import parse_monitor_message

from drp.client.run import RemoteRun
from drp.errors import ProtocolError, RefusedError
from drp.protocol.client_messages import (
    MAX_FRAME_NBYTES,
    SILENCE_TIMEOUT,
    TO_CLIENT,
    VERSION,
    Accepted,
    Ack,
    Cancel,
    Ended,
    Finished,
    Heartbeat,
    Metrics,
    Open,
    Progress,
    Query,
    Refused,
    Status,
    ToClient,
    ToServer,
    Welcome,
)
from drp.protocol.codec import decode, encode
from drp.protocol.frames import Frame

POLL_TIMEOUT_MS = 1000
"""Milliseconds of one wait."""


@dataclass(frozen=True)
class Curve:
    """Keys in Z85: the public key of the server, and the key pair of this client."""

    server: bytes
    public: bytes
    secret: bytes


class Connection:
    """A session with a server. All methods are thread-safe."""

    def __init__(self, address: str, name: str, curve: Curve | None) -> None:
        self.address = address
        self.opened: Future[Welcome] = Future()
        self._open = encode(Open(VERSION, name))
        self._outgoing: deque[list[Frame]] = deque([[self._open]])
        self._runs: dict[int, RemoteRun] = {}
        self._queries: dict[str, deque[Future[Any]]] = {"status": deque(), "metrics": deque()}
        self._gate = threading.Lock()
        self._error: Exception | None = None
        self._closing = False
        self._heard = time.monotonic()
        self._wakeup = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._context = zmq.Context(io_threads=1)
        socket = self._context.socket(zmq.DEALER)
        socket.setsockopt(zmq.LINGER, 200)  # A last Cancel has a moment to leave.
        socket.setsockopt(zmq.MAXMSGSIZE, MAX_FRAME_NBYTES)
        if curve is not None:
            socket.setsockopt(zmq.CURVE_SERVERKEY, curve.server)
            socket.setsockopt(zmq.CURVE_PUBLICKEY, curve.public)
            socket.setsockopt(zmq.CURVE_SECRETKEY, curve.secret)
        self._thread = threading.Thread(target=self._serve, args=(socket,), name="drp-client", daemon=True)
        self._thread.start()

    # Called by other threads.

    @property
    def closed(self) -> bool:
        return self._error is not None or self._closing

    def submit(self, run: RemoteRun, message: ToServer, frames: Sequence[Frame]) -> None:
        """Send a Submit; `run` is notified of its progress and end."""
        self._put(message, frames, lambda: self._runs.__setitem__(run.number, run))

    def cancel(self, number: int) -> None:
        """Send a Cancel if the run has not ended."""
        with contextlib.suppress(ConnectionError):  # The session, and with it the run, has ended.
            if number in self._runs:
                self._put(Cancel(number), (), lambda: None)

    def ask(self, message: Query) -> Future[Any]:
        """Send a Query; return the future of its answer, a Status or Metrics."""
        answer: Future[Any] = Future()
        self._put(message, (), lambda: self._queries[message.what].append(answer))
        return answer

    def close(self) -> None:
        """Cancel the current runs and end the thread."""
        with self._gate:
            if not self._closing:
                self._closing = True
                if self._wakeup >= 0:
                    os.eventfd_write(self._wakeup, 1)
        if threading.current_thread() is not self._thread:
            self._thread.join(10.0)

    def _put(self, message: ToServer, frames: Sequence[Frame], note: Callable[[], None]) -> None:
        data = encode(message)
        with self._gate:
            if self.closed:
                raise ConnectionError(f"the connection to {self.address} is closed: {self._error or 'by this program'}")
            if not self._waits():
                self._heard = time.monotonic()  # The server sends nothing while no answer is outstanding.
            note()
            self._outgoing.append([data, *frames])
            os.eventfd_write(self._wakeup, 1)

    def _waits(self) -> bool:
        return bool(self._runs or any(self._queries.values()) or not self.opened.done())

    # The loop.

    def _serve(self, socket: zmq.Socket[bytes]) -> None:
        # Closed by name: a socket left to the garbage collector would keep the context from ending.
        monitor = socket.get_monitor_socket(zmq.EVENT_DISCONNECTED | zmq.EVENT_HANDSHAKE_FAILED_AUTH)
        poller = zmq.Poller()
        for each in (socket, monitor, self._wakeup):
            poller.register(each, zmq.POLLIN)
        error: Exception = ConnectionError("closed by this program")
        try:
            socket.connect(self.address)
            while not self._closing:
                self._send_queued(socket)
                ready = dict(poller.poll(POLL_TIMEOUT_MS))
                if self._wakeup in ready:
                    os.eventfd_read(self._wakeup)
                self._receive_messages(socket)
                if monitor in ready:
                    if self.opened.done() or _refused(monitor):
                        raise ConnectionError(f"the server at {self.address} has closed the connection")
                    if not self._outgoing:  # A server with too many connections may have closed this one unread.
                        self._outgoing.append([self._open])
                with self._gate:
                    if self.opened.done() and self._waits() and time.monotonic() - self._heard > SILENCE_TIMEOUT:
                        raise ConnectionError(f"the server at {self.address} has been silent for {SILENCE_TIMEOUT:g} s")
        except Exception as lost:
            error = lost
        finally:
            self._shut_down(socket, error)
            socket.disable_monitor()
            monitor.close()
            socket.close()
            self._context.term()

    def _send_queued(self, socket: zmq.Socket[bytes]) -> None:
        while self._outgoing and int(socket.getsockopt(zmq.EVENTS)) & zmq.POLLOUT:
            try:
                # Without a copy: nobody changes the frames of a queued message.
                socket.send_multipart(self._outgoing[0], zmq.NOBLOCK, copy=False)
            except zmq.Again:  # The connection has ended since the socket was found ready; the monitor says why.
                return
            self._outgoing.popleft()

    def _receive_messages(self, socket: zmq.Socket[bytes]) -> None:
        while True:
            try:
                head, *frames = socket.recv_multipart(zmq.NOBLOCK, copy=False)
            except zmq.Again:
                return
            self._heard = time.monotonic()
            answer = self._on(decode(head.bytes, TO_CLIENT), [frame.buffer for frame in frames])
            if answer is not None:
                self._outgoing.append([encode(answer)])

    def _on(self, message: ToClient, frames: Sequence[Frame]) -> ToServer | None:
        match message:
            case Welcome():
                if not self.opened.done():
                    self.opened.set_result(message)
            case Progress():
                self._run(message.request).on_progress(message, frames)
            case Finished():
                self._pop_run(message.request).on_finished(message, frames)
                return Ack(message.request) if message.samples.memory is not None else None
            case Ended():
                self._pop_run(message.request).on_error(message)
            case Refused():
                self._refused(message)
            case Status():
                self._resolve_query("status", message)
            case Metrics():
                self._resolve_query("metrics", message)
            case Accepted() | Heartbeat():
                return None
        return None

    def _run(self, number: int) -> RemoteRun:
        if number not in self._runs:
            raise ProtocolError(f"the server sent a message about request {number}, which is not open")
        return self._runs[number]

    def _pop_run(self, number: int) -> RemoteRun:
        run = self._run(number)
        with self._gate:
            del self._runs[number]
        return run

    def _resolve_query(self, what: str, message: Status | Metrics) -> None:
        if not self._queries[what]:
            raise ProtocolError(f"the server sent {what} without a query for it")
        self._queries[what].popleft().set_result(message)

    def _refused(self, message: Refused) -> None:
        if message.request is not None:
            self._pop_run(message.request).on_error(message)
        elif message.code == "protocol":
            raise ProtocolError(message.reason)
        else:
            raise RefusedError(message.code, message.reason)

    def _shut_down(self, socket: zmq.Socket[bytes], error: Exception) -> None:
        with self._gate:
            self._error = error
            os.close(self._wakeup)
            self._wakeup = -1
        for number in self._runs:
            self._outgoing.append([encode(Cancel(number))])
        if self._closing:
            self._send_queued(socket)
        for run in self._runs.values():
            run.set_exception(CancelledError("the client was closed") if self._closing else _copy_of(error))
        for answer in (self.opened, *(each for asked in self._queries.values() for each in asked)):
            if not answer.done():
                answer.set_exception(_copy_of(error))
        self._runs.clear()


def _refused(monitor: zmq.Socket[bytes]) -> bool:
    """Return whether the server rejected this client's key. A connection that merely ended may be tried again."""
    refused = False
    while monitor.poll(0):
        event = parse_monitor_message(monitor.recv_multipart())
        refused |= event["event"] == zmq.EVENT_HANDSHAKE_FAILED_AUTH
    return refused


def _copy_of(error: Exception) -> Exception:
    """Return a copy of an error for one more future, since raising an error adds a traceback to it."""
    return type(error)(error.code, error.reason) if isinstance(error, RefusedError) else type(error)(*error.args)
