"""Shared memory of another process (memfd_create), opened through /proc."""

from __future__ import annotations

import os

from drp.errors import ProtocolError
from drp.protocol.handles import Handle


def open_memfd(handle: Handle) -> int:
    """Return a descriptor of a peer's memory; raise ProtocolError if it does not match its handle."""
    try:
        descriptor = os.open(f"/proc/{handle.pid}/fd/{handle.fd}", os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise ProtocolError(f"shared memory of process {handle.pid} cannot be opened: {error.strerror}") from error
    size = os.fstat(descriptor).st_size
    if handle.nbytes == 0 or size != handle.nbytes:
        os.close(descriptor)
        raise ProtocolError(f"shared memory is {size} bytes long, not {handle.nbytes}")
    return descriptor
