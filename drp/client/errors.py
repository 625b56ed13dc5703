"""What can go wrong between a client and its server."""

from __future__ import annotations


class RefusedError(RuntimeError):
    """The server did not take a request, or did not finish it: `code` is "busy", "draining" or "version".

    A server of another version may have another code. `reason` says why, for people.
    """

    def __init__(self, code: str, reason: str) -> None:
        super().__init__(f"{code}: {reason}")
        self.code, self.reason = code, reason
