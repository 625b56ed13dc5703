"""Client: what a user holds; a thread of its own talks to the server."""

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

from drp.client.arrays import Library, find_library
from drp.client.connection import Connection, Curve
from drp.client.options import Options, to_submit
from drp.client.run import RemoteRun, Update
from drp.errors import ProtocolError
from drp.protocol import keys
from drp.protocol.client_messages import Metrics, Query, Status
from drp.protocol.codec import encode
from drp.protocol.frames import nbytes_of_samples
from drp.protocol.messages import ModelSpec
from drp.sampling.result import Result

if TYPE_CHECKING:
    from typing_extensions import Unpack

Answer = TypeVar("Answer")

SHARED = 1 << 18
"""Bytes of samples from which on they come in shared memory, if the server is on this host."""


class Client:
    """A session with a server: `sample` and `submit` as those of `drp.Leader`, from any thread.

        with drp.Client("ipc:///run/user/1000/drp/server") as client:
            result = client.sample(labels=[3, 1, 4], steps=48, mode="aggressive")

    address: the server's; `drp serve` prints it.
    server_key, key: for tcp://, the file with the server's public key and that with this client's secret one, both made
        by `drp keys`.
    name: of this client, for the server's log.
    timeout: seconds until the server must have answered.
    arrays: whose arrays results are, "torch" or "numpy"; by default torch's if it is installed. Either's may be given.

    Raises ConnectionError if it does not, drp.client.RefusedError if it speaks another version, ValueError for keys
    that cannot be read.
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
        self._local = address.startswith("ipc://")
        self._numbers = itertools.count(1)
        self._connection = Connection(
            address, name or f"python, process {os.getpid()}", _curve(address, server_key, key)
        )
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
        """The name of what is served."""
        return self._welcome.model

    @property
    def spec(self) -> ModelSpec:
        return self._welcome.spec

    @property
    def devices(self) -> tuple[str, ...]:
        """The workers' places, by number."""
        return self._welcome.devices

    @property
    def closed(self) -> bool:
        """Whether the session is over, by `close` or because the server is gone."""
        return self._connection.closed

    def submit(
        self,
        *,
        progress: bool = False,
        previews: int = 0,
        timeline: bool = False,
        on_update: Callable[[Update], None] | None = None,
        **options: Unpack[Options],
    ) -> RemoteRun:
        """Ask for a run and return at once; the options are those of `drp.leader.request.Request`, less `callback`.

        progress: let `progress()` of what is returned yield updates.
        previews: with the state every so many steps; 0 for none.
        timeline: with what was evaluated where and when.
        on_update: called with each update, in the client's own thread, instead of `progress()`; it must return at once.

        Raises ValueError for options that no server can be asked for, ConnectionError if there is no server any more.
        What is returned has a `drp.Result`, or raises: ValueError for options that cannot be; RefusedError if the
        server has too much to do or is about to end; WorkerError if the run failed; ConnectionError if the server is
        lost.
        """
        ways: dict[str, Any] = {"progress": progress, "previews": previews, "timeline": timeline}
        try:
            submit, frames = to_submit(next(self._numbers) % 2**31, options, ways)
            if self._local and nbytes_of_samples(submit, self.spec) >= SHARED:
                submit = dataclasses.replace(submit, memory=True)
            encode(submit)
        except ProtocolError as error:
            raise ValueError(str(error)) from None
        run = RemoteRun(submit.request, self._connection.cancel, self._library, on_update)
        self._connection.submit(run, submit, frames)
        return run

    def sample(self, **options: Unpack[Options]) -> Result[Any]:
        """Sample once, as `drp.Leader.sample` does, with the same bits. What it raises, `submit` says."""
        run = self.submit(**options)
        try:
            return run.result()
        finally:
            run.cancel()  # for an interrupt of this thread: nobody wants the run any more

    def status(self, timeout: float = 10.0) -> Status:
        """Ask how the server is; TimeoutError if it does not say so in time."""
        answer: Future[Status] = self._connection.ask(Query("status"))
        return _within(answer, timeout)

    def metrics(self, timeout: float = 10.0) -> str:
        """Return the server's metrics in the text format of Prometheus."""
        answer: Future[Metrics] = self._connection.ask(Query("metrics"))
        return _within(answer, timeout).text

    def close(self) -> None:
        """Cancel the runs under way and end the session; more calls do nothing."""
        self._end()

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def _within(answer: Future[Answer], timeout: float) -> Answer:
    """Wait for an answer; raise TimeoutError, in Python 3.10 too, where that of futures is another."""
    if wait([answer], timeout).not_done:
        raise TimeoutError(f"no answer within {timeout:g} s")
    return answer.result()


def _curve(address: str, server_key: str | Path | None, key: str | Path | None) -> Curve | None:
    if address.startswith("ipc://"):
        return None
    if not address.startswith("tcp://") or server_key is None or key is None:
        raise ValueError(f"address is {address!r}; give ipc://PATH, or tcp://HOST:PORT with server_key and key")
    return Curve(keys.public(Path(server_key)), *keys.pair(Path(key)))
