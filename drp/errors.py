"""The errors of drp, all subclasses of `DRPError`.

Bad arguments are ValueErrors, as everywhere in Python; a lost connection is a ConnectionError, a wait that was too long
a TimeoutError, and a cancelled run a `concurrent.futures.CancelledError`.

    DRPError
        WorkerError    (RuntimeError)  a worker could not start, raised, died or did not answer
        RefusedError   (RuntimeError)  a server did not take a request, or did not finish it
        CudaError      (RuntimeError)  a call of the CUDA runtime or driver failed
        ProtocolError                  a message that violates the protocol
"""

from __future__ import annotations


class DRPError(Exception):
    """The base of all errors that drp defines."""


class WorkerError(DRPError, RuntimeError):
    """A worker could not start, raised, died or did not answer.

    The message names the worker, says how it ended, and quotes what it wrote as it crashed.
    """


class RefusedError(DRPError, RuntimeError):
    """The server did not take a request, or did not finish it.

    `code` is "busy", "draining" or "version"; a server of another version may have another code. `reason` is a
    sentence for people.
    """

    def __init__(self, code: str, reason: str) -> None:
        super().__init__(f"{code}: {reason}")
        self.code, self.reason = code, reason


class CudaError(DRPError, RuntimeError):
    """A call of the CUDA runtime or driver failed."""


class ProtocolError(DRPError):
    """Bytes that are not a message, or a message that violates the protocol."""
