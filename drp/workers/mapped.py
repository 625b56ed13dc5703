"""Mapped: memory of the leader's on the host that this worker has open, in case that another run lies there."""

from __future__ import annotations

from collections import OrderedDict

from drp.protocol.memory import KEPT, SharedMemory
from drp.protocol.messages import Handle

MANY = 4
"""Pieces of memory that stay mapped."""


class Mapped:
    """Opens memory; what was asked for least lately goes first."""

    def __init__(self, most: int = KEPT) -> None:
        self._most = most
        self._kept: OrderedDict[int, SharedMemory] = OrderedDict()

    def open(self, handle: Handle, number: int) -> SharedMemory:
        """Return memory of the leader's, by the number that it has there, 0 if it will not come again.

        Raises ProtocolError if it is not as its handle says.
        """
        memory = self._kept.pop(number, None)
        if memory is None or memory.nbytes != handle.nbytes:
            memory = SharedMemory.open(handle)
        if number:
            self._kept[number] = memory
            while len(self._kept) > MANY or sum(each.nbytes for each in self._kept.values()) > self._most:
                self._kept.popitem(last=False)
        return memory
