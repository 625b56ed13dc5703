"""The errors of drp. Bad arguments are ValueErrors, as everywhere in Python; a lost connection is a ConnectionError."""

from __future__ import annotations


class WorkerError(RuntimeError):
    """A worker could not start, raised, died or did not answer; the message says which, how, and its last words."""


class RefusedError(RuntimeError):
    """The server did not take a request, or did not finish it: `code` is "busy", "draining" or "version".

    A server of another version may have another code. `reason` says why, for people.
    """

    def __init__(self, code: str, reason: str) -> None:
        super().__init__(f"{code}: {reason}")
        self.code, self.reason = code, reason
