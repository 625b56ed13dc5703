"""The client of a server that `drp serve` runs: runs on a leader in another process, or on another host."""

from drp.client.client import Client
from drp.client.errors import RefusedError
from drp.client.run import RemoteRun, Update

__all__ = ["Client", "RefusedError", "RemoteRun", "Update"]
