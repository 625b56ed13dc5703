"""The server of one leader, which executes clients' requests. The client protocol is in drp/protocol/SPEC.md."""

from __future__ import annotations

import logging
import math
import os
import threading
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import CancelledError
from typing import Final

import zmq

from drp.errors import ProtocolError, WorkerError
from drp.leader.leader import Leader
from drp.protocol.arrays import add_array
from drp.protocol.client_messages import (
    HEARTBEAT_INTERVAL,
    TO_SERVER,
    VERSION,
    Accepted,
    Ack,
    Cancel,
    Ended,
    Evaluation,
    Metrics,
    Open,
    Query,
    Refused,
    Status,
    Submit,
    TensorData,
    ToServer,
    Welcome,
)
from drp.protocol.codec import decode
from drp.protocol.endpoint import Endpoint
from drp.protocol.frames import Frame, FrameWriter, shape_of_samples
from drp.protocol.keys import Keys
from drp.sampling.result import Result
from drp.server import options
from drp.server.clients import ClientSession, ClientSessions
from drp.server.endpoint import check_descriptors
from drp.server.evaluation_buffer import EvaluationBuffer
from drp.server.metrics import Counts, prometheus, server_gauges
from drp.server.server_request import ServerRequest

MAX_MESSAGES_PER_TURN: Final = 100
"""Maximum number of messages handled in one iteration of the loop."""
CANCEL_TIMEOUT: Final = 5.0
"""Seconds that runs have to end after they were cancelled at the end of draining."""

log = logging.getLogger(__name__)


class Server:
    """Accepts requests at `address` and submits them to `leader`, until it is drained.

    model: the model's name as reported to clients.
    address: ipc://PATH, in a directory of mode 0700, or tcp://HOST:PORT, with `keys`.
    max_requests: the maximum number of concurrent requests of all clients together, including waiting ones.
    max_clients: the maximum number of concurrent sessions.
    stall: seconds without progress of any request after which the server reports itself unhealthy.

    Raises ValueError for an invalid address, OSError if it is in use.

        _clients, _requests                sessions, and requests that are not over
        _reports, _unreported              requests with updates, from the leader's thread (guarded by `_gate`), and
                                           those whose client's connection was full
        _wakeup                            the eventfd by which the leader's thread wakes the server
        _evaluation_buffer, _listening     evaluations for clients that ask for them, and whether they are recorded
        _draining                          when draining ends, None before
        _began, _last_progress, _looked    when the server started, a request last progressed, and the loop last ran
        _counts                            totals for the metrics
    """

    def __init__(
        self,
        leader: Leader,
        model: str,
        address: str,
        *,
        keys: Keys | None = None,
        max_requests: int = 64,
        max_clients: int = 128,
        stall: float = 30.0,
    ) -> None:
        if max_requests < 1 or max_clients < 1 or not 0 < stall < math.inf:
            limits = f"max_requests is {max_requests}, max_clients {max_clients}"
            raise ValueError(f"{limits} and stall {stall}; give 1 or more, and seconds above 0")
        self._leader, self._model, self._max_requests, self._stall = leader, model, max_requests, stall
        self._max_clients = max_clients
        self._endpoint = Endpoint(address, keys, check_descriptors(max_clients))
        self._clients = ClientSessions(self._endpoint, self._on_gone, self._on_unacknowledged)
        self._requests: set[ServerRequest] = set()
        self._reports: deque[ServerRequest] = deque()
        self._unreported: set[ServerRequest] = set()
        self._counts = Counts()
        self._evaluation_buffer, self._listening = EvaluationBuffer(), False
        self._began = self._last_progress = self._looked = time.monotonic()
        self._draining: float | None = None
        self._gate = threading.Lock()
        self._wakeup = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._poller = zmq.Poller()
        for each in (self._endpoint.socket, self._endpoint.monitor, self._wakeup):
            self._poller.register(each, zmq.POLLIN)

    @property
    def address(self) -> str:
        """The address at which the server listens; for tcp://HOST:* with the port that was chosen."""
        return self._endpoint.address

    def drain(self, seconds: float) -> None:
        """Refuse new requests, finish the current ones within `seconds`, then let `run` return.

        A second call can only shorten the time. May be called from any thread and from signal handlers.
        """
        until = time.monotonic() + seconds
        self._draining = until if self._draining is None else min(until, self._draining)
        if self._wakeup >= 0:
            os.eventfd_write(self._wakeup, 1)

    def run(self) -> None:
        """Serve until drained; raise WorkerError if the leader is lost."""
        while not self._is_over():
            self._wait()
            self._receive_messages()
            self._report_updates()
            if time.monotonic() - self._looked >= HEARTBEAT_INTERVAL:
                self._looked = time.monotonic()
                self._clients.check()
        if self._leader.closed and self._draining is None:
            raise WorkerError("the leader has lost its workers; all clients were notified")

    def close(self) -> None:
        """Cancel the remaining requests and close the socket. The leader is not closed."""
        self._clients.close()
        self._listen(False)
        self._endpoint.close()
        with self._gate:  # Runs that were just cancelled still report.
            wakeup, self._wakeup = self._wakeup, -1  # Before closing, since a signal handler may run in between.
            os.close(wakeup)

    def _is_over(self) -> bool:
        if self._leader.closed:
            return all(request.future.done() for request in self._requests) and not self._reports
        if self._draining is None:
            return False
        now = time.monotonic()
        if now > self._draining:
            for request in self._requests:
                request.future.cancel()
        busy = self._requests or self._clients.unsent or self._clients.unacknowledged
        return not busy or now > self._draining + CANCEL_TIMEOUT

    def _wait(self) -> None:
        left = min(self._looked + HEARTBEAT_INTERVAL - time.monotonic(), self._clients.poll_timeout)
        if self._draining is not None:
            left = min(left, self._draining - time.monotonic() if self._draining > time.monotonic() else 0.1)
        ready = dict(self._poller.poll(math.ceil(max(0.0, left) * 1000)))
        if self._wakeup in ready:
            os.eventfd_read(self._wakeup)
        if self._endpoint.monitor in ready and self._endpoint.has_lost():
            self._clients.lost()

    # Messages of clients.

    def _receive_messages(self) -> None:
        for _ in range(MAX_MESSAGES_PER_TURN):
            received = self._endpoint.receive()
            if received is None:
                return
            address, _, (head, *frames) = received
            try:
                self._on_message(address, decode(bytes(head), TO_SERVER), frames)
            except ProtocolError as error:
                self._counts.bad_messages += 1
                self._clients.reply(address, Refused(None, "protocol", options.error_text(error, 2000)))

    def _on_message(self, address: bytes, message: ToServer, frames: Sequence[Frame]) -> None:
        client = self._clients.get(address)
        if frames and not isinstance(message, Submit):
            raise ProtocolError(f"{len(frames)} frames after a {type(message).__name__}, which has no tensors")
        if isinstance(message, Open):
            self._open(address, message)
        elif client is None:
            raise ProtocolError(f"{type(message).__name__} before Open")
        elif isinstance(message, Submit):
            self._submit(client, message, frames)
        elif isinstance(message, Cancel):
            if message.request in client.open_requests:
                client.open_requests[message.request].cancel()
        elif isinstance(message, Ack):
            self._clients.acknowledge(client, message.request)
        elif isinstance(message, Query):
            self._clients.send(client, self.status() if message.what == "status" else Metrics(self.metrics()))

    def _open(self, address: bytes, message: Open) -> None:
        if message.version != VERSION:
            self._clients.reply(address, Refused(None, "version", f"this server speaks version {VERSION}"))
            return
        if self._clients.get(address) is None and len(self._clients) >= self._max_clients:
            self._counts.refused += 1
            reason = f"{self._max_clients} clients are connected, as many as this server takes; try again later"
            self._clients.reply(address, Refused(None, "busy", reason))
            return
        log.info("client %r has opened a session", message.name)
        client = self._clients.open(address, message.name)
        self._clients.send(
            client, Welcome(VERSION, self._model, self._leader.spec, self._leader.devices, self._max_requests)
        )

    def _submit(self, client: ClientSession, submit: Submit, frames: Sequence[Frame]) -> None:
        if submit.request in client.open_requests or submit.request in client.unacknowledged:
            raise ProtocolError(f"request {submit.request} is open already")
        ahead = len(self._requests)
        request = ServerRequest(client.address, submit, self._report, self._note_progress)
        try:
            refused = self._refusal(client, submit, ahead) or self._begin(request, frames)
        except ProtocolError as error:
            self._counts.bad_messages += 1
            refused = Refused(submit.request, "protocol", options.error_text(error, 2000))
        if refused is not None:
            request.release()
            self._counts.refused += 1
            self._clients.send(client, refused)
            return
        if not self._requests:
            self._note_progress()
        self._requests.add(request)
        client.open_requests[submit.request] = request
        self._clients.send(client, Accepted(submit.request, ahead))
        request.future.add_done_callback(request.on_end)

    def _refusal(self, client: ClientSession, submit: Submit, ahead: int) -> Refused | None:
        """Return why the server refuses a request before it is passed to the leader, None if it does not."""
        if self._draining is not None or self._leader.closed:
            return Refused(submit.request, "draining", "this server is about to end")
        if ahead >= self._max_requests:
            return Refused(submit.request, "busy", f"{ahead} requests are open, as many as this server takes")
        if client.requests >= self._max_requests:
            reason = f"this client has {client.requests} open requests and unread results; read those first"
            return Refused(submit.request, "busy", reason)
        return None

    def _begin(self, request: ServerRequest, frames: Sequence[Frame]) -> Refused | None:
        """Submit a request to the leader, or return why the leader does not accept it."""
        self._listen(self._listening or request.submit.timeline)
        try:
            options.check_samples(request.submit, self._leader.spec, self._endpoint.local)
            given = options.options(request.submit, frames, request.on_step)
            if request.submit.memory:
                request.memory, given["out"] = options.allocate_samples(
                    shape_of_samples(request.submit, self._leader.spec)
                )
            request.future = self._leader.submit(**given)
        except ProtocolError:
            raise
        except WorkerError as error:
            return Refused(request.request, "draining", options.error_text(error, 2000))
        except ValueError as error:
            return Refused(request.request, "invalid", options.error_text(error, 2000))
        except Exception as error:  # Any error caused by the options is reported to the client; the server goes on.
            log.warning("a request raised", exc_info=True)
            return Refused(request.request, "invalid", repr(error)[:2000])
        return None

    def _listen(self, wanted: bool) -> None:
        """Subscribe to the leader's events while a client wants them, since recording them costs a little time."""
        if wanted != self._listening:
            self._listening = wanted
            (self._leader.subscribe if wanted else self._leader.unsubscribe)(self._evaluation_buffer)

    # Called in the leader's thread.

    def _report(self, request: ServerRequest) -> None:
        with self._gate:
            if not request.reported and self._wakeup >= 0:
                request.reported = True
                self._reports.append(request)
                os.eventfd_write(self._wakeup, 1)

    def _note_progress(self) -> None:
        self._last_progress = time.monotonic()

    # Messages to clients.

    def _report_updates(self) -> None:
        self._clients.flush()
        requests, self._unreported = self._unreported, set()
        while self._reports:
            request = self._reports.popleft()
            request.reported = False  # Reset before reading the request, so that later updates are reported again.
            requests.add(request)
        for request in requests & self._requests:
            client, over = self._clients.get(request.client), request.future.done()
            if client is not None and (over or not client.outbox):
                for progress, frames in request.updates(self._evaluations):
                    self._clients.send(client, progress, frames)
            elif client is not None and not over:
                self._unreported.add(request)
            if over:
                self._end(request, client)

    def _evaluations(self, request: ServerRequest, max_count: int) -> tuple[Evaluation, ...]:
        number = request.future.number
        return (
            self._evaluation_buffer.pop_evaluations(number, max_count)
            if number is not None and request.submit.timeline
            else ()
        )

    def _end(self, request: ServerRequest, client: ClientSession | None) -> None:
        """Send a finished run's result, or its error, to the client, and remove the request."""
        self._requests.remove(request)
        if request.future.number is not None:
            self._evaluation_buffer.discard(request.future.number)
        self._listen(any(other.submit.timeline for other in self._requests))
        self._note_progress()
        if client is not None:
            del client.open_requests[request.request]
        client = self._clients.get(request.client)  # The session may have ended in the meantime.
        try:
            self._finish(request, client, request.future.result(timeout=0))
        except (Exception, CancelledError) as error:
            ended = self._ended(request, error)
            if client is not None:
                self._clients.send(client, ended)
        request.release()

    def _ended(self, request: ServerRequest, error: BaseException) -> Ended:
        """Count a run that ended without samples; return the message for its client."""
        if not isinstance(error, CancelledError):
            self._counts.failed += 1
            return Ended(request.request, "failed", options.error_text(error, 20_000))
        self._counts.cancelled += 1
        if request.cancelled:
            return Ended(request.request, "cancelled", "")
        return Ended(request.request, "draining", "the server ended first")

    def _finish(self, request: ServerRequest, client: ClientSession | None, result: Result) -> None:
        taken = time.monotonic() - request.began
        waited = max(0.0, taken - result.seconds)
        self._counts.add(result, taken, waited)
        if client is None:
            return
        frames = FrameWriter()
        if request.memory is not None:
            samples = TensorData("float32", tuple(result.samples.shape), memory=request.memory.handle)
            self._clients.keep(client, request.request, request.memory)
            request.memory = None
        else:
            samples = add_array(frames, "samples", result.samples)
        self._clients.send(client, options.finished(request.request, result, samples, waited), frames.frames)

    def _on_gone(self, client: ClientSession) -> None:
        log.info("client %r has left, with %d unfinished requests", client.name, len(client.open_requests))
        self._counts.lost_clients += bool(client.open_requests)
        for request in client.open_requests.values():
            request.cancel()

    def _on_unacknowledged(self, client: ClientSession) -> None:
        self._counts.unacknowledged += 1

    # Status and metrics.

    def status(self) -> Status:
        now, counts = time.monotonic(), self._counts
        still = now - self._last_progress if self._requests else 0.0
        state = "lost" if self._leader.closed else "serving" if self._draining is None else "draining"
        reason = "the leader is lost" if self._leader.closed else ""
        if still > self._stall:
            reason = f"{len(self._requests)} requests, and no progress of any for {still:.0f} s"
        return Status(
            state=state,  # type: ignore[arg-type]  # one of the three
            healthy=not reason,
            reason=reason,
            clients=len(self._clients),
            requests=len(self._requests),
            max_requests=self._max_requests,
            uptime=now - self._began,
            since_progress=still,
            finished=counts.finished,
            cancelled=counts.cancelled,
            failed=counts.failed,
            refused=counts.refused,
        )

    def metrics(self) -> str:
        unacknowledged = self._clients.unacknowledged
        gauges = server_gauges(self.status(), self._leader.workers, self._leader.dropped, unacknowledged)
        return prometheus(self._counts, gauges)
