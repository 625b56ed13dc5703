"""The client of a server that `drp serve` runs: runs on a leader in another process, or on another host."""

from drp.client.client import Client
from drp.client.run import RemoteRun, Update
from drp.errors import RefusedError

__all__ = ["Client", "RefusedError", "RemoteRun", "Update"]
