"""The public client. A separate thread uses the socket, see `drp.client.connection`."""

from __future__ import annotations

import dataclasses
import itertools
import os
import weakref
from collections.abc import Callable
from concurrent.futures import Future, wait
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

from drp.client.connection import Connection, Curve
from drp.client.options import SubmitArguments, to_submit
from drp.client.run import RemoteRun, Update
from drp.errors import ProtocolError
from drp.protocol import keys
from drp.protocol.arrays import Library, find_library
from drp.protocol.client_messages import Metrics, Query, Status
from drp.protocol.codec import encode
from drp.protocol.frames import nbytes_of_samples
from drp.protocol.messages import ModelSpec
from drp.sampling.result import Result

if TYPE_CHECKING:
    from typing_extensions import Unpack

Answer = TypeVar("Answer")

SHARED = 1 << 18
"""Samples of at least this many bytes are returned in shared memory, if the server is on this host."""


class Client:
    """A session with a server, with the methods `sample` and `submit` of `drp.Leader`. It is thread-safe.

        with drp.Client("ipc:///run/user/1000/drp/server") as client:
            result = client.sample(labels=[3, 1, 4], steps=48, mode="aggressive")

    address: the address of the server, which `drp serve` prints.
    server_key, key: for tcp://, the files with the server's public key and with this client's secret key, made by
        `drp keys`.
    name: the name of this client in the server's log.
    timeout: seconds within which the server must answer.
    arrays: the library of the arrays in results, "torch" or "numpy"; by default torch if it is installed. Options may
        be arrays of either.

    Raises ConnectionError if the server does not answer, drp.client.RefusedError if it speaks another version of the
    protocol, and ValueError for keys that cannot be read.
    """

    def __init__(
        self,
        address: str,
        *,
        server_key: str | Path | None = None,
        key: str | Path | None = None,
        name: str = "",
        timeout: float = 10.0,
        arrays: Library | None = None,
    ) -> None:
        self._library = find_library(arrays)
        curve = _curve(address, server_key, key)
        self._local = curve is None
        self._numbers = itertools.count(1)
        self._connection = Connection(address, name or f"python, process {os.getpid()}", curve)
        self._end = weakref.finalize(self, self._connection.close)  # also at interpreter exit
        try:
            self._welcome = _within(self._connection.opened, timeout)
        except TimeoutError:
            self.close()
            raise ConnectionError(f"no server answers at {address} within {timeout:g} s") from None
        except BaseException:
            self.close()
            raise

    @property
    def model(self) -> str:
        """The name of the served model."""
        return self._welcome.model

    @property
    def spec(self) -> ModelSpec:
        return self._welcome.spec

    @property
    def devices(self) -> tuple[str, ...]:
        """The device of each worker."""
        return self._welcome.devices

    @property
    def closed(self) -> bool:
        """Whether the session has ended, by `close` or because the server was lost."""
        return self._connection.closed

    def submit(
        self,
        *,
        progress: bool = False,
        previews: int = 0,
        timeline: bool = False,
        on_update: Callable[[Update], None] | None = None,
        **options: Unpack[SubmitArguments],
    ) -> RemoteRun:
        """Submit a run and return immediately. The options are those of `drp.leader.request.Request` except `callback`.

        progress: report updates of the run's progress, by `progress()` of the returned future.
        previews: include the state in an update every `previews` steps; 0 for none.
        timeline: include in the updates when each evaluation took place, and on which worker.
        on_update: called with each update in the client's thread, in place of `progress()`; it must return immediately.

        Raises ValueError for options that cannot be sent to a server, and ConnectionError if the server was lost. The
        future has a `drp.Result`, or raises ValueError for invalid options, RefusedError if the server is at its limit
        or about to end, WorkerError if the run failed, and ConnectionError if the server was lost.
        """
        reporting: dict[str, Any] = {"progress": progress, "previews": previews, "timeline": timeline}
        try:
            submit, frames = to_submit(next(self._numbers) % 2**31, options, reporting)
            if self._local and nbytes_of_samples(submit, self.spec) >= SHARED:
                submit = dataclasses.replace(submit, memory=True)
            encode(submit)
        except ProtocolError as error:
            raise ValueError(str(error)) from None
        run = RemoteRun(submit.request, self._connection.cancel, self._library, on_update)
        self._connection.submit(run, submit, frames)
        return run

    def sample(self, **options: Unpack[SubmitArguments]) -> Result[Any]:
        """Sample as `drp.Leader.sample` does, with bit-identical samples. The errors are those of `submit`."""
        run = self.submit(**options)
        try:
            return run.result()
        finally:
            run.cancel()  # In case this thread was interrupted: the result is no longer needed.

    def status(self, timeout: float = 10.0) -> Status:
        """Return the status of the server; raise TimeoutError if it does not answer in time."""
        answer: Future[Status] = self._connection.ask(Query("status"))
        return _within(answer, timeout)

    def metrics(self, timeout: float = 10.0) -> str:
        """Return the server's metrics in the text format of Prometheus."""
        answer: Future[Metrics] = self._connection.ask(Query("metrics"))
        return _within(answer, timeout).text

    def close(self) -> None:
        """Cancel the current runs and end the session. Further calls do nothing."""
        self._end()

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def _within(answer: Future[Answer], timeout: float) -> Answer:
    """Wait for an answer; raise the builtin TimeoutError, which futures do from Python 3.11 on only."""
    if wait([answer], timeout).not_done:
        raise TimeoutError(f"no answer within {timeout:g} s")
    return answer.result()


def _curve(address: str, server_key: str | Path | None, key: str | Path | None) -> Curve | None:
    scheme = address.partition("://")[0] if isinstance(address, str) else ""
    if scheme == "ipc":
        return None
    if scheme != "tcp" or server_key is None or key is None:
        raise ValueError(f"address is {address!r}; give ipc://PATH, or tcp://HOST:PORT with server_key and key")
    return Curve(keys.public(Path(server_key)), *keys.pair(Path(key)))
