"""The server's default address, and the descriptors that its connections take."""

from __future__ import annotations

import os
import resource


def raise_descriptor_limit() -> None:
    """Raise this process's soft limit of descriptors to the hard limit; the default of 1,024 only matters to select."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def check_descriptors(clients: int) -> int:
    """Return the number of connections that a server for this many clients accepts.

    It is more than twice the number of clients, so that a client beyond the limit can be sent a refusal. Raises
    ValueError if the process's limit of descriptors is too low.
    """
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    connections = 2 * clients + 16
    if connections > soft // 2:
        raise ValueError(
            f"max_clients is {clients}, which takes {2 * connections} descriptors, and this process may have {soft}; "
            "lower it, or raise the limit (ulimit -n)"
        )
    return connections


def default_address() -> str:
    """Return the default address of `drp serve`, in the user's runtime directory or in /tmp."""
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    return f"ipc://{runtime}/drp/server" if runtime else f"ipc:///tmp/drp-{os.getuid()}/server"
